"""Pure. The simple policy: workers that hold the adapter and have room come first, then the less
loaded of two others.
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
from shared.adapters.identity import key_of
from shared.link.messages import WorkerId


def two_choices(candidates: Sequence[WorkerView], rng: random.Random) -> WorkerView:
    """The less loaded of two drawn at random (Mitzenmacher, "The Power of Two Choices in Randomized
    Load Balancing", 2001).
    """
    if len(candidates) == 1:
        return candidates[0]
    first, second = rng.sample(candidates, 2)
    return first if first.load <= second.load else second


def with_empty_slot(workers: Sequence[WorkerView]) -> Sequence[WorkerView]:
    """Those where nobody must leave for one more adapter, if there are any."""
    return [w for w in workers if w.has_empty_slot] or workers


class ResidencyP2C(StatelessPolicy):
    """Residency first, then load. It takes the less loaded of two holders with room. If all holders
    are full, or there is none, it takes the less loaded of two other workers,
    of those with an empty slot if there are any.
    """

    name = "residency-p2c"

    def choose(
        self,
        request: RoutingRequest,
        fleet: Fleet,
        now: float,
        rng: random.Random,
        excluded: Set[WorkerId] = NONE_EXCLUDED,
    ) -> Decision:
        pool = fleet.pool(request.base)
        if request.adapter is not None:
            held = pool.holders.get(key_of(request.adapter), {})
            holders = [w for w in held.values() if w.accepts(excluded)]
            if holders:
                worker = two_choices(holders, rng)
                return Choice(worker, ChoiceReason.RESIDENT, worker.tier(request.adapter))
        able = [w for w in pool.workers if w.accepts(excluded)]
        if not able:
            return Defer(Blocked.ROOM)
        if request.adapter is None:
            return Choice(two_choices(able, rng), ChoiceReason.BASE)
        worker = two_choices(with_empty_slot(able), rng)
        return Choice(
            worker, ChoiceReason.SPILL if held else ChoiceReason.COLD, worker.tier(request.adapter)
        )
