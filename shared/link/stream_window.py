"""Pure. What keeps the link from losing messages silently: numbers, acknowledgements, a window of
bodies that may have to be sent again, and a judgement of each connection.

One `Channel` is one end of a data link between one life of a worker and one life of a gateway. Each
direction numbers its bodies from 1. The receiver delivers them in order, each once. It does not
keep bodies that come out of order. It asks once, and the sender sends everything again from the
first missing body (go back N). That suits links, which lose seldom and then lose everything. A
channel whose window is full is over. A new channel, with another id, begins from nothing.
"""

from __future__ import annotations

import math
from collections import deque
from enum import Enum
from typing import TypeAlias

from shared.link.messages import ChannelStatus, DataPacket

Packet: TypeAlias = DataPacket | ChannelStatus

MAX_WINDOW_BYTES = 64 << 20
"""Bytes that were sent and not confirmed, per channel and direction. 64 streams at 60 tokens a
second fill it in a minute.
"""
MAX_WINDOW_MESSAGES = 20_000
CONFIRM_EVERY = 1024
"""After this many deliveries the receiver confirms without waiting for the next ping. That is often
enough for MAX_WINDOW_MESSAGES if no ping arrives, and seldom enough to cost nothing.
"""
CONFIRM_BYTES = 1 << 20
"""The same in bytes, for who waits for room to send more."""
ASK_AGAIN_S = 0.1
"""A gap that is still there after this time is asked for again. A round trip should be shorter."""
SLOWEST_BYTES_PER_S = 5 << 20
"""What is on its way may take as long as at this speed before it counts as late: a gateway whose 1
Gbit/s 25 workers share. Large bodies that are only slow would else be sent again and again, which
slows them further until none arrives.
"""
MAX_PINGS = 64
"""Unanswered pings per connection that are remembered. Older ones need no answer."""


class Arrival(Enum):
    """What becomes of a body that arrived."""

    __hash__ = object.__hash__

    DELIVER = "deliver"
    DUPLICATE = "duplicate"
    GAP = "gap"  # an earlier body is missing
    STALE = "stale"  # of another channel


