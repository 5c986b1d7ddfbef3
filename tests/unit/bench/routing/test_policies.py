"""The policies that are there to compare with."""

from __future__ import annotations

import random

import pytest

from bench.routing.policies import COMPARED, RoundRobin
from gateway.fleet.fleet import Fleet, WorkerView
from gateway.routing.policy import Choice, ChoiceReason, RoutingRequest
from gateway.routing.registry import POLICIES
from shared.adapters.identity import AdapterRef
from shared.link.messages import AdapterState, Heartbeat, Tier, WorkerState

PIRATE = AdapterRef("tiny", "pirate", "d1")
TO_COMPARE_WITH = sorted(set(COMPARED) - set(POLICIES))


def a_fleet(*workers: tuple[int, int, tuple[AdapterRef, ...]]) -> tuple[Fleet, list[WorkerView]]:
    """One worker per (capacity, load by others, adapters on its GPU)."""
    fleet = Fleet(10.0)
    for i, (capacity, running, held) in enumerate(workers):
        adapters = tuple(AdapterState(a.name, a.digest, Tier.GPU) for a in held)
        fleet.heartbeat(
            Heartbeat(
                f"w{i}",
                1,
                1,
                "tiny",
                WorkerState.SERVING,
                capacity=capacity,
                running=running,
                adapters=adapters,
            ),
            0.0,
        )
        fleet.attach(f"w{i}", 1)
    return fleet, list(fleet.routable("tiny"))


def test_every_policy_is_made_by_its_name_and_knows_it() -> None:
    assert {name: make().name for name, make in COMPARED.items()} == {n: n for n in COMPARED}


# ray-strict takes seconds to look past a busy holder
@pytest.mark.parametrize("name", sorted({*TO_COMPARE_WITH} - {"ray-strict"}))
@pytest.mark.parametrize("adapter", [None, PIRATE])
def test_no_policy_chooses_a_worker_without_room_or_one_that_is_left_out(
    name: str, adapter: AdapterRef | None
) -> None:
    fleet, _ = a_fleet((1, 1, (PIRATE,)), (3, 0, ()), (2, 1, (PIRATE,)))
    policy, rng = COMPARED[name](), random.Random(1)
    for at in range(20):
        choice = policy.choose(RoutingRequest("tiny", adapter), fleet, 10.0 * at, rng, {"w2"})
        assert isinstance(choice, Choice) and choice.worker.id == "w1"


def test_round_robin_goes_round_and_leaves_out_the_full() -> None:
    fleet, _ = a_fleet((9, 0, ()), (1, 1, ()), (9, 0, ()))
    policy, rng = RoundRobin(), random.Random(1)
    picks = [policy.choose(RoutingRequest("tiny"), fleet, 0.0, rng) for _ in range(4)]
    assert [c.worker.id for c in picks if isinstance(c, Choice)] == ["w0", "w2", "w0", "w2"]


def test_least_loaded_takes_the_least_loaded() -> None:
    fleet, _ = a_fleet((9, 3, ()), (9, 1, ()), (9, 2, (PIRATE,)))
    choice = COMPARED["least-loaded"]().choose(
        RoutingRequest("tiny", PIRATE), fleet, 0.0, random.Random(1)
    )
    assert (
        isinstance(choice, Choice)
        and choice.worker.id == "w1"
        and choice.reason is ChoiceReason.BLIND
    )
