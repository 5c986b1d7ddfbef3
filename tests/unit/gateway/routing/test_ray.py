"""Routing as Ray does it."""

from __future__ import annotations

import random

from gateway.fleet.fleet import Fleet, WorkerView
from gateway.routing.policy import Blocked, Choice, ChoiceReason, Defer, RoutingRequest
from gateway.routing.ray import Ray
from shared.adapters.identity import AdapterRef
from shared.link.messages import AdapterState, Heartbeat, Tier, WorkerState

PIRATE = AdapterRef("tiny", "pirate", "d1")
HAIKU = AdapterRef("tiny", "haiku", "d2")
OTHER = AdapterRef("tiny", "other", "d3")


def a_fleet(
    *workers: tuple[int, tuple[AdapterRef, ...]], capacity: int = 256
) -> tuple[Fleet, list[WorkerView]]:
    """One worker per (load by others, adapters on its GPU)."""
    fleet = Fleet(10.0)
    for i, (running, held) in enumerate(workers):
        adapters = tuple(AdapterState(a.name, a.digest, Tier.GPU) for a in held)
        fleet.heartbeat(
            Heartbeat(
                f"w{i}", 1, 1, "tiny", WorkerState.SERVING, capacity, 16, running, adapters=adapters
            ),
            0.0,
        )
        fleet.attach(f"w{i}", 1)
    return fleet, list(fleet.routable("tiny"))


def picks(
    policy: Ray, fleet: Fleet, request: RoutingRequest, now: float = 0.0, seeds: int = 30
) -> set[str]:
    """Who can be chosen, over the chance of many seeds (of a fresh request each)."""
    found = set()
    for seed in range(seeds):
        fresh = RoutingRequest(request.base, request.adapter)
        choice = policy.choose(fresh, fleet, now, random.Random(seed))
        policy.left(fresh, now)
        found.add(choice.worker.id if isinstance(choice, Choice) else choice.blocked.value)
    return found


def test_a_holder_that_is_not_overloaded_gets_the_request_however_busy_it_is() -> None:
    fleet, _ = a_fleet((0, ()), (9, (PIRATE,)), (0, ()))
    assert picks(Ray(10), fleet, RoutingRequest("tiny", PIRATE)) == {"w1"}


def test_when_all_holders_are_overloaded_a_less_busy_worker_loads_it_at_once() -> None:
    fleet, _ = a_fleet((10, (PIRATE,)), (3, (HAIKU,)), (12, (PIRATE,)))
    choice = Ray(10).choose(RoutingRequest("tiny", PIRATE), fleet, 0.0, random.Random(1))
    assert isinstance(choice, Choice) and (choice.worker.id, choice.reason) == (
        "w1",
        ChoiceReason.SPILL,
    )


def test_a_cold_adapter_goes_to_one_of_those_with_the_fewest_adapters() -> None:
    fleet, _ = a_fleet((0, (HAIKU,)), (5, ()), (6, ()))
    assert picks(Ray(), fleet, RoutingRequest("tiny", PIRATE)) == {"w1"}


def test_a_burst_for_a_cold_adapter_loads_it_once() -> None:
    fleet, _ = a_fleet(*[(0, ())] * 4)
    rng, policy = random.Random(1), Ray()
    chosen = []
    for sid in range(8):
        choice = policy.choose(RoutingRequest("tiny", PIRATE), fleet, 0.0, rng)
        assert isinstance(choice, Choice)
        fleet.reserve(choice.worker, sid, PIRATE)
        chosen.append((choice.worker.id, choice.reason))
    assert len({w for w, _ in chosen}) == 1 and [r for _, r in chosen].count(ChoiceReason.COLD) == 1


def test_a_base_request_never_looks_at_residency() -> None:
    fleet, _ = a_fleet((4, ()), (1, (PIRATE, HAIKU, OTHER)))
    assert picks(Ray(), fleet, RoutingRequest("tiny")) == {"w1"}


def test_when_every_worker_is_overloaded_the_request_waits_for_room() -> None:
    fleet, _ = a_fleet((10, (PIRATE,)), (11, ()))
    assert Ray(10).choose(RoutingRequest("tiny", PIRATE), fleet, 0.0, random.Random(1)) == Defer(
        Blocked.ROOM
    )
