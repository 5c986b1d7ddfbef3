"""Channels over a link that loses, doubles, reorders and delays."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shared.link import messages, stream_window
from shared.link.messages import ChannelStatus, DataPacket
from shared.link.stream_window import (
    ASK_AGAIN_S,
    CONFIRM_BYTES,
    CONFIRM_EVERY,
    SLOWEST_BYTES_PER_S,
    Arrival,
    Channel,
    LinkPath,
    Packet,
)


def sent(channel: Channel, body: bytes) -> DataPacket:
    packet = channel.send(body)
    assert packet is not None
    return packet


def pair() -> tuple[Channel, Channel]:
    return Channel(7), Channel(7)


# ---- one direction -------------------------------------------------------------------------------


def test_bodies_are_delivered_in_order_and_each_once() -> None:
    a, b = pair()
    packets = [sent(a, bytes([n])) for n in range(3)]
    assert [b.receive(p, 0.0) for p in packets] == [Arrival.DELIVER] * 3
    assert [b.receive(p, 0.0) for p in packets] == [Arrival.DUPLICATE] * 3 and b.delivered == 3


def test_a_gap_is_asked_for_at_once_and_the_answer_fills_it() -> None:
    a, b = pair()
    first, second, third = (sent(a, bytes([n])) for n in range(3))
    assert b.receive(first, 0.0) is Arrival.DELIVER and b.receive(third, 0.0) is Arrival.GAP
    (ask,) = b.replies()
    assert ask == ChannelStatus(7, 0, 1, missing=True)
    a.receive_status(ask, 0.0)
    again = a.replies()
    assert [p.body for p in again if isinstance(p, DataPacket)] == [second.body, third.body]
    assert [b.receive(p, 0.0) for p in again if isinstance(p, DataPacket)] == [Arrival.DELIVER] * 2
    assert a.resent == 2


def test_a_gap_is_asked_for_once_until_the_answer_is_overdue() -> None:
    a, b = pair()
    packets = [sent(a, bytes([n])) for n in range(4)]
    assert b.receive(packets[1], 0.0) is Arrival.GAP and b.owes
    b.replies()
    assert b.receive(packets[2], 0.0) is Arrival.GAP and not b.owes
    assert b.receive(packets[3], ASK_AGAIN_S) is Arrival.GAP and b.owes


def test_large_bodies_that_were_sent_again_have_time_to_arrive_before_they_are_sent_once_more() -> (
    None
):
    a, b = pair()
    sent(a, bytes(SLOWEST_BYTES_PER_S))
    ask = ChannelStatus(7, 0, 0, missing=True)
    for now, sends in ((1.0, True), (1.2, False), (1.9, False), (2.0, True)):
        a.receive_status(ask, now)
        assert a.owes is sends
        a.replies()
    a.receive_status(b.status(), 2.1)
    a.receive_status(ChannelStatus(7, 0, 1), 2.2)
    sent(a, b"next")
    a.receive_status(ChannelStatus(7, 0, 1, missing=True), 3.0)
    assert a.owes


def test_the_last_body_is_missed_by_the_status_that_follows_it() -> None:
    a, b = pair()
    sent(a, b"lost")
    assert b.receive_status(a.status(), 0.0) is Arrival.GAP
    a.receive_status(b.replies()[0], 0.0)  # type: ignore[arg-type]
    assert b.receive(a.replies()[0], 0.0) is Arrival.DELIVER  # type: ignore[arg-type]


def test_what_is_confirmed_leaves_the_window() -> None:
    a, b = pair()
    b.receive(sent(a, b"abc"), 0.0)
    assert (a.settled, a.window_bytes) == (False, 3)
    a.receive(sent(b, b""), 0.0)  # carries the confirmation along
    assert (a.settled, a.window_bytes) == (True, 0)


def test_a_receiver_that_has_nothing_to_say_confirms_after_so_many() -> None:
    a, b = pair()
    for _ in range(CONFIRM_EVERY - 1):
        b.receive(sent(a, b"x"), 0.0)
    assert not b.owes
    b.receive(sent(a, b"x"), 0.0)
    assert b.replies() == [ChannelStatus(7, 0, CONFIRM_EVERY)] and not b.owes


def test_a_full_window_takes_no_more_and_one_large_body_fits_an_empty_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream_window, "MAX_WINDOW_BYTES", 10)
    a, b = pair()
    first = sent(a, b"x" * 11)
    assert a.send(b"y") is None and a.sent == 1
    b.receive(first, 0.0)
    a.receive_status(b.status(), 0.0)
    assert a.send(b"y") is not None


def test_what_could_not_leave_is_as_if_it_had_never_been_numbered() -> None:
    a, b = pair()
    sent(a, b"gone")
    a.take_back()
    assert a.settled and b.receive(sent(a, b"next"), 0.0) is Arrival.DELIVER


def test_packets_of_another_channel_change_nothing() -> None:
    a, b = Channel(1), Channel(2)
    assert b.receive(sent(a, b"late"), 0.0) is Arrival.STALE
    assert b.receive_status(a.status(), 0.0) is Arrival.STALE and not b.owes and b.delivered == 0


def test_a_confirmation_of_what_was_never_sent_is_not_believed() -> None:
    a, _ = pair()
    sent(a, b"x")
    a.receive_status(ChannelStatus(7, 0, 99), 0.0)
    assert a.settled and a.acknowledged == 1 and sent(a, b"y").number == 2


@pytest.mark.parametrize(
    "message",
    [
        DataPacket(1 << 32, 1 << 40, 3, b"x"),
        ChannelStatus(1, 2, 3, True, 4, 5),
        ChannelStatus(0, 0, 0),
    ],
)
def test_packets_are_told_from_the_messages_of_the_control_socket(message: Packet) -> None:
    data = messages.encode(message)
    assert messages.is_packet(data) and messages.decode_packet(data) == message
    heartbeat = messages.Heartbeat("w", 1, 1, "b", messages.WorkerState.SERVING)
    others = (
        heartbeat,
        messages.Welcome("g", "x", 1.0, 0.1),
        messages.Alive("g"),
        messages.Farewell("g"),
    )
    assert not any(messages.is_packet(messages.encode(other)) for other in others)
    assert not messages.is_packet(b"")


# ---- whether a path carries ----------------------------------------------------------------------


def test_a_path_carries_as_of_the_ping_whose_echo_came_back() -> None:
    near, far = LinkPath(0.0), LinkPath(0.0)
    far.receive_ping(near.ping(1.0), near.heard)
    near.ping(2.0)  # lost
    near.receive_ping(far.ping(1.5), far.heard)
    assert near.since == 1.0 and far.since == 0.0
    far.receive_ping(near.ping(3.0), near.heard)  # echoes the far end's ping
    assert far.since == 1.5


def test_a_path_that_carries_one_way_only_is_known_at_both_ends() -> None:
    near, far = LinkPath(0.0), LinkPath(0.0)
    for turn in range(1, 9):
        far.receive_ping(near.ping(float(turn)), near.heard)
        far.ping(float(turn))  # never arrives
    assert near.since == far.since == 0.0


# ---- both directions, two ends that die, and a network that does what it likes -------------------


class Token(msgspec.Struct, frozen=True, array_like=True):
    stream: int
    index: int
    last: bool


TOKENS = 4


class Worker:
    """Makes TOKENS numbered tokens for each request it is given."""

    def __init__(self, channel: int) -> None:
        self.channel = Channel(channel)
        self.open: dict[int, int] = {}

    def take(self, body: bytes) -> None:
        stream = msgspec.msgpack.decode(body, type=int)
        assert stream not in self.open, "asked twice for the same stream"
        self.open[stream] = 0


class Gateway:
    """What each client has seen, and how it ended."""

    def __init__(self, channel: int) -> None:
        self.channel = Channel(channel)
        self.waiting: set[int] = set()


class Links(RuleBasedStateMachine):
    """One gateway and one worker; either may restart, the gateway may drop the worker, and packets
    are lost, doubled, reordered and delayed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.ids = iter(range(1, 1 << 30))
        self.streams = iter(range(1, 1 << 30))
        channel = next(self.ids)
        self.gateway, self.worker = Gateway(channel), Worker(channel)
        self.net: dict[str, list[Packet]] = {"up": [], "down": []}
        self.seen: dict[int, list[int]] = {}
        self.ends: dict[int, list[str]] = {}

    # what the two processes do

    @rule()
    def ask(self) -> None:
        stream = next(self.streams)
        self.seen[stream], self.ends[stream] = [], []
        self.gateway.waiting.add(stream)
        packet = self.gateway.channel.send(msgspec.msgpack.encode(stream))
        assert packet is not None
        self.net["down"].append(packet)

    @precondition(lambda self: self.worker.open)
    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        """One engine step moves some streams; they share a body."""
        moved = data.draw(st.sets(st.sampled_from(sorted(self.worker.open)), min_size=1))
        tokens = []
        for stream in sorted(moved):
            index = self.worker.open[stream]
            tokens.append(Token(stream, index, index == TOKENS - 1))
            self.worker.open[stream] += 1
            if index == TOKENS - 1:
                del self.worker.open[stream]
        packet = self.worker.channel.send(msgspec.msgpack.encode(tokens))
        assert packet is not None
        self.net["up"].append(packet)

    @rule()
    def ping(self) -> None:
        self.net["down"].append(self.gateway.channel.status())

    @rule(seconds=st.sampled_from([0.01, ASK_AGAIN_S]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    # what the network does

    @precondition(lambda self: self.net["up"] or self.net["down"])
    @rule(data=st.data(), keep=st.booleans())
    def arrive(self, data: st.DataObject, keep: bool) -> None:
        """Any packet, in any order. A packet that is kept arrives again."""
        way = data.draw(st.sampled_from([way for way in ("up", "down") if self.net[way]]))
        place = data.draw(st.integers(0, len(self.net[way]) - 1))
        packet = self.net[way][place]
        if not keep:
            del self.net[way][place]
        self.deliver(way, packet)

    @precondition(lambda self: self.net["up"])
    @rule()
    def arrive_in_order(self) -> None:
        self.deliver("up", self.net["up"].pop(0))

    @rule(way=st.sampled_from(["up", "down"]))
    def reset(self, way: str) -> None:
        """The connection breaks: what was on its way is lost."""
        self.net[way].clear()

    def deliver(self, way: str, packet: Packet) -> None:
        end: Gateway | Worker = self.gateway if way == "up" else self.worker
        back = "down" if way == "up" else "up"
        if isinstance(packet, ChannelStatus):
            if end.channel.receive_status(packet, self.now) is not Arrival.STALE and way == "down":
                self.net[back].append(end.channel.status())
        elif end.channel.receive(packet, self.now) is Arrival.DELIVER:
            if isinstance(end, Worker):
                end.take(packet.body)
            else:
                self.show(packet.body)
        if end.channel.owes:
            self.net[back] += end.channel.replies()

    def show(self, body: bytes) -> None:
        for token in msgspec.msgpack.decode(body, type=list[Token]):
            if token.stream in self.gateway.waiting:
                assert token.index == len(self.seen[token.stream]), "a hole, or a token twice"
                self.seen[token.stream].append(token.index)
                if token.last:
                    self.end(token.stream, "whole")

    def end(self, stream: int, how: str) -> None:
        self.gateway.waiting.discard(stream)
        self.ends[stream].append(how)

    # what dies

    @rule()
    def the_worker_is_lost_or_restarts(self) -> None:
        """The gateway hears of a new life, or the lease has ended. The new channel takes nothing
        over.
        """
        for stream in sorted(self.gateway.waiting):
            self.end(stream, "lost")
        channel = next(self.ids)
        self.gateway, self.worker = Gateway(channel), Worker(channel)

    @rule()
    def the_gateway_restarts(self) -> None:
        """The connections of its clients end with it. The worker hears of the new channel later."""
        for stream in sorted(self.gateway.waiting):
            self.end(stream, "lost")
        self.gateway = Gateway(next(self.ids))

    @precondition(lambda self: self.gateway.channel.id != self.worker.channel.id)
    @rule()
    def the_worker_is_welcomed(self) -> None:
        self.worker = Worker(self.gateway.channel.id)

    # what must hold

    @invariant()
    def what_a_client_saw_is_a_beginning_and_ends_at_most_once(self) -> None:
        for stream, seen in self.seen.items():
            assert seen == list(range(len(seen)))
            assert len(self.ends[stream]) <= 1
            if self.ends[stream] == ["whole"]:
                assert len(seen) == TOKENS

    def teardown(self) -> None:
        """The network works again. Then every waiting stream becomes whole, and no window holds
        anything.
        """
        if self.gateway.channel.id != self.worker.channel.id:
            for stream in self.gateway.waiting:
                self.ends[stream].append("lost")
            return
        for _ in range(4 * TOKENS):
            self.now += ASK_AGAIN_S
            self.ping()
            for stream in sorted(self.worker.open):
                index = self.worker.open[stream]
                token = Token(stream, index, index == TOKENS - 1)
                self.worker.open[stream] += 1
                if token.last:
                    del self.worker.open[stream]
                packet = self.worker.channel.send(msgspec.msgpack.encode([token]))
                assert packet is not None
                self.net["up"].append(packet)
            for way in ("down", "up", "down", "up"):
                while self.net[way]:
                    self.deliver(way, self.net[way].pop(0))
        assert not self.gateway.waiting and all(len(ends) == 1 for ends in self.ends.values())
        assert self.gateway.channel.settled and self.worker.channel.settled


TestLinks = Links.TestCase
TestLinks.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_large_bodies_are_confirmed_without_waiting_for_a_ping() -> None:
    a, b = pair()
    for _ in range(2):
        b.receive(sent(a, bytes(CONFIRM_BYTES // 2 + 1)), 0.0)
    assert b.owes
    (status,) = b.replies()
    assert isinstance(status, ChannelStatus)
    a.receive_status(status, 0.0)
    assert a.window_bytes == 0
    b.receive(sent(a, b"small"), 0.0)
    assert not b.owes
