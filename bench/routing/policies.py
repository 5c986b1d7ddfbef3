"""Pure. Policies to compare with, which production does not offer: round robin, random, least
loaded, two choices by load, and Ray Serve 2.60 as it behaves.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence, Set

from bench.routing.ray_strict import RayStrict
from gateway.fleet.fleet import Fleet, WorkerView
from gateway.routing.policy import (
    NONE_EXCLUDED,
    Blocked,
    Choice,
    ChoiceReason,
    Decision,
    Defer,
    Policy,
    RoutingRequest,
    StatelessPolicy,
    tier_of,
)
from gateway.routing.registry import POLICIES
from gateway.routing.residency_p2c import two_choices
from shared.link.messages import WorkerId


class Blind(StatelessPolicy):
    """A policy that looks at loads at most: `pick` gets the workers with room."""

    def __init__(
        self, name: str, pick: Callable[[Sequence[WorkerView], random.Random], WorkerView]
    ) -> None:
        self.name = name
        self._pick = pick

    def choose(
        self,
        request: RoutingRequest,
        fleet: Fleet,
        now: float,
        rng: random.Random,
        excluded: Set[WorkerId] = NONE_EXCLUDED,
    ) -> Decision:
        able = [w for w in fleet.routable(request.base) if w.accepts(excluded)]
        if not able:
            return Defer(Blocked.ROOM)
        worker = self._pick(able, rng)
        return Choice(
            worker,
            ChoiceReason.BASE if request.adapter is None else ChoiceReason.BLIND,
            tier_of(worker, request.adapter),
        )


class RoundRobin(StatelessPolicy):
    """One after another, those without room left out."""

    name = "round-robin"

    def __init__(self) -> None:
        self._cursors: dict[str, int] = {}

    def choose(
        self,
        request: RoutingRequest,
        fleet: Fleet,
        now: float,
        rng: random.Random,
        excluded: Set[WorkerId] = NONE_EXCLUDED,
    ) -> Decision:
        workers = fleet.routable(request.base)
        cursor = self._cursors.get(request.base, -1)
        for step in range(1, len(workers) + 1):
            worker = workers[(cursor + step) % len(workers)]
            if worker.accepts(excluded):
                self._cursors[request.base] = (cursor + step) % len(workers)
                return Choice(
                    worker,
                    ChoiceReason.BASE if request.adapter is None else ChoiceReason.BLIND,
                    tier_of(worker, request.adapter),
                )
        return Defer(Blocked.ROOM)


COMPARED: dict[str, Callable[[], Policy]] = {
    "round-robin": RoundRobin,
    "random": lambda: Blind("random", lambda able, rng: rng.choice(able)),
    "least-loaded": lambda: Blind(
        "least-loaded", lambda able, rng: min(able, key=lambda w: (w.load, rng.random()))
    ),
    "p2c": lambda: Blind("p2c", two_choices),
    "ray-strict": RayStrict,
    **POLICIES,
}
"""Every policy that the simulator knows, those of production included."""
