"""Pure. Ray Serve's multiplexed routing, as its documentation promises it.

The documentation says:

- (1) Is there a replica that has the adapter?
- (2) If so, choose one that has it and is not overloaded.
- (3) If all that have it are overloaded, a less busy replica loads it.
- (4) If none has it, power of two choices picks a replica, which loads it.

M1 to M5 below are rows of Ray's candidate table. docs/ROUTING.md has that table, and each deviation
of `Ray` from it. What Ray 2.60 really does is in bench/routing/ray_strict.py, to compare with.
"""

from __future__ import annotations

import random
from collections.abc import Sequence, Set

from gateway.fleet.fleet import Fleet, WorkerView
from gateway.routing.policy import (
    NONE_EXCLUDED,
    Blocked,
    Choice,
    ChoiceReason,
    Decision,
    Defer,
    RoutingRequest,
    StatelessPolicy,
)
from gateway.routing.residency_p2c import two_choices, with_empty_slot
from shared.adapters.identity import key_of
from shared.link.messages import WorkerId

LLM_MAX_ONGOING = 10**9
"""max_ongoing_requests of Ray Serve LLM: nothing is ever overloaded (W1)."""


class Ray(StatelessPolicy):
    """The decision table as documented, on reported loads and own reservations.

    Args:
        max_ongoing_requests: a worker with as many is overloaded; by default its own capacity,
            which is where its engine would queue.
    """

    name = "ray"

    def __init__(self, max_ongoing_requests: int | None = None) -> None:
        self._limit = max_ongoing_requests or LLM_MAX_ONGOING

    def choose(
        self,
        request: RoutingRequest,
        fleet: Fleet,
        now: float,
        rng: random.Random,
        excluded: Set[WorkerId] = NONE_EXCLUDED,
    ) -> Decision:
        pool = fleet.pool(request.base)
        able = [w for w in pool.workers if w.accepts(excluded) and w.load < self._limit]
        if not able:
            return Defer(Blocked.ROOM)
        if request.adapter is None:
            return Choice(two_choices(able, rng), ChoiceReason.BASE)
        holders = pool.holders.get(key_of(request.adapter), {})
        free = [w for w in holders.values() if w.accepts(excluded) and w.load < self._limit]
        if free:  # M1
            worker = two_choices(free, rng)
            return Choice(worker, ChoiceReason.RESIDENT, worker.tier(request.adapter))
        # M4, M5 where all holders are overloaded; M2 where there is none
        worker = two_choices(with_fewest_adapters(with_empty_slot(able)), rng)
        return Choice(
            worker,
            ChoiceReason.SPILL if holders else ChoiceReason.COLD,
            worker.tier(request.adapter),
        )


def with_fewest_adapters(workers: Sequence[WorkerView]) -> list[WorkerView]:
    """Filter F of Ray's table: the workers that hold the fewest adapters."""
    counts = [len(w.loaded) + len(w.coming) for w in workers]
    least = min(counts)
    return [w for w, n in zip(workers, counts, strict=True) if n == least]
