"""Shell. Messages from this gateway to its workers: encoded, and addressed to one life of a worker,
so that a worker that has restarted never gets what was meant for the process before.
"""

from __future__ import annotations

from typing import Protocol

from gateway.fleet.worker_view import WorkerView
from shared.link import messages
from shared.link.sockets import SendResult


class Transport(Protocol):
    """What the dispatcher needs of the link. A send never waits; its result says what became of
    the message.
    """

    def welcome(self, peer: bytes) -> messages.Welcome:
        """How a worker reaches this gateway's data socket, and the channel that is open to it from
        now on.
        """
        ...

    def forget(self, peer: bytes) -> None:
        """Closes the channel: nothing that comes by it is heard any more."""
        ...

    def send_data(self, peer: bytes, data: bytes) -> SendResult: ...
    def send_control(self, peer: bytes, data: bytes) -> SendResult: ...


class WorkerOutbox:
    """Sends what others decide."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def send(self, worker: WorkerView, message: messages.GatewayData) -> SendResult:
        """To the worker's data socket."""
        return self._transport.send_data(
            messages.identity(worker.id, worker.beat.epoch), messages.encode(message)
        )

    def cancel(self, peer: bytes, sid: messages.StreamId) -> None:
        """Nobody waits for this stream any more."""
        self._transport.send_data(peer, messages.encode(messages.Cancel(sid)))

    def welcome(self, peer: bytes) -> None:
        """To the control socket of a worker that this gateway has just heard of."""
        self._transport.send_control(peer, messages.encode(self._transport.welcome(peer)))

    def forget(self, peer: bytes) -> None:
        """This life of the worker is over."""
        self._transport.forget(peer)
