"""Pure. What a gateway process counts: plain numbers in two tables, cheap to add to on a request's
way, and whole tables of them can be summed.

A key is (series, label values ...). prometheus_client's own counters cost twice as much per request
(`make bench-micro`): a lock and several calls for each of the dozen numbers that one request
changes. They become Prometheus series when somebody scrapes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import msgspec

Key: TypeAlias = tuple[str, ...]
"""(series, label values ...)."""


class Distribution:
    """A histogram: how many values lie at or below each bound and above the one before; the last
    count is of those above all bounds.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class Snapshot(msgspec.Struct, frozen=True):
    """All that one process has counted: (key, value) and (key, counts, total); `gauges` are its own
    as of now.
    """

    process: str
    counters: tuple[tuple[Key, float], ...] = ()
    distributions: tuple[tuple[Key, tuple[int, ...], float], ...] = ()
    gauges: tuple[tuple[Key, float], ...] = ()


class CounterSet:
    """Counters and distributions by key. `bounds` has the bucket bounds of every series that is a
    distribution.
    """

    def __init__(self, bounds: Mapping[str, Sequence[float]]) -> None:
        self._bounds = bounds
        self.counters: dict[Key, float] = {}
        self.distributions: dict[Key, Distribution] = {}

    def count(self, key: Key, by: float = 1) -> None:
        self.counters[key] = self.counters.get(key, 0) + by

    def distribution(self, key: Key) -> Distribution:
        found = self.distributions.get(key)
        if found is None:
            found = self.distributions[key] = Distribution(self._bounds[key[0]])
        return found

    def snapshot(self, process: str, gauges: Iterable[tuple[Key, float]] = ()) -> Snapshot:
        distributions = tuple(
            (key, tuple(d.counts), d.total) for key, d in self.distributions.items()
        )
        return Snapshot(process, tuple(self.counters.items()), distributions, tuple(gauges))

    def add(self, snapshot: Snapshot) -> None:
        """Adds another process's counts, or those of an earlier life. A distribution with other
        bounds (of another version) is left out.
        """
        for key, value in snapshot.counters:
            self.count(key, value)
        for key, counts, total in snapshot.distributions:
            bounds = self._bounds.get(key[0])
            if bounds is not None and len(counts) == len(bounds) + 1:
                mine = self.distribution(key)
                mine.counts[:] = [a + b for a, b in zip(mine.counts, counts, strict=True)]
                mine.total += total


_encoder = msgspec.msgpack.Encoder()
encode = _encoder.encode
decode = msgspec.msgpack.Decoder(Snapshot).decode
DecodeError = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
