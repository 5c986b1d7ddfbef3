"""Pure. Where adapters belong: their rendezvous order, their measured demand, and how many copies
that demand is worth.

Rendezvous hashing (Thaler and Ravishankar, "Using Name-Based Mappings to Increase Hit Rates",
1998): every gateway ranks the workers for an adapter by a hash of both. So all gateways agree
without shared state, and a worker that comes or goes moves only its own share of adapters. Bounded
load (Mirrokni, Thorup and Zadimoghaddam, "Consistent Hashing with Bounded Loads", 2017): no worker
counts as a home beyond `BOUND` times the mean load.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

from shared.adapters.identity import AdapterKey

BOUND = 1.25
"""The factor c of the bounded load, as in the paper's own deployment and in other routers."""
FLOOR = 16
"""Sequences that a worker may always have, whatever the mean. Up to 16 sequences the engine's step
grows only from 6.7 to 12.2 ms on an H200. So sixteen in one batch finish sooner than spread over
two workers that both load the adapter first.
"""
RATE_WINDOW_S = 20.0
"""Time constant of an adapter's request rate. It is long enough for a handful of requests of a
lukewarm adapter, and short enough to follow a flash crowd.
"""
MAX_RATES = 50_000
SHRINK_AFTER_S = 30.0
"""A home set loses a copy only after the demand was lower for this long; it grows at once. A load
costs a stall, a superfluous copy only an idle slot.
"""


class DemandRates:
    """Requests per second of each adapter: counters that decay with RATE_WINDOW_S."""

    def __init__(self, window_s: float = RATE_WINDOW_S, size: int = MAX_RATES) -> None:
        self._window_s, self._size = window_s, size
        # value, as of when; the longest unseen first
        self._counters: dict[AdapterKey, tuple[float, float]] = {}

    def note(self, key: AdapterKey, now: float) -> None:
        value, since = self._counters.pop(key, (0.0, now))
        self._counters[key] = (value * math.exp((since - now) / self._window_s) + 1.0, now)
        if len(self._counters) > self._size:
            del self._counters[next(iter(self._counters))]

    def per_s(self, key: AdapterKey, now: float) -> float:
        value, since = self._counters.get(key, (0.0, now))
        return value * math.exp((since - now) / self._window_s) / self._window_s

    def hottest(self, count: int, now: float) -> list[tuple[float, AdapterKey]]:
        """The `count` adapters with the highest rates, highest first."""
        window_s = self._window_s
        return heapq.nlargest(
            count,
            (
                (v * math.exp((t - now) / window_s) / window_s, key)
                for key, (v, t) in self._counters.items()
            ),
        )


@dataclass(slots=True)
class _Size:
    copies: int
    low_since: float | None = None
    low_peak: int = 1


def copies_for(demand: float, bound: float) -> int:
    """How many copies the demand is worth. `demand` is in concurrent sequences (rate x service
    time, or those in flight); `bound` is sequences per copy.
    """
    return max(1, math.ceil(demand / bound - 1e-9))


class HomeSets:
    """How many copies each adapter's demand is worth; grows at once, shrinks slowly."""

    def __init__(self) -> None:
        self._sizes: dict[AdapterKey, _Size] = {}  # of adapters with more than one

    def copies(self, key: AdapterKey, demand: float, bound: float, now: float) -> int:
        """See `copies_for`. Remembers the result."""
        need = copies_for(demand, bound)
        size = self._sizes.get(key)
        if size is None:
            if need > 1:
                self._sizes[key] = _Size(need)
            return need
        if need >= size.copies:
            size.copies, size.low_since = need, None
        elif size.low_since is None:
            size.low_since, size.low_peak = now, need
        elif now - size.low_since < SHRINK_AFTER_S:
            size.low_peak = max(size.low_peak, need)
        else:
            size.copies, size.low_since, size.low_peak = max(size.low_peak, need), now, need
            if size.copies == 1:
                del self._sizes[key]
                return 1
        return size.copies

    def of(self, key: AdapterKey) -> int:
        """The result of the last call of `copies`."""
        size = self._sizes.get(key)
        return size.copies if size else 1
