"""Pure. Simple policies to compare with: round robin, random, least loaded, two choices by residency."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence, Set

from gateway.fleet.fleet import Fleet, WorkerView
from gateway.fleet.worker_view import key_of
from gateway.routing.policy import (
    NONE_EXCLUDED,
    Blocked,
    Choice,
    ChoiceReason,
    Decision,
    Defer,
    RoutingRequest,
    StatelessPolicy,
    tier_of,
)
from shared.link.messages import WorkerId


def two_choices(candidates: Sequence[WorkerView], rng: random.Random) -> WorkerView:
    """The less loaded of two drawn at random (Mitzenmacher, "The Power of Two Choices in Randomized
    Load Balancing", 2001).
    """
    if len(candidates) == 1:
        return candidates[0]
    first, second = rng.sample(candidates, 2)
    return first if first.load <= second.load else second


class Blind(StatelessPolicy):
    """A policy that looks at loads at most: `pick` gets the workers with room."""

    def __init__(
        self, name: str, pick: Callable[[Sequence[WorkerView], random.Random], WorkerView]
    ) -> None:
        self.name = name
        self._pick = pick

    def choose(
        self,
        ask: RoutingRequest,
        fleet: Fleet,
        now: float,
        rng: random.Random,
        excluded: Set[WorkerId] = NONE_EXCLUDED,
    ) -> Decision:
        able = [w for w in fleet.routable(ask.base) if w.accepts(excluded)]
        if not able:
            return Defer(Blocked.ROOM)
        worker = self._pick(able, rng)
        return Choice(
            worker,
            ChoiceReason.BASE if ask.adapter is None else ChoiceReason.BLIND,
            tier_of(worker, ask.adapter),
        )


class RoundRobin(StatelessPolicy):
    """One after another, those without room left out."""

    name = "round-robin"

    def __init__(self) -> None:
        self._cursors: dict[str, int] = {}

    def choose(
        self,
        ask: RoutingRequest,
        fleet: Fleet,
        now: float,
        rng: random.Random,
        excluded: Set[WorkerId] = NONE_EXCLUDED,
    ) -> Decision:
        workers = fleet.routable(ask.base)
        cursor = self._cursors.get(ask.base, -1)
        for step in range(1, len(workers) + 1):
            worker = workers[(cursor + step) % len(workers)]
            if worker.accepts(excluded):
                self._cursors[ask.base] = (cursor + step) % len(workers)
                return Choice(
                    worker,
                    ChoiceReason.BASE if ask.adapter is None else ChoiceReason.BLIND,
                    tier_of(worker, ask.adapter),
                )
        return Defer(Blocked.ROOM)


class ResidencyP2C(StatelessPolicy):
    """Residency first, then load: the better of two holders with room; if all holders are full or
    there is none, the better of two others.
    """

    name = "residency-p2c"

    def choose(
        self,
        ask: RoutingRequest,
        fleet: Fleet,
        now: float,
        rng: random.Random,
        excluded: Set[WorkerId] = NONE_EXCLUDED,
    ) -> Decision:
        pool = fleet.pool(ask.base)
        if ask.adapter is not None:
            held = pool.holders.get(key_of(ask.adapter), {})
            holders = [w for w in held.values() if w.accepts(excluded)]
            if holders:
                worker = two_choices(holders, rng)
                return Choice(worker, ChoiceReason.RESIDENT, worker.tier(ask.adapter))
        able = [w for w in pool.workers if w.accepts(excluded)]
        if not able:
            return Defer(Blocked.ROOM)
        worker = two_choices(able, rng)
        if ask.adapter is None:
            return Choice(worker, ChoiceReason.BASE)
        return Choice(
            worker, ChoiceReason.SPILL if held else ChoiceReason.COLD, worker.tier(ask.adapter)
        )
