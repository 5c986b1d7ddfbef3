"""Shell. One worker's conversation with one gateway process: control and data sockets, the
gateway's lease, and what waits to be sent.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from shared.errors import WorkerUnavailable
from shared.link import messages
from shared.link.sockets import DealerSocket, SendResult

log = logging.getLogger("loraplex.session")

# of frames that a gateway does not take; beyond it its requests are dropped
MAX_PENDING_BYTES = 64 << 20
RETRY_S = 0.01  # after the link said FULL
UNHEARD_S = 10.0  # a gateway that has not answered by then is worth a line in the log


class Outbox:
    """Frames of one turn of the event loop, sent as one message."""

    __slots__ = (
        "_done",
        "_frames",
        "_loop",
        "_overflow",
        "_refused",
        "_scheduled",
        "_send",
        "_stuck",
        "_stuck_bytes",
    )

    def __init__(self, overflow: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._send: Callable[[bytes], SendResult] | None = None
        self._overflow = overflow
        self._frames: list[messages.Frame] = []
        self._done: list[messages.Done] = []
        self._refused: list[messages.Refused] = []
        self._stuck = self._stuck_bytes = 0  # frames that the link has not taken
        self._scheduled = False

    def connect(self, send: Callable[[bytes], SendResult]) -> None:
        self._send = send

    def frame(self, sid: messages.StreamId, flags: int, data: bytes, tokens: bytes = b"") -> None:
        self._frames.append((sid, flags, data, tokens))
        if not self._scheduled:
            self._schedule()

    def done(self, done: messages.Done) -> None:
        self._done.append(done)
        self._schedule()

    def refuse(self, refused: messages.Refused) -> None:
        self._refused.append(refused)
        self._schedule()

    def flush(self) -> None:
        self._scheduled = False
        if self._send is None or not (self._frames or self._done or self._refused):
            return
        if (
            self._send(messages.encode(messages.Step(self._frames, self._done, self._refused)))
            is SendResult.OK
        ):
            self._frames, self._done, self._refused = [], [], []
            self._stuck = self._stuck_bytes = 0
            return
        self._scheduled = True
        self._loop.call_later(RETRY_S, self.flush)
        # Counted here, where it is rare, and not at every frame.
        self._stuck_bytes += sum(len(data) for _, _, data, _ in self._frames[self._stuck :])
        self._stuck = len(self._frames)
        if self._stuck_bytes > MAX_PENDING_BYTES:
            self._overflow()

    def give_up(self, reason: str) -> None:
        """What has not left will not: each of its streams ends with a refusal, which leaves as soon
        as the gateway takes something again.
        """
        for sid in {frame[0] for frame in self._frames}:
            self.refuse(messages.Refused(sid, WorkerUnavailable.code, reason, True))
        self._frames, self._done = [], []
        self._stuck = self._stuck_bytes = 0

    def _schedule(self) -> None:
        # Not at once: every stream that the engine moved in this step gets into the same message.
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self.flush)


class GatewaySession:
    """Opens the control socket to `endpoint`; the data socket once the gateway has said where.
    Reconnects by itself.
    """

    def __init__(
        self, context: Any, endpoint: str, worker: messages.WorkerId, epoch: int, secret: str | None
    ) -> None:
        self.endpoint = endpoint
        self._context = context
        self._worker, self._epoch, self._secret = worker, epoch, secret
        self._control: DealerSocket | None = None
        self._data: DealerSocket | None = None
        self._data_endpoint = ""
        self._seq = 0
        self._heard = time.monotonic()
        self._lease_s = 0.0
        self._silent = True
        self._complained = False
        self.last_sid = 0
        self.open_requests = 0
        self.outbox = Outbox(lambda: self._lose("does not take what it is sent"))

    def open(
        self,
        on_request: Callable[[GatewaySession, messages.GatewayData], None],
        on_silence: Callable[[GatewaySession, str], None],
    ) -> None:
        self._on_request, self._on_silence = on_request, on_silence
        self._control = DealerSocket(
            self._context,
            self.endpoint,
            messages.identity(self._worker, self._epoch),
            self._control_in,
            secret=self._secret,
        )

    def close(self) -> None:
        for link in (self._control, self._data):
            if link is not None:
                link.close()

    def next_seq(self) -> int:
        self._seq += 1
        return self._seq

    def send_heartbeat(self, heartbeat: messages.Heartbeat) -> None:
        """Sends a heartbeat; one that the link does not take is lost, the next one is a full
        snapshot again.
        """
        if self._control is not None:
            self._control.send(messages.encode(heartbeat))
        if (
            self._lease_s == 0.0
            and not self._complained
            and time.monotonic() - self._heard > UNHEARD_S
        ):
            self._complained = True
            log.warning(
                "gateway does not answer: is it up, is this its control endpoint, is "
                "the link's secret the same?",
                extra={"gateway": self.endpoint},
            )
        if not self._silent and self._lease_s and time.monotonic() - self._heard > self._lease_s:
            self._lose(f"silent for {self._lease_s:g} s")

    def _lose(self, reason: str) -> None:
        self._silent = True
        self.outbox.give_up(f"The worker lost its gateway ({reason}).")
        self._on_silence(self, reason)

    def _control_in(self, data: bytes) -> None:
        try:
            message = messages.decode_gateway_control(data)
        except messages.DecodeError:
            log.warning("undecodable message dropped", extra={"gateway": self.endpoint})
            return
        self._heard = time.monotonic()
        self._silent = False
        if isinstance(message, messages.Welcome):
            self._welcomed(message)
        elif isinstance(message, messages.Farewell):
            self._lose("ended")

    def _welcomed(self, welcome: messages.Welcome) -> None:
        """The gateway knows us: connect the data socket where it says, and show ourselves there.

        It greets whom it did not know, so what we have of it is of an earlier life, its own or
        ours: nobody waits for it.
        """
        if self.open_requests:
            self._lose("it greeted us anew")
            self._silent = False
        self._lease_s = welcome.lease_s
        endpoint = _reachable(welcome.data_endpoint, self.endpoint)
        if endpoint != self._data_endpoint:
            if self._data is not None:
                self._data.close()
            self._data_endpoint = endpoint
            routing_id = messages.identity(self._worker, self._epoch)
            self._data = DealerSocket(
                self._context, endpoint, routing_id, self._data_in, secret=self._secret
            )
            self.outbox.connect(self._data.send)
        assert self._data is not None
        self._data.send(messages.encode(messages.Attach(self._worker, self._epoch)))

    def _data_in(self, data: bytes) -> None:
        try:
            message = messages.decode_gateway_data(data)
        except messages.DecodeError:
            log.warning("undecodable request dropped", extra={"gateway": self.endpoint})
            return
        if isinstance(message, messages.Generate):
            self.last_sid = message.sid
        self._on_request(self, message)


def _reachable(data: str, control: str) -> str:
    """The data endpoint as this host reaches it: a gateway bound to every address (0.0.0.0, [::])
    is where its control endpoint was found.
    """
    host, _, port = data.removeprefix("tcp://").rpartition(":")
    return (
        f"{control.rpartition(':')[0]}:{port}" if host in ("0.0.0.0", "[::]", "::", "*") else data
    )
