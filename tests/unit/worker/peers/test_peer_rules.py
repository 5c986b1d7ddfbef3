"""The rules for files between workers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.peers import peer_rules
from worker.peers.peer_rules import (
    OpenPieceRequests,
    PeerReputation,
    advertised,
    pieces_of,
    too_slow,
)

A, B, C, D = (f"tcp://10.0.0.{n}:9760" for n in range(1, 5))


@given(st.integers(0, 1 << 40), st.integers(1, 64 << 20))
def test_the_pieces_of_a_part_are_its_bytes_once_and_in_order(offset: int, size_bytes: int) -> None:
    at = offset
    for piece_at, piece_bytes in pieces_of(offset, size_bytes):
        assert piece_at == at and 0 < piece_bytes <= peer_rules.PIECE_BYTES
        at += piece_bytes
    assert at == offset + size_bytes


def test_a_message_with_a_piece_fits_the_bound_of_the_link() -> None:
    assert peer_rules.PIECE_BYTES + 1024 <= peer_rules.MAX_MESSAGE_BYTES


def test_at_most_three_peers_are_asked_in_the_order_told_and_each_once() -> None:
    assert PeerReputation().usable([B, A, B, C, D], 0.0) == [B, A, C]


@pytest.mark.parametrize(
    "endpoint",
    [
        "",
        "ipc:///tmp/x",
        "tcp://host",
        "tcp://host:",
        "tcp://a b:1",
        "tcp://:1",
        "tcp://h:1;tcp://i:2",
        "tcp://h:123456",
    ],
)
def test_an_endpoint_that_is_none_is_not_connected_to(endpoint: str) -> None:
    assert PeerReputation().usable([endpoint, A], 0.0) == [A]


@pytest.mark.parametrize("endpoint", [A, "tcp://[fd00::7]:1", "tcp://worker-0.pods.svc:9760"])
def test_addresses_of_every_kind_are_endpoints(endpoint: str) -> None:
    assert PeerReputation().usable([endpoint], 0.0) == [endpoint]


def test_a_peer_that_fails_is_left_alone_for_longer_each_time_and_not_for_ever() -> None:
    standing, now = PeerReputation(), 0.0
    for times in range(12):
        assert standing.usable([A, B], now) == [A, B]
        standing.failed(A, now)
        pause = min(peer_rules.MAX_SUSPENDED_S, peer_rules.SUSPENDED_S * 2**times)
        assert standing.usable([A, B], now + pause - 0.01) == [B]
        now += pause
    standing.served(A)
    standing.failed(A, now)
    assert standing.usable([A], now + peer_rules.SUSPENDED_S) == [A]


def test_what_is_remembered_of_peers_is_bounded() -> None:
    standing = PeerReputation()
    for number in range(3 * peer_rules.MAX_STANDINGS):
        standing.failed(f"tcp://h{number}:1", 0.0)
    assert len(standing._failures) == peer_rules.MAX_STANDINGS


def test_one_asker_cannot_take_all_places_of_a_server() -> None:
    wants = OpenPieceRequests()
    assert [wants.take(b"greedy") for _ in range(peer_rules.WANTS_PER_PEER + 2)].count(
        True
    ) == peer_rules.WANTS_PER_PEER
    assert wants.take(b"modest")
    wants.give(b"greedy")
    assert wants.take(b"greedy") and not wants.take(b"greedy")


def test_all_askers_together_are_bounded_and_places_come_back() -> None:
    wants = OpenPieceRequests()
    taken = [
        peer
        for n in range(20)
        for _ in range(peer_rules.WANTS_PER_PEER)
        if wants.take(peer := b"%d" % n)
    ]
    assert len(taken) == peer_rules.WANTS and not wants.take(b"new")
    for peer in taken:
        wants.give(peer)
    assert wants._by_peer == {} and wants.take(b"new")


def test_slow_is_what_stays_below_the_least_rate_after_a_grace() -> None:
    assert not too_slow(0, peer_rules.SLOW_GRACE_S)
    assert too_slow(8 * peer_rules.MIN_BYTES_PER_S, peer_rules.SLOW_GRACE_S + 8.1) and not too_slow(
        8 * peer_rules.MIN_BYTES_PER_S, 8.0
    )


@pytest.mark.parametrize(
    ("bound", "named", "outward", "told"),
    [
        ("tcp://0.0.0.0:4711", None, "10.1.2.3", "tcp://10.1.2.3:4711"),
        ("tcp://[::]:4711", None, "fd00::7", "tcp://[fd00::7]:4711"),
        ("tcp://192.168.0.5:4711", None, "10.1.2.3", "tcp://192.168.0.5:4711"),
        ("tcp://0.0.0.0:4711", "worker.internal", "10.1.2.3", "tcp://worker.internal:4711"),
        ("tcp://0.0.0.0:4711", "nat.example:9000", "10.1.2.3", "tcp://nat.example:9000"),
        ("tcp://0.0.0.0:4711", "fd00::7", "10.1.2.3", "tcp://[fd00::7]:4711"),
        ("tcp://0.0.0.0:4711", "[fd00::7]:9000", "10.1.2.3", "tcp://[fd00::7]:9000"),
    ],
)
def test_other_hosts_are_told_an_address_that_they_can_reach(
    bound: str, named: str | None, outward: str, told: str
) -> None:
    assert advertised(bound, named, outward) == told
    assert PeerReputation().usable([told], 0.0) == [told]
