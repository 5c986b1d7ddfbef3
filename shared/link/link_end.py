"""Shell. One end of a channel. A channel uses the two connections between a gateway and a worker.

Packets go by the data connection. While that does not carry, they go by the control connection. The
packets have the same numbers there, so it stays one channel. Each connection is judged by its own
pings.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

from shared.link import messages
from shared.link.messages import DataPacket
from shared.link.sockets import SendResult
from shared.link.stream_window import (
    SLOWEST_BYTES_PER_S,
    Arrival,
    Channel,
    LinkPath,
    Packet,
)

Send: TypeAlias = Callable[[bytes], SendResult]

PING_S = 0.2
"""Time between two pings of one worker on the data connection. Within it, a lost last message is
noticed and a delivered one is confirmed.
"""
SUSPECT_S = 0.6
"""A connection carries while its newest echo belongs to a ping younger than this. Older means that
two pings in a row are overdue. With PING_S and one round trip, a stalled connection is known within
a second. Large bodies before a ping give it time.
"""


class LinkEnd:
    """One end of a channel. `deliver` gets the bodies of the other end in order, each once.

    `carries`: whether the data connection carries, as of the last `judge`. `heard`: whether
    anything has come by either connection since the owner reset it. `coming_bytes`: what the other
    end says is on its way here, before a ping of its own.
    """

    __slots__ = (
        "_deliver",
        "_late_bytes",
        "_send_control",
        "_send_data",
        "carries",
        "channel",
        "coming_bytes",
        "gaps",
        "heard",
        "path",
    )

    def __init__(
        self,
        channel: int,
        send_data: Send,
        send_control: Send,
        deliver: Callable[[memoryview], None],
        now: float,
    ) -> None:
        self.channel = Channel(channel)
        self.path = LinkPath(now)
        self.carries = True
        self.heard = False
        self.gaps = self.coming_bytes = self._late_bytes = 0
        self._send_data, self._send_control, self._deliver = send_data, send_control, deliver

    def send(self, body: bytes) -> bool:
        """Sends a body and keeps it until the other end has it. Returns False if the window is
        full: the channel is then over.
        """
        packet = self.channel.send(body)
        if packet is None:
            return False
        self._transmit(packet)
        return True

    def offer(self, body: bytes) -> SendResult:
        """Like `send`, but a body that no connection takes now is not kept. The caller learns that
        from the result.
        """
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
        if type(packet) is DataPacket:
            arrival = self.channel.receive(packet, now)
            if arrival is Arrival.DELIVER:
                self.heard = True
                self._deliver(packet.body)
        else:
            assert type(packet) is messages.ChannelStatus
            arrival = self.channel.receive_status(packet, now)
            if by_data and arrival is not Arrival.STALE:
                self.path.receive_ping(packet.ping, packet.echo)
        if arrival is not Arrival.STALE:
            self.heard = True
        self.gaps += arrival is Arrival.GAP
        if self.channel.owes:
            self.flush()
        return packet

    def flush(self) -> None:
        """Sends what is due: bodies to send again, a request for missing ones, a confirmation."""
        for packet in self.channel.replies():
            self._transmit(packet)

    def ping(self, now: float) -> None:
        """Pings the data connection, even if it does not carry. Only so can it be seen to carry
        again.
        """
        ping = self.path.ping(now, self.channel.window_bytes)
        status = self.channel.status(ping, self.path.heard)
        self._send_data(messages.encode(status))

    def doubt(self) -> None:
        """Treats the data connection as not carrying until an echo comes back by it."""
        self.carries, self.path.since = False, -math.inf

    def judge(self, now: float) -> bool:
        """Judges whether the data connection carries. Returns True if that has changed. Bodies that
        are not confirmed are then sent by the other connection at once.
        """
        age_s = now - self.path.since
        fresh = age_s < SUSPECT_S
        late_bytes = self.path.ahead_bytes + self.coming_bytes
        # what has arrived meanwhile has held up an echo that is still to come
        self._late_bytes = late_bytes if fresh else max(late_bytes, self._late_bytes)
        carries = fresh or (
            self.carries and age_s < SUSPECT_S + self._late_bytes / SLOWEST_BYTES_PER_S
        )
        if carries is self.carries:
            return False
        self.carries = carries
        self.channel.resend(now)
        if self.channel.owes:
            self.flush()
        return True

    def _transmit(self, packet: Packet) -> SendResult:
        data = messages.encode(packet)
        if self.carries and self._send_data(data) is SendResult.OK:
            return SendResult.OK
        return self._send_control(data)
