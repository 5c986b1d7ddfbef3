"""Shell. One worker's conversation with one gateway process: the control and data sockets, the
gateway's lease, and the worker's end of the channel between them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from shared.link import messages
from shared.link.link_end import PING_S, LinkEnd
from shared.link.sockets import DealerSocket, SendResult

log = logging.getLogger("loraplex.session")

UNHEARD_S = 10.0
"""After so long without a first answer, one warning is logged, and a new connection is tried."""
REOPEN_S = 1.5
"""A connection that has carried nothing for this long is opened anew. A router or firewall on the
way may have forgotten it and may drop its packets silently. If the next one carries nothing either,
it is given twice the time, up to UNHEARD_S: it may be busy with a large body on a slow network.
"""
ROOM_BYTES = 4 << 20
"""What may be on its way to the gateway before a large answer goes on."""
UNHEARD_HEARTBEATS = 3
"""A gateway that has had none of so many heartbeats is sent them by a new connection."""
LATE_S = 3 * PING_S
"""If the timer's turn comes this late, this process stood still. The silence is then not the
gateway's.
"""


class Outbox:
    """Collects the frames of one turn of the event loop and sends them as one message of one
    channel.

    `send` takes a message and keeps it until the gateway has received it. It returns False if it
    cannot take more. Then `overflow` is called, and the channel is over.
    """

    __slots__ = (
        "_closed",
        "_done",
        "_found",
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
        self._found: list[messages.FoundAnswer] = []
        self._scheduled = self._closed = False

    def frame(self, sid: messages.StreamId, flags: int, data: bytes, tokens: bytes = b"") -> None:
        """Adds bytes of an answer. `tokens` are the tokens they were rendered from (see
        shared/link/token_ids.py).
        """
        self._frames.append((sid, flags, data, tokens))
        if not self._scheduled:
            self._schedule()

    def done(self, done: messages.Done) -> None:
        """Adds the end of a request or command that succeeded."""
        self._done.append(done)
        self._schedule()

    def refuse(self, refused: messages.Refused) -> None:
        """Adds the end of a request or command that failed."""
        self._refused.append(refused)
        self._schedule()

    def found(self, found: messages.FoundAnswer) -> None:
        """Adds whether an answer is kept here."""
        self._found.append(found)
        self._schedule()

    def send(self, message: messages.StoredCopy | messages.KnownDeaths) -> None:
        """Sends it before what is added from now on."""
        self.flush()
        if not self._closed and not self._send(messages.encode(message)):
            self._overflow()

    def flush(self) -> None:
        """Sends what has been collected, now."""
        self._scheduled = False
        if not (self._frames or self._done or self._refused or self._found):
            return
        step = messages.Step(self._frames, self._done, self._refused, self._found)
        self._frames, self._done, self._refused, self._found = [], [], [], []
        if not self._closed and not self._send(messages.encode(step)):
            self._overflow()

    def close(self) -> None:
        """From now on frames are dropped: streams of a closed channel may still yield some."""
        self._closed = True

    def _schedule(self) -> None:
        # Not sent at once, so that all streams that moved in this engine step share one message.
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self.flush)


def _nowhere(_: bytes) -> bool:
    """The `send` of an outbox before the first channel. It drops everything."""
    return True


class GatewaySession:
    """One worker's session with the gateway process at `endpoint`. It opens the control socket. The
    gateway's welcome names the data socket and the channel, which are opened then. It reconnects by
    itself.

    `epoch` numbers this life of the worker as this gateway knows it. It starts as the worker's
    random epoch and grows by one whenever the channel has to be given up. Each channel has an
    `outbox` of its own, so late frames of an old channel are dropped.
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
        self._heard_seq = 0  # the last heartbeat that the gateway has had, as it says
        self._heard = self._control_heard = self._ticked = time.monotonic()
        self._control_opened = self._data_opened = self._heard
        self._timer: asyncio.TimerHandle | None = None
        self._settled = asyncio.Event()
        self._has_room = asyncio.Event()
        self._lease_s = 0.0
        self._reopen_s = UNHEARD_S  # of control; a gateway that never answered may not be up yet
        self._data_reopens = self._control_reopens = 0  # since it last carried something
        self._silent = True
        self._complained = False
        self.heartbeat_at = self._heard
        """When the loop has sent its last heartbeat. A thread reads it: see loop_watch.py."""
        self.last_sid = 0
        self.open_requests = 0
        self.outbox = Outbox(_nowhere, self._overflow)

    @property
    def silent(self) -> bool:
        """Its gateway has not been heard for the length of its lease, or never."""
        return self._silent

    def open(
        self,
        on_request: Callable[[GatewaySession, messages.GatewayData], None],
        on_silence: Callable[[GatewaySession, str], None],
    ) -> None:
        """Connects. `on_request` gets each message of the data channel. `on_silence` is called with
        a reason when the gateway is lost.
        """
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

    def next_seq(self) -> int:
        """The number of the next heartbeat."""
        self._seq += 1
        return self._seq

    def send_heartbeat(self, heartbeat: messages.Heartbeat) -> None:
        """Sends a heartbeat, and looks whether the gateway's lease has run out. A heartbeat that
        the link does not take is lost; the next one is a full snapshot again.
        """
        self.heartbeat_at = time.monotonic()
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

    async def room(self) -> None:
        """Waits until the gateway has received nearly all that it was sent. Large answers of many
        requests would otherwise fill the window together, which ends the channel.
        """
        self.outbox.flush()
        await asyncio.sleep(0)
        while not self._silent and self._end and self._end.channel.window_bytes > ROOM_BYTES:
            self._has_room.clear()
            await self._has_room.wait()

    async def last_word(self, reason: str) -> None:
        """Tells the gateway, after all frames, that this life of the worker is over. Waits until
        the gateway has received it. Without a channel it returns at once.
        """
        self.outbox.flush()
        if self._end is None or self._silent:
            return
        self._settled.clear()
        self._end.send(messages.encode(messages.Stopped(self._worker, self.epoch, reason)))
        await self._settled.wait()

    def _lose(self, reason: str) -> None:
        self._silent = True
        self._has_room.set()
        self._on_silence(self, reason)

    def _overflow(self) -> None:
        """The gateway does not take what it is sent, so frames are missing from now on. The channel
        must not go on. The worker begins a new life, and the gateway gives up the old one.
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
        self._heard = time.monotonic()
        self._silent = False
        if isinstance(message, messages.Alive):
            if self._end is not None:
                self._end.coming_bytes = message.coming_bytes
            # it has had nothing since; a gateway of before this field says 0
            if message.seq and message.seq == self._heard_seq:
                return
            self._heard_seq = message.seq
        self._control_heard, self._control_reopens = self._heard, 0
        if isinstance(message, messages.Welcome):
            self._welcomed(message)
        elif isinstance(message, messages.Farewell):
            self._lose("ended")

    def _welcomed(self, welcome: messages.Welcome) -> None:
        """The gateway accepts this worker. If it names a new channel, it knows nothing of our open
        requests: they belong to an earlier life of the gateway or of this worker. They are given
        up.
        """
        if self._end is not None and welcome.channel == self._end.channel.id:
            self._end.channel.resend()  # the gateway has not received our Attach yet
            if self._end.channel.owes:
                self._end.flush()
            return
        if self.open_requests:
            self._lose("it greeted us anew")
            self._silent = False
        self._lease_s = welcome.lease_s
        self._reopen_s = max(REOPEN_S, UNHEARD_HEARTBEATS * welcome.heartbeat_s)
        self._data_endpoint = _reachable(welcome.data_endpoint, self.endpoint)
        self._open_data()
        self.outbox.close()
        self._has_room.set()
        self._end = LinkEnd(
            welcome.channel, self._send_data, self._send_control, self._deliver, time.monotonic()
        )
        self.outbox = Outbox(self._end.send, self._overflow)
        self.last_sid = 0
        self._end.send(messages.encode(messages.Attach(self._worker, self.epoch)))

    # ---- data ------------------------------------------------------------------------------------

    def _open_data(self) -> None:
        if self._data is not None:
            self._data.close(0)  # nothing is lost: the window still holds what this socket holds
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
        if type(packet) is messages.ChannelStatus and packet.ping:
            end.ping(now)
        if end.channel.settled:
            self._settled.set()
        if end.channel.window_bytes <= ROOM_BYTES:
            self._has_room.set()

    def _deliver(self, body: memoryview) -> None:
        """Hands over one message that the channel has delivered in order."""
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
        """Judges whether the data connection carries. Opens dead connections again."""
        now = time.monotonic()
        self._timer = asyncio.get_running_loop().call_later(PING_S, self._tick)
        stood_still = now - self._ticked > LATE_S
        self._ticked = now
        if stood_still:
            self._control_heard = now
            return
        silent_s = now - max(self._control_heard, self._control_opened)
        if silent_s > _patience_s(self._reopen_s, self._control_reopens):
            self._control_reopens += 1
            self._open_control()
        end = self._end
        if end is None:
            return
        had_time = now - self._data_opened > _patience_s(REOPEN_S, self._data_reopens)
        # a gateway that has said farewell is not missed
        if (end.path.heard or had_time) and end.judge(now) and not self._silent:
            message = "carries again" if end.carries else "does not carry"
            log.warning("data connection %s", message, extra={"gateway": self.endpoint})
        if end.carries:
            self._data_reopens = 0
        elif had_time:
            self._data_reopens += 1
            self._open_data()


def _patience_s(seconds: float, reopened: int) -> float:
    """How long a connection may carry nothing that was opened so often without success."""
    return max(seconds, min(seconds * 2.0 ** min(reopened, 16), UNHEARD_S))


def _reachable(data: str, control: str) -> str:
    """The data endpoint as this host reaches it. A gateway that is bound to every address (0.0.0.0,
    [::]) is reached at the host of its control endpoint.
    """
    host, _, port = data.removeprefix("tcp://").rpartition(":")
    return (
        f"{control.rpartition(':')[0]}:{port}" if host in ("0.0.0.0", "[::]", "::", "*") else data
    )
