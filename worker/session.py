"""Shell. One worker's conversation with one gateway process: control and data sockets, the
gateway's lease, and the worker's end of the channel between them.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from typing import Any

from shared.link import messages
from shared.link.endpoint import PING_S, LinkEnd
from shared.link.sockets import DealerSocket, SendResult

log = logging.getLogger("loraplex.session")

UNHEARD_S = 10.0  # a gateway that has not answered by then is worth a line in the log
REOPEN_S = 1.5
"""A connection that has carried nothing for so long is opened anew: whatever is between may have
forgotten it, and drop its packets without a word.
"""
LATE_S = 3 * PING_S
"""A turn of the timer that comes so late says that this process stood still, not the gateway."""


class Outbox:
    """Frames of one turn of the event loop, sent as one message of one channel.

    `send` takes a message, and keeps it until the gateway has it. It returns False where it cannot:
    then `overflow` is told, and the channel is over.
    """

    __slots__ = (
        "_closed",
        "_done",
        "_frames",
        "_loop",
        "_overflow",
        "_refused",
        "_scheduled",
        "_send",
    )

    def __init__(self, send: Callable[[bytes], bool], overflow: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._send = send
        self._overflow = overflow
        self._frames: list[messages.Frame] = []
        self._done: list[messages.Done] = []
        self._refused: list[messages.Refused] = []
        self._scheduled = self._closed = False

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
        if not (self._frames or self._done or self._refused):
            return
        step = messages.Step(self._frames, self._done, self._refused)
        self._frames, self._done, self._refused = [], [], []
        if not self._closed and not self._send(messages.encode(step)):
            self._overflow()

    def close(self) -> None:
        """What its streams still yield goes nowhere."""
        self._closed = True

    def _schedule(self) -> None:
        # Not at once: every stream that the engine moved in this step gets into the same message.
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self.flush)


def _nowhere(_: bytes) -> bool:
    """Before the first channel there is nothing to send."""
    return True


class GatewaySession:
    """Opens the control socket to `endpoint`; the data socket and a channel once the gateway has
    said which. Reconnects by itself.

    `epoch` is this life of the worker as this gateway knows it: the worker's random number, plus
    how often it has begun anew because its channel could not be kept. `outbox` is that of the
    channel; each new channel has a new one, so that late frames find nobody.
    """

    def __init__(
        self, context: Any, endpoint: str, worker: messages.WorkerId, epoch: int, secret: str | None
    ) -> None:
        self.endpoint = endpoint
        self.epoch = epoch
        self._context = context
        self._worker, self._secret = worker, secret
        self._control: DealerSocket | None = None
        self._data: DealerSocket | None = None
        self._data_endpoint = ""
        self._end: LinkEnd | None = None
        self._seq = 0
        self._heard = self._control_heard = self._ticked = time.monotonic()
        self._control_opened = self._data_opened = self._heard
        self._timer: asyncio.TimerHandle | None = None
        self._settled = asyncio.Event()
        self._lease_s = 0.0
        self._silent = True
        self._complained = False
        self.last_sid = 0
        self.open_requests = 0
        self.outbox = Outbox(_nowhere, self._overflow)

    def open(
        self,
        on_request: Callable[[GatewaySession, messages.GatewayData], None],
        on_silence: Callable[[GatewaySession, str], None],
    ) -> None:
        self._on_request, self._on_silence = on_request, on_silence
        self._open_control()
        self._tick()

    def close(self) -> None:
        self.outbox.close()
        if self._timer is not None:
            self._timer.cancel()
        for link in (self._control, self._data):
            if link is not None:
                link.close()

    def kept_id(self, owner: str) -> str:
        """For an answer that this life of the worker keeps."""
        return messages.kept_id(self._worker, self.epoch, owner, secrets.token_hex(12))

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

    async def last_word(self, reason: str) -> None:
        """Tells the gateway, after all frames, that this life of the worker is over. Waits until
        the gateway has received that. Without a channel there is nothing to wait for.
        """
        self.outbox.flush()
        if self._end is None or self._silent:
            return
        self._settled.clear()
        self._end.send(messages.encode(messages.Stopped(self._worker, self.epoch, reason)))
        await self._settled.wait()

    def _lose(self, reason: str) -> None:
        self._silent = True
        self._on_silence(self, reason)

    def _overflow(self) -> None:
        """The gateway does not take what it is sent. Frames are missing from now on, so the channel
        must not go on: the worker begins a new life, and the gateway gives up the one before.
        """
        self.outbox.close()
        self._end = None
        self._lose("it does not take what it is sent")
        self.epoch += 1
        if self._data is not None:
            self._data.close(0)
            self._data = None
        self._open_control()

    # ---- control ---------------------------------------------------------------------------------

    def _open_control(self) -> None:
        if self._control is not None:
            self._control.close(0)
        self._control_opened = time.monotonic()
        self._control = self._connected(self.endpoint, self._control_in)

    def _control_in(self, data: bytes) -> None:
        if messages.is_packet(data):
            self._packet_in(data, by_data=False)
            return
        try:
            message = messages.decode_gateway_control(data)
        except messages.DecodeError:
            log.warning("undecodable message dropped", extra={"gateway": self.endpoint})
            return
        self._heard = self._control_heard = time.monotonic()
        self._silent = False
        if isinstance(message, messages.Welcome):
            self._welcomed(message)
        elif isinstance(message, messages.Farewell):
            self._lose("ended")

    def _welcomed(self, welcome: messages.Welcome) -> None:
        """The gateway knows us. With a new channel it begins from nothing: what we have of it is of
        an earlier life, its own or ours, and nobody waits for that.
        """
        if self._end is not None and welcome.channel == self._end.channel.id:
            self._end.channel.resend()  # it has not heard that we are attached
            if self._end.channel.owes:
                self._end.flush()
            return
        if self.open_requests:
            self._lose("it greeted us anew")
            self._silent = False
        self._lease_s = welcome.lease_s
        self._data_endpoint = _reachable(welcome.data_endpoint, self.endpoint)
        self._open_data()
        self.outbox.close()
        self._end = LinkEnd(
            welcome.channel, self._send_data, self._send_control, self._deliver, time.monotonic()
        )
        self.outbox = Outbox(self._end.send, self._overflow)
        self.last_sid = 0
        self._end.send(messages.encode(messages.Attach(self._worker, self.epoch)))

    # ---- data ------------------------------------------------------------------------------------

    def _open_data(self) -> None:
        if self._data is not None:
            self._data.close(0)  # what lies in it is in the window too
        self._data_opened = time.monotonic()
        self._data = self._connected(self._data_endpoint, self._data_in)

    def _connected(self, endpoint: str, on_message: Callable[[bytes], None]) -> DealerSocket:
        routing_id = messages.identity(self._worker, self.epoch)
        return DealerSocket(self._context, endpoint, routing_id, on_message, secret=self._secret)

    def _send_data(self, data: bytes) -> SendResult:
        return self._data.send(data) if self._data is not None else SendResult.GONE

    def _send_control(self, data: bytes) -> SendResult:
        return self._control.send(data) if self._control is not None else SendResult.GONE

    def _data_in(self, data: bytes) -> None:
        self._packet_in(data, by_data=True)

    def _packet_in(self, data: bytes, *, by_data: bool) -> None:
        end = self._end
        if end is None:
            return
        now = time.monotonic()
        try:
            packet = end.arrive(data, now, by_data=by_data)
        except messages.DecodeError:
            log.warning("undecodable packet dropped", extra={"gateway": self.endpoint})
            return
        if packet.channel != end.channel.id:
            return
        self._heard = now
        self._silent = False
        if type(packet) is messages.Status and packet.ping:
            end.ping(now)
        if end.channel.settled:
            self._settled.set()

    def _deliver(self, body: bytes) -> None:
        try:
            message = messages.decode_gateway_data(body)
        except messages.DecodeError:
            log.warning("undecodable request dropped", extra={"gateway": self.endpoint})
            return
        if isinstance(message, messages.Generate):
            self.last_sid = message.sid
        self._on_request(self, message)

    # ---- what carries ----------------------------------------------------------------------------

    def _tick(self) -> None:
        now = time.monotonic()
        self._timer = asyncio.get_running_loop().call_later(PING_S, self._tick)
        stood_still = now - self._ticked > LATE_S
        self._ticked = now
        end = self._end
        if stood_still or end is None:
            return
        if end.path.heard and end.judge(now):
            said = "carries again" if end.carries else "does not carry"
            log.warning("data connection %s", said, extra={"gateway": self.endpoint})
        if not end.carries and now - self._data_opened > REOPEN_S:
            self._open_data()
        if self._lease_s and now - max(self._control_heard, self._control_opened) > REOPEN_S:
            self._open_control()


def _reachable(data: str, control: str) -> str:
    """The data endpoint as this host reaches it: a gateway bound to every address (0.0.0.0, [::])
    is where its control endpoint was found.
    """
    host, _, port = data.removeprefix("tcp://").rpartition(":")
    return (
        f"{control.rpartition(':')[0]}:{port}" if host in ("0.0.0.0", "[::]", "::", "*") else data
    )
