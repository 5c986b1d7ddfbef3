"""Pure. Which adapters leave the host's disk first: GreedyDual-Size with frequency (GDSF).

An adapter is worth keeping for what it would cost to bring it back, as often as it was used, per
byte that it takes:

    priority = clock + frequency x reload cost in seconds / bytes

and whoever has the lowest priority goes first. The clock is the priority of the last one that went,
so that what was popular long ago ages: it stays where it was while the newly used are put above the
clock. (L. Cherkasova, "Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching
Policy", HP Labs HPL-98-69R1, 1998.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

MIN_COST_S = 1e-3
"""A clock may say that a small file took no time at all; nothing is free."""
MIN_BYTES = 4096
"""What the smallest adapter takes on a disk."""
SLACK = 0.01
"""When somebody must go, this share of the budget is freed beyond the need, so that not every
download has to look for victims.
"""


@dataclass(frozen=True, slots=True)
class UseFrequency:
    """How an adapter has been used: times, the seconds that it took to bring it, and its priority
    as of its last use.
    """

    uses: int = 0
    cost_s: float = 0.0
    priority: float = 0.0


@dataclass(frozen=True, slots=True)
class EvictionCandidate:
    """One adapter on disk. Who is in use is found out when its turn to go has come: a lock says so,
    not a list.
    """

    key: str
    size_bytes: int
    priority: float


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes to free: `must` for the newcomer to fit, `aim` to have some peace afterwards. Both 0 if
    it fits as it is.
    """

    must_bytes: int
    aim_bytes: int


def used(popularity: UseFrequency, size_bytes: int, clock: float) -> UseFrequency:
    """The heat after one more use."""
    uses = popularity.uses + 1
    value = uses * max(MIN_COST_S, popularity.cost_s) / max(MIN_BYTES, size_bytes)
    return UseFrequency(uses, popularity.cost_s, clock + value)


def leaving(candidates: Iterable[EvictionCandidate]) -> list[EvictionCandidate]:
    """In the order in which they should go; the larger first among equals. A priority that is no
    number counts as none.
    """
    return sorted(
        candidates,
        key=lambda c: (c.priority if math.isfinite(c.priority) else 0.0, -c.size_bytes, c.key),
    )


def room(
    used_bytes: int, incoming_bytes: int, budget_bytes: int, free_bytes: int, keep_free_bytes: int
) -> Room:
    """What must go before `incoming_bytes` may come: for the budget (0: none), and for the disk,
    where `keep_free_bytes` belong to others.
    """
    over_budget = used_bytes + incoming_bytes - budget_bytes if budget_bytes else 0
    over_disk = incoming_bytes + keep_free_bytes - free_bytes
    must = max(0, over_budget, over_disk)
    return Room(must, must + int(budget_bytes * SLACK) if must else 0)
