"""Shell. One end of a channel, over the two connections between a gateway and a worker.

Data goes by the data connection. While that one does not carry, the same packets go by the control
connection: their numbers make it the same channel. Each path is judged by its own pings.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

from shared.link import messages
from shared.link.messages import Carried
from shared.link.sockets import SendResult
from shared.link.stream_window import Arrival, Channel, Packet, Path

Send: TypeAlias = Callable[[bytes], SendResult]

PING_S = 0.2
"""A gateway pings each worker so often on the data connection. What got lost without anything after
it is missed within this time, and what was delivered is confirmed.
"""
SUSPECT_S = 0.6
"""A path whose newest echo is of a ping older than this does not carry: two pings in a row are
overdue. With PING_S and one round trip a stalled path is known within a second.
"""


class LinkEnd:
    """`deliver` gets the bodies of the other end, in order and each once.

    `carries` is whether the data connection does, as of the last `judge`; `heard` is whether
    anything has come by either connection since the owner has reset it.
    """

    __slots__ = (
        "_deliver",
        "_send_control",
        "_send_data",
        "carries",
        "channel",
        "duplicates",
        "gaps",
        "heard",
        "path",
    )

    def __init__(
        self,
        channel: int,
        send_data: Send,
        send_control: Send,
        deliver: Callable[[bytes], None],
        now: float,
    ) -> None:
        self.channel = Channel(channel)
        self.path = Path(now)
        self.carries = True
        self.heard = False
        self.gaps = self.duplicates = 0
        self._send_data, self._send_control, self._deliver = send_data, send_control, deliver

    def send(self, body: bytes) -> bool:
        """Keeps the body until the other end has it. False: the window is full, the channel is
        over.
        """
        packet = self.channel.send(body)
        if packet is None:
            return False
        self._transmit(packet)
        return True

    def offer(self, body: bytes) -> SendResult:
        """As `send`, but what no connection takes now is not kept, and its sender is told."""
        packet = self.channel.send(body)
        if packet is None:
            return SendResult.FULL
        sent = self._transmit(packet)
        if sent is not SendResult.OK:
            self.channel.take_back()
        return sent

    def arrive(self, data: bytes, now: float, *, by_data: bool = True) -> Packet:
        """Takes one packet. Raises messages.DecodeError."""
        packet: Packet = messages.decode_packet(data)
        if type(packet) is Carried:
            arrival = self.channel.receive(packet, now)
            if arrival is Arrival.DELIVER:
                self.heard = True
                self._deliver(packet.body)
        else:
            assert type(packet) is messages.Status
            arrival = self.channel.hear(packet, now)
            if by_data and arrival is not Arrival.STALE:
                self.path.hear(packet.ping, packet.echo)
        if arrival is not Arrival.STALE:
            self.heard = True
        self.gaps += arrival is Arrival.GAP
        self.duplicates += arrival is Arrival.DUPLICATE
        if self.channel.owes:
            self.flush()
        return packet

    def flush(self) -> None:
        """Sends what is due: bodies that go again, a question, a confirmation."""
        for packet in self.channel.replies():
            self._transmit(packet)

    def ping(self, now: float) -> None:
        """On the data connection, whether it carries or not: that is what it is to show."""
        status = self.channel.status(self.path.ping(now), self.path.heard)
        self._send_data(messages.encode(status))

    def doubt(self) -> None:
        """The data connection does not carry, until an echo comes back by it."""
        self.carries, self.path.since = False, -math.inf

    def judge(self, now: float) -> bool:
        """Looks whether the data connection carries; true if that has changed. What is not
        confirmed then goes the other way, at once.
        """
        carries = now - self.path.since < SUSPECT_S
        if carries is self.carries:
            return False
        self.carries = carries
        self.channel.resend()
        if self.channel.owes:
            self.flush()
        return True

    def _transmit(self, packet: Packet) -> SendResult:
        data = messages.encode(packet)
        if self.carries and self._send_data(data) is SendResult.OK:
            return SendResult.OK
        return self._send_control(data)
