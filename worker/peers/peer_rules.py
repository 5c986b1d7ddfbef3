"""Pure. The rules by which workers give each other files: sizes of pieces, time limits, limits per
asker, and which peers are worth asking.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

PIECE_BYTES = 256 << 10
"""Size of one message with file data. A larger one would cost less CPU per byte, but would hold up
the event loops of both sides for longer. At this size it is 0.2 ms.
"""
PIECES_AHEAD = 4
"""Pieces of one part that are requested at once. While one is on the way the next is already asked
for, so the round trip costs no time.
"""
PIECES_IN_FLIGHT = 32
"""Pieces that one asker has requested from one peer and not received, 8 MiB. The first piece of
each part is not counted.
"""
MAX_MESSAGE_BYTES = 2 * PIECE_BYTES
HIGH_WATER_MESSAGES = 64
"""Pieces that wait in the server's socket for one asker. When it is full, the server keeps the
other pieces for a moment and then drops them.
"""
READS_AT_ONCE = 4
"""Threads of a server that read from disk."""
WANTS_PER_PEER = 256
WANTS = 2048
"""Open requests at a server, of one asker and of all. It refuses more. A request is a few hundred
bytes and holds no piece yet.
"""
HOLD_S = 1.0
"""A server that is still downloading the part holds the request for this long. Then it answers
PieceNotYet.
"""
GRACE_S = 0.25
"""A server that knows nothing of the adapter holds the request for this long. A request that makes
it download the adapter may be on the way.
"""
SILENCE_S = 3.0
"""An asker that hears nothing for this long takes the peer for dead. A healthy peer answers within
a third of it.
"""
IDLE_S = 10.0
"""A download that has got no bytes for this long is not worth waiting for. Whoever waits asks the
next peer, or the store.
"""
SLOW_GRACE_S = 3.0
MIN_BYTES_PER_S = 1 << 20
"""A part may take SLOW_GRACE_S plus its size at this rate. A slower peer is no better than a store.
"""
WAIT_S = 120.0
"""How long a whole adapter from one peer may take, if the config sets no bound on transfers."""
SUSPENDED_S = 20.0
MAX_SUSPENDED_S = 640.0
"""A peer that failed is left alone for SUSPENDED_S. The time doubles with each failure in a row, up
to this. A dead peer costs SILENCE_S each time it is tried.
"""
MOST_ASKED = 3
"""Peers that are asked for one adapter."""
MAX_STANDINGS = 256
"""Peers whose failures are remembered; the one that failed longest ago is forgotten first."""

_ENDPOINT = re.compile(r"tcp://(\[[0-9A-Fa-f:.%]{2,64}\]|[A-Za-z0-9._-]{1,253}):[0-9]{1,5}")


class PeerReputation:
    """Remembers which peers failed, and says which are worth asking. Times are seconds of one
    monotonic clock.
    """

    def __init__(self) -> None:
        # endpoint -> (failures in a row, time until which it is left alone)
        self._failures: dict[str, tuple[int, float]] = {}

    def usable(self, endpoints: Iterable[str], now: float) -> list[str]:
        """At most MOST_ASKED of the endpoints, in their order. Malformed ones and those that are
        left alone at present are skipped.
        """
        fit = [
            e
            for e in dict.fromkeys(endpoints)
            if _ENDPOINT.fullmatch(e) and self._failures.get(e, (0, now))[1] <= now
        ]
        return fit[:MOST_ASKED]

    def failed(self, endpoint: str, now: float) -> None:
        """The peer failed: it is left alone for a while, and for longer each time."""
        times = self._failures.pop(endpoint, (0, 0.0))[0] + 1
        self._failures[endpoint] = (
            times,
            now + min(MAX_SUSPENDED_S, SUSPENDED_S * 2 ** (times - 1)),
        )
        while len(self._failures) > MAX_STANDINGS:
            del self._failures[next(iter(self._failures))]

    def served(self, endpoint: str) -> None:
        """The peer gave what it was asked for: its failures are forgotten."""
        self._failures.pop(endpoint, None)


class OpenPieceRequests:
    """Counts the open requests at a server, in all and per asker."""

    def __init__(self) -> None:
        self._by_peer: dict[bytes, int] = {}
        self._all = 0

    def take(self, peer: bytes) -> bool:
        """Counts one more request of this asker. False if that would be too many."""
        open_ = self._by_peer.get(peer, 0)
        if open_ >= WANTS_PER_PEER or self._all >= WANTS:
            return False
        self._by_peer[peer] = open_ + 1
        self._all += 1
        return True

    def give(self, peer: bytes) -> None:
        """One request of this asker has been answered."""
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
    """Whether a part that has taken `took_s` for `received_bytes` is slower than MIN_BYTES_PER_S
    allows.
    """
    return took_s > SLOW_GRACE_S + received_bytes / MIN_BYTES_PER_S


def advertised(bound: str, named: str | None, outward: str) -> str:
    """The endpoint that other hosts are told of a server that is bound to `bound`.

    `named` is the operator's word: a host, or host:port where a port is mapped. Without it the
    bound address is told. If the server is bound to every address, `outward` is told in its place.
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
