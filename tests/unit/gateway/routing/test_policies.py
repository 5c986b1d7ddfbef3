"""The simple policy that users may choose."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.fleet.fleet import Fleet, WorkerView
from gateway.routing.policy import Choice, ChoiceReason, RoutingRequest
from gateway.routing.registry import POLICIES, make_policy
from shared.adapters.identity import AdapterRef
from shared.link.messages import AdapterState, Heartbeat, Tier, WorkerState

PIRATE = AdapterRef("tiny", "pirate", "d1")
HAIKU = AdapterRef("tiny", "haiku", "d2")


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


def choose(fleet: Fleet, adapter: AdapterRef | None, rng: random.Random) -> Choice | None:
    decision = make_policy("residency-p2c").choose(RoutingRequest("tiny", adapter), fleet, 0.0, rng)
    return decision if isinstance(decision, Choice) else None


def chosen(
    fleet: Fleet, adapter: AdapterRef | None, seed: int = 0
) -> tuple[str, ChoiceReason] | None:
    choice = choose(fleet, adapter, random.Random(seed))
    return (choice.worker.id, choice.reason) if choice else None


def burst(
    fleet: Fleet, adapter: AdapterRef | None, requests: int, seed: int = 0
) -> list[tuple[str, ChoiceReason]]:
    """The choices of a burst between two heartbeats: choose and reserve, without a heartbeat."""
    rng = random.Random(seed)
    choices = []
    for sid in range(1, requests + 1):
        choice = choose(fleet, adapter, rng)
        assert choice is not None
        fleet.reserve(choice.worker, sid, adapter)
        choices.append((choice.worker.id, choice.reason))
    return choices


def test_nobody_to_choose_from_is_no_choice() -> None:
    assert chosen(Fleet(10.0), None) is None and chosen(Fleet(10.0), PIRATE) is None


def test_a_base_request_goes_to_any_worker_with_room() -> None:
    fleet, _ = a_fleet((1, 1, ()), (1, 0, ()), (1, 1, ()))
    assert {chosen(fleet, None, seed) for seed in range(20)} == {("w1", ChoiceReason.BASE)}


def test_a_holder_with_room_wins_over_an_idle_stranger() -> None:
    fleet, _ = a_fleet((4, 0, ()), (4, 3, (PIRATE,)), (4, 0, (HAIKU,)))
    assert {chosen(fleet, PIRATE, seed) for seed in range(20)} == {("w1", ChoiceReason.RESIDENT)}


def test_full_holders_spill_onto_one_that_has_room() -> None:
    fleet, _ = a_fleet((2, 2, (PIRATE,)), (2, 0, ()), (2, 2, (PIRATE,)))
    assert {chosen(fleet, PIRATE, seed) for seed in range(20)} == {("w1", ChoiceReason.SPILL)}


def test_an_adapter_that_nobody_holds_is_cold() -> None:
    fleet, _ = a_fleet((2, 0, (HAIKU,)), (2, 2, ()))
    assert chosen(fleet, PIRATE) == ("w0", ChoiceReason.COLD)


def test_an_adapter_that_is_on_its_way_counts_as_resident() -> None:
    fleet, workers = a_fleet((4, 0, ()), (4, 2, ()))
    fleet.reserve(workers[1], 1, PIRATE)
    assert {chosen(fleet, PIRATE, seed) for seed in range(20)} == {("w1", ChoiceReason.RESIDENT)}


@pytest.mark.parametrize("adapter", [None, PIRATE, HAIKU])
def test_when_all_are_full_the_request_waits(adapter: AdapterRef | None) -> None:
    fleet, _ = a_fleet((1, 1, (PIRATE,)), (0, 0, ()), (2, 5, ()))
    assert chosen(fleet, adapter) is None


def test_two_choices_take_the_less_loaded_of_two() -> None:
    fleet, _ = a_fleet((9, 5, ()), (9, 1, ()))
    assert {chosen(fleet, None, seed) for seed in range(50)} == {("w1", ChoiceReason.BASE)}


def test_the_most_loaded_of_three_is_never_chosen() -> None:
    fleet, _ = a_fleet((9, 1, ()), (9, 8, ()), (9, 2, ()))
    picks = {chosen(fleet, None, seed) for seed in range(100)}
    assert picks == {("w0", ChoiceReason.BASE), ("w2", ChoiceReason.BASE)}


def test_equal_loads_are_shared_evenly() -> None:
    fleet, _ = a_fleet(*[(9, 0, ())] * 4)
    rng = random.Random(1)
    counts: dict[str, int] = {}
    for _ in range(2000):
        choice = choose(fleet, None, rng)
        assert choice is not None
        counts[choice.worker.id] = counts.get(choice.worker.id, 0) + 1
    assert all(400 < n < 600 for n in counts.values()), counts


def test_the_same_seed_makes_the_same_choices() -> None:
    def run(seed: int) -> list[tuple[str, ChoiceReason]]:
        return burst(a_fleet(*[(8, 0, ())] * 5)[0], None, 30, seed)

    assert run(3) == run(3)
    assert any(run(3) != run(seed) for seed in range(4, 10))


@pytest.mark.parametrize("seed", range(5))
def test_a_burst_of_base_requests_between_two_heartbeats_spreads(seed: int) -> None:
    fleet, workers = a_fleet(*[(16, 0, ())] * 4)
    burst(fleet, None, 32, seed)
    assert max(w.load for w in workers) - min(w.load for w in workers) <= 4


@pytest.mark.parametrize("seed", range(5))
def test_a_burst_for_a_cold_adapter_stays_on_the_worker_that_loads_it_until_that_is_full(
    seed: int,
) -> None:
    fleet, _ = a_fleet(*[(4, 0, ())] * 3)
    choices = burst(fleet, PIRATE, 6, seed)
    first, spilled = choices[0][0], choices[4][0]
    assert choices[0][1] is ChoiceReason.COLD
    assert choices[1:4] == [(first, ChoiceReason.RESIDENT)] * 3
    assert choices[4][1] is ChoiceReason.SPILL and spilled != first
    assert choices[5] == (spilled, ChoiceReason.RESIDENT)


@pytest.mark.parametrize("seed", range(5))
def test_a_burst_spreads_over_the_holders_and_fills_no_stranger_before_they_are_full(
    seed: int,
) -> None:
    fleet, workers = a_fleet((5, 0, (PIRATE,)), (5, 0, (PIRATE,)), (5, 0, ()))
    choices = burst(fleet, PIRATE, 10, seed)
    assert [w.load for w in workers] == [5, 5, 0]
    assert {reason for _, reason in choices} == {ChoiceReason.RESIDENT}
    assert burst_next(fleet) == ("w2", ChoiceReason.SPILL)


def burst_next(fleet: Fleet) -> tuple[str, ChoiceReason] | None:
    return chosen(fleet, PIRATE)


worker_shapes = st.lists(
    st.tuples(
        st.integers(0, 4),
        st.integers(0, 6),
        st.sampled_from([(), (PIRATE,), (HAIKU,), (PIRATE, HAIKU)]),
    ),
    max_size=6,
)


@given(worker_shapes, st.sampled_from([None, PIRATE, HAIKU]), st.integers(0, 5))
def test_a_choice_has_room_and_its_reason_is_true(
    shapes: list[tuple[int, int, tuple[AdapterRef, ...]]], adapter: AdapterRef | None, seed: int
) -> None:
    fleet, workers = a_fleet(*shapes)
    choice = choose(fleet, adapter, random.Random(seed))
    open_ = [w for w in workers if w.has_room]
    if choice is None:
        assert not open_
        return
    assert choice.worker in open_
    if adapter is None:
        assert choice.reason is ChoiceReason.BASE
        return
    holders = [w for w in workers if w.holds(adapter)]
    if any(w.has_room for w in holders):
        assert choice.reason is ChoiceReason.RESIDENT and choice.worker in holders
    else:
        assert (
            choice.reason is (ChoiceReason.SPILL if holders else ChoiceReason.COLD)
            and choice.worker not in holders
        )


def test_every_policy_is_made_by_its_name_and_knows_it() -> None:
    assert {name: make_policy(name).name for name in POLICIES} == {name: name for name in POLICIES}
    assert make_policy().name == "expected-ttft"


@pytest.mark.parametrize("name", sorted(POLICIES))
@pytest.mark.parametrize("adapter", [None, PIRATE])
def test_no_policy_ever_chooses_a_worker_without_room(
    name: str, adapter: AdapterRef | None
) -> None:
    fleet, _ = a_fleet((1, 1, (PIRATE,)), (3, 0, ()), (2, 5, (PIRATE,)))
    policy, rng = make_policy(name), random.Random(1)
    for sid in range(1, 4):
        choice = policy.choose(RoutingRequest("tiny", adapter), fleet, 10.0 * sid, rng)
        assert isinstance(choice, Choice) and choice.worker.id == "w1"
        fleet.reserve(choice.worker, sid, adapter)
    assert not isinstance(policy.choose(RoutingRequest("tiny", adapter), fleet, 50.0, rng), Choice)


@pytest.mark.parametrize("name", sorted(POLICIES))
@pytest.mark.parametrize("adapter", [None, PIRATE])
def test_no_policy_ever_chooses_a_worker_that_is_left_out(
    name: str, adapter: AdapterRef | None
) -> None:
    fleet, _ = a_fleet((9, 0, (PIRATE,)), (9, 3, (PIRATE,)), (9, 5, ()))
    policy, rng = make_policy(name), random.Random(1)
    excluded = {"w0", "gone"}
    for n in range(20):
        choice = policy.choose(RoutingRequest("tiny", adapter), fleet, 10.0 * n, rng, excluded)
        assert isinstance(choice, Choice) and choice.worker.id != "w0"
    assert fleet.pool("tiny").workers == list(fleet) and [w.load for w in fleet] == [0, 3, 5]


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_cold_adapter_goes_where_a_slot_is_empty_before_anybody_must_leave_one(name: str) -> None:
    """It does so even if a worker without an empty slot has it in host memory and has less
    to do.
    """
    fleet = Fleet(10.0)
    heartbeat = Heartbeat("w0", 1, 1, "tiny", WorkerState.SERVING, capacity=9, slots=1)
    there = AdapterState(HAIKU.name, HAIKU.digest, Tier.GPU)
    stash = AdapterState(PIRATE.name, PIRATE.digest, Tier.CPU)
    fleet.heartbeat(msgspec.structs.replace(heartbeat, adapters=(there, stash)), 0.0)
    other = msgspec.structs.replace(heartbeat, worker="w1", slots=2, adapters=(there,), running=1)
    fleet.heartbeat(other, 0.0)
    for worker in ("w0", "w1"):
        fleet.attach(worker, 1)
    policy = make_policy(name)
    for seed in range(10):
        choice = policy.choose(RoutingRequest("tiny", PIRATE), fleet, 0.0, random.Random(seed))
        assert isinstance(choice, Choice) and choice.worker.id == "w1"
