"""What Ray 2.60 really does: the rows of its candidate table."""

from __future__ import annotations

import random

import pytest

from bench.routing.ray_strict import BACKOFF_S, RayStrict, backoff_s
from gateway.fleet.fleet import Fleet, WorkerView
from gateway.routing.policy import Blocked, Choice, Defer, RoutingRequest
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
    policy: RayStrict, fleet: Fleet, request: RoutingRequest, now: float = 0.0, seeds: int = 30
) -> set[str]:
    """Who can be chosen, over the chance of many seeds (of a fresh request each)."""
    found = set()
    for seed in range(seeds):
        fresh = RoutingRequest(request.base, request.adapter)
        choice = policy.choose(fresh, fleet, now, random.Random(seed))
        policy.left(fresh, now)
        found.add(choice.worker.id if isinstance(choice, Choice) else choice.blocked.value)
    return found


def test_m1_the_first_round_looks_at_holders_alone_however_loaded() -> None:
    fleet, _ = a_fleet((0, ()), (200, (PIRATE,)), (0, ()))
    assert picks(RayStrict(), fleet, RoutingRequest("tiny", PIRATE)) == {"w1"}


def test_m2_without_a_holder_those_with_the_fewest_adapters() -> None:
    fleet, _ = a_fleet((0, (HAIKU,)), (1, ()), (2, ()))
    assert picks(RayStrict(), fleet, RoutingRequest("tiny", PIRATE)) == {"w1"}


def test_m3_then_m4_an_adapter_that_fell_back_may_be_loaded_by_several_workers() -> None:
    fleet, _ = a_fleet((0, ()), (0, ()), (0, ()))
    policy, rng = RayStrict(), random.Random(1)
    loaded_by = set()
    for sid in range(12):
        request = RoutingRequest("tiny", PIRATE)
        choice = policy.choose(request, fleet, 0.0, rng)
        assert isinstance(choice, Choice)
        fleet.reserve(choice.worker, sid, PIRATE)
        policy.sent(request, choice, 0.0)
        loaded_by.add(choice.worker.id)
        fleet.release(sid)
    assert len(loaded_by) > 1  # no coalescing: W2


def test_m4_after_a_full_holder_only_those_with_the_fewest_adapters_are_tried_for_a_second() -> (
    None
):
    """W3: the third worker is idle, but holds more adapters than the full second one."""
    fleet, _ = a_fleet((9, (PIRATE, HAIKU)), (9, ()), (0, (HAIKU,)))
    policy, request, rng, now = RayStrict(9), RoutingRequest("tiny", PIRATE), random.Random(1), 0.0
    while isinstance(decision := policy.choose(request, fleet, now, rng), Defer):
        assert (
            decision.blocked is Blocked.TURN and decision.until is not None and decision.until > now
        )
        now = decision.until
    # M5, then M6: the window ends at the boundary of a round
    assert decision.worker.id == "w2" and 1.0 <= now <= 3.0


def test_m1_is_not_tried_again_when_the_holder_frees_within_the_window() -> None:
    fleet, workers = a_fleet((9, (PIRATE, HAIKU)), (9, ()))
    policy, request = RayStrict(9), RoutingRequest("tiny", PIRATE)
    assert isinstance(policy.choose(request, fleet, 0.0, random.Random(1)), Defer)
    fleet.heartbeat(
        Heartbeat(
            "w0",
            1,
            2,
            "tiny",
            WorkerState.SERVING,
            256,
            16,
            0,
            adapters=workers[0].heartbeat.adapters,
        ),
        0.1,
    )
    assert isinstance(policy.choose(request, fleet, 0.2, random.Random(1)), Defer)


def test_rounds_back_off_as_ray_does() -> None:
    assert [backoff_s(n) for n in range(1, 9)] == pytest.approx(
        [0.0, 0.025, 0.05, 0.1, 0.2, 0.4, 0.5, 0.5]
    )


def test_requests_beyond_the_routing_tasks_wait_behind_the_others_even_for_an_idle_holder() -> None:
    """W4: two replicas, four tasks."""
    fleet, _ = a_fleet((9, (PIRATE,)), (0, (HAIKU, OTHER)), capacity=9)
    fleet.heartbeat(Heartbeat("w1", 1, 2, "tiny", WorkerState.SERVING, 9, 16, 9, adapters=()), 0.0)
    policy, rng = RayStrict(9), random.Random(1)
    stuck = [RoutingRequest("tiny", PIRATE) for _ in range(4)]
    assert all(isinstance(policy.choose(request, fleet, 0.0, rng), Defer) for request in stuck)
    fleet.heartbeat(
        Heartbeat(
            "w1",
            1,
            3,
            "tiny",
            WorkerState.SERVING,
            9,
            16,
            0,
            adapters=(AdapterState("haiku", "d2", Tier.GPU),),
        ),
        0.0,
    )
    warm = RoutingRequest("tiny", HAIKU)
    assert policy.choose(warm, fleet, 0.01, rng) == Defer(Blocked.TURN, 0.01 + BACKOFF_S)
    policy.left(stuck[0], 0.02)
    assert isinstance(policy.choose(warm, fleet, 0.02, rng), Choice)


def test_a_request_that_left_keeps_no_state() -> None:
    fleet, _ = a_fleet((9, (PIRATE,)))
    policy = RayStrict(9)
    for _ in range(50):
        request = RoutingRequest("tiny", PIRATE)
        policy.choose(request, fleet, 0.0, random.Random(1))
        policy.left(request, 0.0)
    assert not policy._searches
