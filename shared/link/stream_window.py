"""Pure. What makes a link unable to lose in silence: numbers, acknowledgements, a window of what
may have to be sent again, and whether a path carries anything.

One `Channel` is one end of a data link between one life of a worker and one life of a gateway. Each
direction numbers its bodies from 1. The receiver delivers them in order, each once; what comes out
of order is not kept: it asks once, and the sender sends all again from the first missing one (go
back N, as links lose seldom and then all at once). A channel whose window is full is over; a new
one, with another id, begins from nothing.
"""

from __future__ import annotations

import math
from collections import deque
from enum import Enum
from typing import TypeAlias

from shared.link.messages import Carried, Status

Packet: TypeAlias = Carried | Status

MAX_WINDOW_BYTES = 64 << 20
"""Sent and not confirmed, per channel and direction: a minute of 64 streams at 60 tokens a
second.
"""
MAX_WINDOW_MESSAGES = 20_000
CONFIRM_EVERY = 64
"""Deliveries after which the receiver confirms without waiting for the next status."""
ASK_AGAIN_S = 0.1
"""A gap that is still there is asked for again after this; a round trip should be shorter."""
MAX_PINGS = 64
"""Unanswered pings of one path that are remembered; older ones need no answer."""


class Arrival(Enum):
    """What becomes of a body that arrived."""

    __hash__ = object.__hash__

    DELIVER = "deliver"
    DUPLICATE = "duplicate"
    GAP = "gap"  # something before it is missing
    STALE = "stale"  # of another channel


class Channel:
    """`send` numbers a body; `receive` and `hear` take what arrived; whenever `owes` is true,
    `replies` gives the packets to send now.
    """

    __slots__ = (
        "_asked_at",
        "_asks",
        "_confirmed",
        "_resends",
        "_unconfirmed",
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
        self.sent = self.acknowledged = 0  # numbers given out, and confirmed by the other end
        self.delivered = 0  # the other end's highest number that was delivered
        self.window_bytes = 0
        self.owes = False
        self.resent = 0  # bodies that were sent again, since the channel began
        self._unconfirmed: deque[bytes] = deque()
        self._confirmed = 0  # the highest `delivered` that the other end was told
        self._asks = self._resends = False
        self._asked_at = -math.inf

    @property
    def settled(self) -> bool:
        """The other end has confirmed all that was sent."""
        return not self._unconfirmed

    def send(self, body: bytes) -> Carried | None:
        """Takes a body into the window and returns its packet; None if the window is full."""
        window = self._unconfirmed
        if window and (
            self.window_bytes + len(body) > MAX_WINDOW_BYTES or len(window) >= MAX_WINDOW_MESSAGES
        ):
            return None
        window.append(body)
        self.window_bytes += len(body)
        self.sent += 1
        self._confirmed = self.delivered
        return Carried(self.id, self.sent, self.delivered, body)

    def take_back(self) -> None:
        """The packet that `send` gave last did not leave: as if it had never been numbered."""
        self.window_bytes -= len(self._unconfirmed.pop())
        self.sent -= 1

    def receive(self, packet: Carried, now: float) -> Arrival:
        """Only what is to be delivered moves the channel on."""
        if packet.channel != self.id:
            return Arrival.STALE
        if packet.acked > self.acknowledged:
            self._acknowledge(packet.acked)
        if packet.number == self.delivered + 1:
            self.delivered += 1
            if self.delivered - self._confirmed >= CONFIRM_EVERY:
                self.owes = True
            return Arrival.DELIVER
        if packet.number <= self.delivered:
            return Arrival.DUPLICATE
        self._ask(now)
        return Arrival.GAP

    def hear(self, status: Status, now: float) -> Arrival:
        """GAP if the other end has sent what did not arrive; STALE if it speaks of another
        channel.
        """
        if status.channel != self.id:
            return Arrival.STALE
        if status.acked > self.acknowledged:
            self._acknowledge(status.acked)
        if status.missing and self._unconfirmed:
            self._resends = self.owes = True
        if status.sent > self.delivered:
            self._ask(now)
            return Arrival.GAP
        return Arrival.DELIVER

    def resend(self) -> None:
        """All that is not confirmed goes again, because it went a way that may not carry it."""
        if self._unconfirmed:
            self._resends = self.owes = True

    def status(self, ping: int = 0, echo: int = 0) -> Status:
        self._confirmed = self.delivered
        return Status(self.id, self.sent, self.delivered, False, ping, echo)

    def replies(self) -> list[Packet]:
        """What has become due: bodies that go again, a question for missing ones, or a mere
        confirmation.
        """
        packets: list[Packet] = []
        if self._resends:
            first = self.acknowledged + 1
            packets += [
                Carried(self.id, number, self.delivered, body)
                for number, body in enumerate(self._unconfirmed, first)
            ]
            self.resent += len(packets)
        if self._asks or not packets:
            packets.append(Status(self.id, self.sent, self.delivered, self._asks))
        self._confirmed = self.delivered
        self.owes = self._asks = self._resends = False
        return packets

    def _acknowledge(self, number: int) -> None:
        """An end that confirms what was never sent is not believed."""
        window = self._unconfirmed
        for _ in range(min(number, self.sent) - self.acknowledged):
            self.window_bytes -= len(window.popleft())
            self.acknowledged += 1

    def _ask(self, now: float) -> None:
        if now - self._asked_at >= ASK_AGAIN_S:
            self._asked_at = now
            self._asks = self.owes = True


class Path:
    """Whether one connection carries, both ways: each end numbers its pings and echoes the last one
    that it heard, so an echo proves that both ways carried.

    `since` is when the newest ping left whose echo has come back.
    """

    __slots__ = ("_pings", "_sent", "heard", "since")

    def __init__(self, now: float) -> None:
        self.since = now
        self.heard = 0  # the other end's last ping
        self._sent = 0
        self._pings: deque[tuple[int, float]] = deque(maxlen=MAX_PINGS)

    def ping(self, now: float) -> int:
        """The number for the next ping."""
        self._sent += 1
        self._pings.append((self._sent, now))
        return self._sent

    def hear(self, ping: int, echo: int) -> None:
        self.heard = max(self.heard, ping)
        while self._pings and self._pings[0][0] <= echo:
            _, sent_at = self._pings.popleft()
            self.since = max(self.since, sent_at)
