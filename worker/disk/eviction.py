"""Pure. Which adapters leave the host's disk first: GreedyDual-Size with frequency (GDSF).

The worth of an adapter is the cost of bringing it back, times how often it was used, per byte that
it takes:

    priority = clock + frequency x reload cost in seconds / bytes

The adapter with the lowest priority is removed first. The clock is the priority of the last adapter
that was removed. So what was popular long ago ages: its priority stays, while newly used adapters
get priorities above the clock. (L. Cherkasova, "Improving WWW Proxies Performance with
Greedy-Dual-Size-Frequency Caching Policy", HP Labs HPL-98-69R1, 1998.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

MIN_COST_S = 1e-3
"""The least cost of a download: a coarse clock may say that a small file took no time at all."""
MIN_BYTES = 4096
"""The least size of an adapter: one block of the file system."""
SLACK = 0.01
"""When adapters have to be removed, this share of the budget is freed beyond the need. Not every
download has to look for victims then.
"""


@dataclass(frozen=True, slots=True)
class UseFrequency:
    """How often an adapter was used, how many seconds its download took, and its priority as of its
    last use.
    """

    uses: int = 0
    cost_s: float = 0.0
    priority: float = 0.0


@dataclass(frozen=True, slots=True)
class EvictionCandidate:
    """One adapter on disk. Whether it is in use is asked only when it is about to be removed, by
    trying its lock.
    """

    key: str
    size_bytes: int
    priority: float


@dataclass(frozen=True, slots=True)
class BytesToFree:
    """`must_bytes` have to go for the new adapter to fit. `aim_bytes` is somewhat more, so that the
    next download need not look again. Both are 0 if it fits as it is.
    """

    must_bytes: int
    aim_bytes: int


def used(before: UseFrequency, size_bytes: int, clock: float) -> UseFrequency:
    """The record of an adapter after one more use."""
    uses = before.uses + 1
    value = uses * max(MIN_COST_S, before.cost_s) / max(MIN_BYTES, size_bytes)
    return UseFrequency(uses, before.cost_s, clock + value)


def leaving(candidates: Iterable[EvictionCandidate]) -> list[EvictionCandidate]:
    """The adapters in the order in which they should be removed; among equals the larger one first.
    A priority that is not finite counts as 0.
    """
    return sorted(
        candidates,
        key=lambda c: (c.priority if math.isfinite(c.priority) else 0.0, -c.size_bytes, c.key),
    )


def bytes_to_free(
    used_bytes: int, incoming_bytes: int, budget_bytes: int, free_bytes: int, keep_free_bytes: int
) -> BytesToFree:
    """What has to be removed before `incoming_bytes` may come. Two limits hold: the budget (0:
    none), and the disk, of which `keep_free_bytes` are left to other programs.
    """
    over_budget = used_bytes + incoming_bytes - budget_bytes if budget_bytes else 0
    over_disk = incoming_bytes + keep_free_bytes - free_bytes
    must = max(0, over_budget, over_disk)
    return BytesToFree(must, must + int(budget_bytes * SLACK) if must else 0)
