"""Shell. Encodes messages to workers and addresses each to one life of a worker. So a restarted
worker never gets a message that was meant for the process before.
"""

from __future__ import annotations

from typing import Protocol

from gateway.fleet.worker_view import WorkerView
from shared.link import messages
from shared.link.sockets import SendResult


class Transport(Protocol):
    """What the dispatcher needs of the link. A send never waits; its result says what became of the
    message.
    """

    def welcome(self, peer: bytes) -> messages.Welcome:
        """The welcome for a worker: how it reaches the data socket, and the channel that is open to
        it from now on.
        """
        ...

    def forget(self, peer: bytes) -> None:
        """Closes the channel. Messages that still arrive on it are dropped."""
        ...

    def send_data(self, peer: bytes, data: bytes) -> SendResult: ...
    def send_control(self, peer: bytes, data: bytes) -> SendResult: ...


class WorkerOutbox:
    """Sends messages. What to send is decided elsewhere."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def send(self, worker: WorkerView, message: messages.GatewayData) -> SendResult:
        """Sends to the worker's data socket."""
        return self._transport.send_data(worker.peer, messages.encode(message))

    def cancel(self, peer: bytes, sid: messages.StreamId) -> None:
        """Tells the worker that nobody waits for this stream any more."""
        self._transport.send_data(peer, messages.encode(messages.Cancel(sid)))

    def welcome(self, peer: bytes) -> None:
        """Welcomes a worker on its control socket."""
        self._transport.send_control(peer, messages.encode(self._transport.welcome(peer)))

    def forget(self, peer: bytes) -> None:
        """This life of the worker is over."""
        self._transport.forget(peer)
