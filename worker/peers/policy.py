"""Pure. What workers agree on when they give each other files: sizes, patience, who may ask how
much, who is worth asking.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

PIECE_BYTES = 256 << 10
"""Of one message. Larger ones cost less CPU per byte, and each holds up the event loop of both
sides for longer: 0.2 ms at this size.
"""
PIECES_AHEAD = 4
"""Pieces of one part that are asked for at once, so that the way there and back is not waited
for.
"""
PIECES_IN_FLIGHT = 32
"""Of one asker at one peer, beside the first of each part: 8 MiB."""
MAX_MESSAGE_BYTES = 2 * PIECE_BYTES
HIGH_WATER_MESSAGES = 64
"""Pieces that wait for one asker to take them; beyond it the server keeps the others for a moment,
then drops them.
"""
READS_AT_ONCE = 4
"""Of a server, from disk."""
WANTS_PER_PEER = 256
WANTS = 2048
"""Open at a server; more are turned away. A want is a few hundred bytes and has no piece yet."""
HOLD_S = 1.0
"""A server that has not got the part itself yet keeps the want so long before it says so."""
GRACE_S = 0.25
"""A server that knows nothing of the adapter keeps the want so long: its own request for it may be
on the way.
"""
SILENCE_S = 3.0
"""An asker that hears nothing for so long takes the peer for dead: three times what a healthy one
keeps it waiting.
"""
IDLE_S = 10.0
"""A download that has not moved for so long is nothing to wait for: whoever waits asks the next
peer, or the store itself.
"""
SLOW_GRACE_S = 3.0
MIN_BYTES_PER_S = 1 << 20
"""A part may take SLOW_GRACE_S plus its size at this rate: a peer that is slower than that is no
better than a store.
"""
WAIT_S = 120.0
"""A whole adapter from one peer, where the config sets no bound to transfers."""
SUSPENDED_S = 20.0
MAX_SUSPENDED_S = 640.0
"""How long a peer that failed is left alone: doubled each time, for a dead one costs SILENCE_S each
time it is tried.
"""
MOST_ASKED = 3
"""Peers for one adapter."""
MAX_STANDINGS = 256

_ENDPOINT = re.compile(r"tcp://(\[[0-9A-Fa-f:.%]{2,64}\]|[A-Za-z0-9._-]{1,253}):[0-9]{1,5}")


class Standing:
    """Which peers are worth asking. Times are seconds of one monotonic clock."""

    def __init__(self) -> None:
        # endpoint -> times in a row, left alone until
        self._failures: dict[str, tuple[int, float]] = {}

    def usable(self, endpoints: Iterable[str], now: float) -> list[str]:
        """At most MOST_ASKED of them, in their order: well formed, and not left alone at
        present.
        """
        fit = [
            e
            for e in dict.fromkeys(endpoints)
            if _ENDPOINT.fullmatch(e) and self._failures.get(e, (0, now))[1] <= now
        ]
        return fit[:MOST_ASKED]

    def failed(self, endpoint: str, now: float) -> None:
        times = self._failures.pop(endpoint, (0, 0.0))[0] + 1
        self._failures[endpoint] = (
            times,
            now + min(MAX_SUSPENDED_S, SUSPENDED_S * 2 ** (times - 1)),
        )
        while len(self._failures) > MAX_STANDINGS:
            del self._failures[next(iter(self._failures))]

    def served(self, endpoint: str) -> None:
        self._failures.pop(endpoint, None)


class OpenWants:
    """How many wants a server has open, in all and of each asker."""

    def __init__(self) -> None:
        self._by_peer: dict[bytes, int] = {}
        self._all = 0

    def take(self, peer: bytes) -> bool:
        """False: this one is too many."""
        open_ = self._by_peer.get(peer, 0)
        if open_ >= WANTS_PER_PEER or self._all >= WANTS:
            return False
        self._by_peer[peer] = open_ + 1
        self._all += 1
        return True

    def give(self, peer: bytes) -> None:
        self._all -= 1
        left = self._by_peer[peer] - 1
        if left:
            self._by_peer[peer] = left
        else:
            del self._by_peer[peer]


def pieces_of(offset: int, size_bytes: int) -> list[tuple[int, int]]:
    """(offset, size) of the pieces of these bytes, in order."""
    end = offset + size_bytes
    return [(at, min(PIECE_BYTES, end - at)) for at in range(offset, end, PIECE_BYTES)]


def too_slow(received_bytes: int, took_s: float) -> bool:
    return took_s > SLOW_GRACE_S + received_bytes / MIN_BYTES_PER_S


def advertised(bound: str, named: str | None, outward: str) -> str:
    """What other hosts are told of a server bound to `bound`: at the address that the operator
    `named` (a host, or host:port where a port is mapped), else where it is bound, else, if that is
    every address, at `outward`.
    """
    host, _, port = bound.removeprefix("tcp://").rpartition(":")
    if named:
        name, colon, mapped = named.rpartition(":")
        if colon and mapped.isdecimal() and (":" not in name or name.endswith("]")):
            return f"tcp://{name}:{mapped}"
        return f"tcp://{_bracketed(named)}:{port}"
    return f"tcp://{_bracketed(outward) if host in ('0.0.0.0', '[::]', '::', '*') else host}:{port}"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host
