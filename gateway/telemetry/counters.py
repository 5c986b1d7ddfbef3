"""Pure. The counts of one gateway process, in two plain tables that can be added up.

A request changes about a dozen counts. prometheus_client's own counters take a lock and several
calls for each, which costs twice as much (`make bench-micro`). So counts become Prometheus series
only at a scrape.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import msgspec

SeriesKey: TypeAlias = tuple[str, ...]
"""(series, label values ...). The series is a key of COUNTERS or DISTRIBUTIONS in
metric_definitions.py.
"""


class Count:
    """One counter. Whoever counts often keeps it."""

    __slots__ = ("total",)

    def __init__(self) -> None:
        self.total = 0.0


class Distribution:
    """A histogram. `counts[i]` is the number of values up to `bounds[i]` and above the bound
    before. The last count is of the values above all bounds. `total` is the sum of the values.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class Exemplar(msgspec.Struct, frozen=True):
    """A traced request of one bucket of a distribution. `at` is in seconds since 1970."""

    trace_id: str
    value: float
    at: float


class Snapshot(msgspec.Struct, frozen=True):
    """All counts of one process at one moment. `counters` are (key, value). `distributions` are
    (key, counts per bucket, sum of the values). `gauges` are (key, value) of this process alone.
    `exemplars` are of buckets: (key, number of the bucket, exemplar).
    """

    process: str
    counters: tuple[tuple[SeriesKey, float], ...] = ()
    distributions: tuple[tuple[SeriesKey, tuple[int, ...], float], ...] = ()
    gauges: tuple[tuple[SeriesKey, float], ...] = ()
    exemplars: tuple[tuple[SeriesKey, int, Exemplar], ...] = ()


class CounterSet:
    """Counters and distributions by key. `bounds` maps each distribution's series to its bucket
    bounds.
    """

    def __init__(self, bounds: Mapping[str, Sequence[float]]) -> None:
        self._bounds = bounds
        self.counters: dict[SeriesKey, Count] = {}
        self.distributions: dict[SeriesKey, Distribution] = {}
        self.exemplars: dict[tuple[SeriesKey, int], Exemplar] = {}
        """The newest of each bucket, so there are never more than buckets."""

    def counter(self, key: SeriesKey) -> Count:
        """The counter with this key, made at its first use."""
        found = self.counters.get(key)
        if found is None:
            found = self.counters[key] = Count()
        return found

    def count(self, key: SeriesKey, by: float = 1) -> None:
        found = self.counters.get(key) or self.counter(key)
        found.total += by

    def distribution(self, key: SeriesKey) -> Distribution:
        """The distribution with this key, made at its first use."""
        found = self.distributions.get(key)
        if found is None:
            found = self.distributions[key] = Distribution(self._bounds[key[0]])
        return found

    def exemplify(self, key: SeriesKey, exemplar: Exemplar) -> None:
        """Notes a traced request whose value was observed in the distribution with this key."""
        self.exemplars[key, bisect_left(self._bounds[key[0]], exemplar.value)] = exemplar

    def snapshot(self, process: str, gauges: Iterable[tuple[SeriesKey, float]] = ()) -> Snapshot:
        distributions = tuple(
            (key, tuple(d.counts), d.total) for key, d in self.distributions.items()
        )
        exemplars = tuple((*of, exemplar) for of, exemplar in self.exemplars.items())
        counters = tuple((key, count.total) for key, count in self.counters.items())
        return Snapshot(process, counters, distributions, tuple(gauges), exemplars)

    def add(self, snapshot: Snapshot) -> None:
        """Adds the counts of another process, or of this one before a restart. A distribution with
        other bounds comes from another version of Loraplex and is left out.
        """
        for key, value in snapshot.counters:
            self.count(key, value)
        for key, counts, total in snapshot.distributions:
            bounds = self._bounds.get(key[0])
            if bounds is not None and len(counts) == len(bounds) + 1:
                mine = self.distribution(key)
                mine.counts[:] = [a + b for a, b in zip(mine.counts, counts, strict=True)]
                mine.total += total
        for key, bucket, exemplar in snapshot.exemplars:
            known = self.exemplars.get((key, bucket))
            if key in self.distributions and (known is None or known.at < exemplar.at):
                self.exemplars[key, bucket] = exemplar


_encoder = msgspec.msgpack.Encoder()
encode = _encoder.encode
decode = msgspec.msgpack.Decoder(Snapshot).decode
DecodeError = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
