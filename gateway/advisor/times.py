"""Pure. Times of many requests, counted in buckets: their mean, how much they vary, and their
distribution, which is what a 99th percentile depends on.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

Points: TypeAlias = Sequence[tuple[float, float]]
"""A distribution: (seconds, share of all). The shares sum to 1."""

SHORTEST_S, RATIO, BUCKETS = 1e-3, 1.15, 100
"""Each bucket ends 15 % above the one before; the last one ends at 17 minutes."""
EDGES_S = tuple(SHORTEST_S * RATIO**n for n in range(BUCKETS))


@dataclass(slots=True)
class Times:
    """`counts` of all buckets, the last one for what is longer still. Empty until a time is
    added.
    """

    count: int = 0
    sum_s: float = 0.0
    squares_s2: float = 0.0
    counts: list[int] = field(default_factory=list)

    def add(self, time_s: float) -> None:
        if not self.counts:
            self.counts = [0] * (BUCKETS + 1)
        self.counts[bisect_left(EDGES_S, time_s)] += 1
        self.count += 1
        self.sum_s += time_s
        self.squares_s2 += time_s * time_s

    def plus(self, other: Times) -> Times:
        if not self.counts or not other.counts:
            counts = list(self.counts or other.counts)
        else:
            counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        return Times(
            self.count + other.count,
            self.sum_s + other.sum_s,
            self.squares_s2 + other.squares_s2,
            counts,
        )

    def mean_s(self, otherwise: float = 0.0) -> float:
        return self.sum_s / self.count if self.count else otherwise

    @property
    def variation(self) -> float:
        """The squared coefficient of variation: 0 if all are alike, 1 if they are exponential."""
        if not self.count or not self.sum_s:
            return 0.0
        return max(0.0, self.squares_s2 * self.count / self.sum_s**2 - 1.0)

    def points(self, otherwise: float = 0.0) -> Points:
        """One point for each bucket in use. They are moved together so that their mean is exact."""
        if not self.count:
            return [(otherwise, 1.0)]
        middles_s = [
            EDGES_S[min(n, BUCKETS - 1)] / math.sqrt(RATIO) for n in range(len(self.counts))
        ]
        found = [(middles_s[n], count / self.count) for n, count in enumerate(self.counts) if count]
        mean_s = sum(seconds * share for seconds, share in found)
        return [(seconds * self.mean_s() / mean_s, share) for seconds, share in found]
