"""Two ends of a channel over two connections that fail."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from shared.link import messages
from shared.link.link_end import PING_S, SUSPECT_S, LinkEnd
from shared.link.sockets import SendResult
from shared.link.stream_window import SLOWEST_BYTES_PER_S


class Line:
    """One connection, both ways. `up` and `down` say what each way does with a packet."""

    def __init__(self) -> None:
        self.queue: dict[str, list[bytes]] = {"up": [], "down": []}
        self.does: dict[str, str] = {"up": "carry", "down": "carry"}
        self.bytes_per_s: float | None = None
        self.may_pass = 0.0

    def passing(self, way: str) -> list[bytes]:
        """What arrives now; the rest waits."""
        queue, passing = self.queue[way], list[bytes]()
        while queue and (self.bytes_per_s is None or len(queue[0]) <= self.may_pass):
            passing.append(queue.pop(0))
            self.may_pass -= len(passing[-1])
        return passing

    def sender(self, way: str) -> Callable[[bytes], SendResult]:
        def send(data: bytes) -> SendResult:
            if self.does[way] == "gone":
                return SendResult.GONE
            if self.does[way] != "lose":
                self.queue[way].append(data)
            return SendResult.OK

        return send


class Pair:
    """A gateway's end and a worker's end, joined by two lines. The test turns their clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self.lines = {"data": Line(), "control": Line()}
        self.got: dict[str, list[bytes]] = {"up": [], "down": []}
        self.gateway = self._end("down", "up")
        self.worker = self._end("up", "down")

    def _end(self, out: str, into: str) -> LinkEnd:
        data, control = (self.lines[name].sender(out) for name in ("data", "control"))
        return LinkEnd(7, data, control, self.got[into].append, self.now)

    def run(self, seconds: float = 0.0) -> None:
        """Lets packets arrive, and the gateway ping and judge as its ticks do."""
        until = self.now + seconds
        while True:
            self.arrive()
            if self.now >= until:
                return
            self.now += PING_S
            for line in self.lines.values():
                line.may_pass += PING_S * (line.bytes_per_s or 0.0)
            self.worker.coming_bytes = self.gateway.path.ahead_bytes  # as Alive says
            self.gateway.judge(self.now)
            if self.worker.path.heard:
                self.worker.judge(self.now)
            self.gateway.ping(self.now)

    def arrive(self) -> None:
        for _ in range(10):
            for name, line in self.lines.items():
                for way, end in (("up", self.gateway), ("down", self.worker)):
                    if line.does[way] == "stall":
                        continue
                    for data in line.passing(way):
                        packet = end.arrive(data, self.now, by_data=name == "data")
                        if end is self.worker and getattr(packet, "ping", 0):
                            end.ping(self.now)


@pytest.fixture
def pair() -> Pair:
    return Pair()


def test_what_is_lost_is_there_within_two_pings_though_nothing_is_sent_after_it(pair: Pair) -> None:
    pair.lines["data"].does["up"] = "lose"
    assert pair.worker.send(b"last")
    pair.lines["data"].does["up"] = "carry"
    pair.run(2 * PING_S)
    assert pair.got["up"] == [b"last"] and pair.worker.channel.settled


@pytest.mark.parametrize("ways", [("up",), ("down",), ("up", "down")])
def test_a_data_connection_that_stalls_is_known_within_a_second_and_the_control_connection_carries(
    pair: Pair, ways: tuple[str, ...]
) -> None:
    pair.run(1.0)
    for way in ways:
        pair.lines["data"].does[way] = "stall"
    pair.worker.send(b"token")
    pair.gateway.offer(b"request")
    pair.run(1.0)
    assert not pair.gateway.carries and not pair.worker.carries
    assert (pair.got["up"], pair.got["down"]) == ([b"token"], [b"request"])
    for way in ways:
        pair.lines["data"].does[way] = "carry"
    pair.worker.send(b"more")
    pair.run(1.0)
    assert pair.gateway.carries and pair.worker.carries
    assert (pair.got["up"], pair.got["down"]) == ([b"token", b"more"], [b"request"])


def test_a_large_body_on_a_slow_connection_is_waited_for_and_sent_once(pair: Pair) -> None:
    pair.run(1.0)
    pair.lines["data"].bytes_per_s = 1.5 * SLOWEST_BYTES_PER_S
    body = bytes(3 * SLOWEST_BYTES_PER_S)
    pair.gateway.offer(body)
    for _ in range(20):
        pair.run(PING_S)
        assert pair.gateway.carries and pair.worker.carries
    assert pair.got["down"] == [body] and pair.gateway.channel.resent == 0
    pair.lines["data"].does["down"] = "stall"
    pair.run(1.0)
    assert not pair.gateway.carries and not pair.worker.carries


def test_a_connection_that_stalls_within_a_large_body_is_known_when_that_should_have_arrived(
    pair: Pair,
) -> None:
    pair.run(1.0)
    pair.lines["data"].does["down"] = "stall"
    body = bytes(3 * SLOWEST_BYTES_PER_S)
    pair.gateway.offer(body)
    pair.run(2.0)
    assert pair.gateway.carries and not pair.got["down"]
    for _ in range(10):
        pair.gateway.offer(body)  # what comes later gives no more time
        pair.run(PING_S)
    assert not pair.gateway.carries and pair.got["down"]


def test_what_no_connection_takes_is_refused_and_not_sent_later(pair: Pair) -> None:
    for line in pair.lines.values():
        line.does["down"] = "gone"
    assert pair.gateway.offer(b"request") is SendResult.GONE
    for line in pair.lines.values():
        line.does["down"] = "carry"
    assert pair.gateway.offer(b"next") is SendResult.OK
    pair.run(1.0)
    assert pair.got["down"] == [b"next"]


def test_after_doubt_only_an_echo_says_that_the_data_connection_carries(pair: Pair) -> None:
    pair.run(1.0)
    pair.gateway.doubt()
    pair.gateway.judge(pair.now)
    assert not pair.gateway.carries
    pair.run(2 * PING_S)
    assert pair.gateway.carries


def test_packets_of_another_channel_are_no_sign_of_life(pair: Pair) -> None:
    other = LinkEnd(8, pair.gateway._send_data, pair.gateway._send_control, print, 0.0)
    other.offer(b"x")
    other.ping(0.0)
    pair.arrive()
    assert not pair.got["down"] and not pair.worker.heard and pair.worker.path.heard == 0


def test_a_packet_that_does_not_decode_raises_and_changes_nothing(pair: Pair) -> None:
    with pytest.raises(messages.DecodeError):
        pair.worker.arrive(b"\x93junk", 0.0)
    assert pair.worker.channel.delivered == 0 and SUSPECT_S > PING_S