class Channel:
    """One end of a channel. `send` numbers a body. `receive` and `hear` take what arrived. Whenever
    `owes` is true, `replies` returns the packets to send now.
    """

    __slots__ = (
        "_asked_at",
        "_asks",
        "_confirmed",
        "_resends",
        "_resent_until",
        "_unconfirmed",
        "_unconfirmed_bytes",
        "acknowledged",
        "delivered",
        "id",
        "owes",
        "resent",
        "sent",
        "window_bytes",
    )

    def __init__(self, channel: int) -> None:
        self.id = channel
        # highest number that was given out, and highest that the other end has confirmed
        self.sent = self.acknowledged = 0
        self.delivered = 0  # the other end's highest number that was delivered
        self.window_bytes = 0
        self.owes = False
        self.resent = 0  # bodies that were sent again
        self._unconfirmed: deque[bytes] = deque()
        self._confirmed = 0  # the highest `delivered` that the other end has been told
        self._unconfirmed_bytes = 0  # of what was delivered since then
        self._asks = self._resends = False
        self._asked_at = -math.inf
        self._resent_until = -math.inf  # what was sent again may be on its way until then

    @property
    def settled(self) -> bool:
        """Whether the other end has confirmed everything that was sent."""
        return not self._unconfirmed

    def send(self, body: bytes) -> DataPacket | None:
        """Takes a body into the window and returns its packet. None if the window is full."""
        window = self._unconfirmed
        if window and (
            self.window_bytes + len(body) > MAX_WINDOW_BYTES or len(window) >= MAX_WINDOW_MESSAGES
        ):
            return None
        window.append(body)
        self.window_bytes += len(body)
        self.sent += 1
        self._confirm()
        return DataPacket(self.id, self.sent, self.delivered, memoryview(body))

    def take_back(self) -> None:
        """Undoes the last `send`, whose packet did not leave."""
        self.window_bytes -= len(self._unconfirmed.pop())
        self.sent -= 1

    def receive(self, packet: DataPacket, now: float) -> Arrival:
        """Takes one body. Only DELIVER moves the channel on."""
        if packet.channel != self.id:
            return Arrival.STALE
        if packet.acked > self.acknowledged:
            self._acknowledge(packet.acked)
        if packet.number == self.delivered + 1:
            self.delivered += 1
            self._unconfirmed_bytes += len(packet.body)
            if (
                self.delivered - self._confirmed >= CONFIRM_EVERY
                or self._unconfirmed_bytes >= CONFIRM_BYTES
            ):
                self.owes = True
            return Arrival.DELIVER
        if packet.number <= self.delivered:
            return Arrival.DUPLICATE
        self._ask(now)
        return Arrival.GAP

    def receive_status(self, status: ChannelStatus, now: float) -> Arrival:
        """Takes a status. GAP if the other end has sent bodies that did not arrive. STALE if the
        status is of another channel.
        """
        if status.channel != self.id:
            return Arrival.STALE
        if status.acked > self.acknowledged:
            self._acknowledge(status.acked)
        if status.missing and now >= self._resent_until:
            self.resend(now)
        if status.sent > self.delivered:
            self._ask(now)
            return Arrival.GAP
        return Arrival.DELIVER

    def resend(self, now: float = -math.inf) -> None:
        """Sends every unconfirmed body again, because they went by a connection that may not carry.
        Until they have had time to arrive, the other end asks for them in vain.
        """
        if self._unconfirmed:
            self._resends = self.owes = True
            takes_s = self.window_bytes / SLOWEST_BYTES_PER_S
            if takes_s > ASK_AGAIN_S:
                self._resent_until = now + takes_s

    def status(self, ping: int = 0, echo: int = 0) -> ChannelStatus:
        self._confirm()
        return ChannelStatus(self.id, self.sent, self.delivered, False, ping, echo)

    def replies(self) -> list[Packet]:
        """The packets that are due: bodies to send again, a request for missing ones, or only a
        confirmation.
        """
        packets: list[Packet] = []
        if self._resends:
            first = self.acknowledged + 1
            packets += [
                DataPacket(self.id, number, self.delivered, memoryview(body))
                for number, body in enumerate(self._unconfirmed, first)
            ]
            self.resent += len(packets)
        if self._asks or not packets:
            packets.append(ChannelStatus(self.id, self.sent, self.delivered, self._asks))
        self._confirm()
        self.owes = self._asks = self._resends = False
        return packets

    def _confirm(self) -> None:
        """The packet that leaves now tells the other end what was delivered."""
        self._confirmed, self._unconfirmed_bytes = self.delivered, 0

    def _acknowledge(self, number: int) -> None:
        """Confirms bodies up to `number`. A confirmation of what was never sent is ignored."""
        window = self._unconfirmed
        for _ in range(min(number, self.sent) - self.acknowledged):
            self.window_bytes -= len(window.popleft())
            self.acknowledged += 1

    def _ask(self, now: float) -> None:
        if now - self._asked_at >= ASK_AGAIN_S:
            self._asked_at = now
            self._asks = self.owes = True


class LinkPath:
    """Whether one connection carries both ways. Each end numbers its pings and echoes the last ping
    that it received. So an echo proves that both ways carried.

    `since` is when the newest ping left whose echo has come back. A ping waits for the bytes that
    were sent before it.
    """

    __slots__ = ("_pings", "_sent", "heard", "since")

    def __init__(self, now: float) -> None:
        self.since = now
        self.heard = 0  # the other end's last ping
        self._sent = 0
        self._pings: deque[tuple[int, float, int]] = deque(maxlen=MAX_PINGS)

    @property
    def ahead_bytes(self) -> int:
        """What was on its way before the oldest ping that has no echo yet."""
        return self._pings[0][2] if self._pings else 0

    def ping(self, now: float, ahead_bytes: int = 0) -> int:
        """The number of the next ping."""
        self._sent += 1
        self._pings.append((self._sent, now, ahead_bytes))
        return self._sent

    def receive_ping(self, ping: int, echo: int) -> None:
        self.heard = max(self.heard, ping)
        while self._pings and self._pings[0][0] <= echo:
            _, sent_at, _ = self._pings.popleft()
            self.since = max(self.since, sent_at)
