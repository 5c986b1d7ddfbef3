"""The simulator as a whole: production gateway code in virtual time, simulated workers behind
it.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.load.workload import PlannedRequest
from bench.routing.report.figures import figures
from bench.routing.sim.clairvoyant import bound, capacity_bound, hits_of
from bench.routing.sim.production import policies
from bench.routing.sim.scenarios import SCENARIOS, CountedWindow, requests_of
from bench.routing.sim.timing import Timing, timing_of
from bench.routing.sim.worker import WorkerFacts
from bench.routing.sim.world import Join, Loss, SimOutcome, SimRun, World, simulate
from bench.routing.study.runs import Case
from shared.link.messages import Tier

WINDOW = CountedWindow(1.0, 3.0)
TIMING = Timing()
FACTS = WorkerFacts("base")
EARLY_S = 2 * TIMING.link_s + 1e-4
"""What the link and the check of the disk cache add to a request, at most, besides the table."""


def _requests(
    times: list[float], adapters: list[int | None], prompt: int = 128, output: int = 128
) -> list[PlannedRequest]:
    return [
        PlannedRequest(n, at_s, adapter, None, prompt, output)
        for n, (at_s, adapter) in enumerate(zip(times, adapters, strict=True))
    ]


def _ended_once(run: SimRun) -> None:
    for outcome in run.outcomes:
        assert outcome.ends == 1, outcome
        assert (outcome.failed is None) == (outcome.tier is not None), outcome


@pytest.mark.parametrize("policy", policies())
@pytest.mark.parametrize("scenario", ["default", "flash", "lengths"])
def test_every_request_ends_exactly_once_and_no_worker_keeps_anything(
    policy: str, scenario: str
) -> None:
    requests = requests_of(SCENARIOS[scenario], 50.0, 1, WINDOW)
    run = simulate(World(policy, 8, 1001, 1), requests)
    assert len(run.outcomes) == len(requests)
    _ended_once(run)
    assert not any(outcome.failed for outcome in run.outcomes)
    assert all(
        outcome.ttft_s is not None and outcome.ttft_s > TIMING.outside_s for outcome in run.outcomes
    )


@pytest.mark.parametrize("policy", policies())
def test_requests_beyond_the_queue_s_bounds_are_refused_and_still_end_once(policy: str) -> None:
    slow = replace(FACTS, capacity=4)
    world = World(policy, 2, 100, 0, facts=slow, max_queued=20, queue_timeout_s=1.0)
    run = simulate(world, requests_of(SCENARIOS["fits"], 100.0, 0, WINDOW))
    _ended_once(run)


@pytest.mark.parametrize("policy", policies())
def test_a_lost_worker_s_requests_go_elsewhere_or_fail_once_and_a_new_worker_is_used(
    policy: str,
) -> None:
    world = World(policy, 4, 100, 3, events=(Loss(1.5, 2), Join(2.0, 2)))
    run = simulate(world, requests_of(SCENARIOS["fits"], 60.0, 3, WINDOW))
    _ended_once(run)
    failed = [outcome for outcome in run.outcomes if outcome.failed]
    assert failed  # those that had begun to stream
    # A client that has seen the beginning of an answer gets no second one: everybody else is served
    # by another worker.
    assert all(outcome.ttft_s is not None for outcome in run.outcomes)
    later = {
        outcome.worker
        for outcome in run.outcomes
        if outcome.request.at_s > 3.0 and not outcome.failed
    }
    assert later.isdisjoint({"w0000", "w0001"})
    assert later & {"w0004", "w0005"}


@pytest.mark.parametrize("policy", policies())
def test_the_same_seed_gives_the_same_run_and_another_one_another(policy: str) -> None:
    def outcomes(seed: int) -> list[tuple[float | None, str, float | None]]:
        run = simulate(
            World(policy, 8, 1000, seed), requests_of(SCENARIOS["default"], 60.0, seed, WINDOW)
        )
        return [(outcome.ttft_s, outcome.worker, outcome.ended_s) for outcome in run.outcomes]

    assert outcomes(1) == outcomes(1)
    assert outcomes(1) != outcomes(2)


@pytest.mark.parametrize("policy", policies())
def test_one_worker_and_one_adapter_give_the_table(policy: str) -> None:
    """Apart from its load, the first request takes its prompt and a step; sixteen at once decode at
    the step of sixteen.
    """
    requests = _requests([1.0, 5.0, *[10.0] * 16], [0] * 18)
    run = simulate(World(policy, 1, 1, 0), requests)
    alone = TIMING.outside_s + TIMING.prefill_step_s(1, 128)
    first, second, *together = run.outcomes
    assert (first.tier, second.tier) == (Tier.DISK, Tier.GPU)
    assert first.ttft_s == pytest.approx(alone + TIMING.load_s + TIMING.fetch_disk_s, abs=EARLY_S)
    assert second.ttft_s == pytest.approx(alone, abs=EARLY_S)
    assert second.ended_s is not None and second.ttft_s is not None
    assert second.ended_s - 5.0 - second.ttft_s == pytest.approx(
        127 * TIMING.step_s(1) - TIMING.outside_s, abs=EARLY_S
    )
    durations = [outcome.ended_s - 10.0 for outcome in together if outcome.ended_s is not None]
    # the first goes ahead, the others follow together
    entry_s = TIMING.prefill_step_s(1, 128) + TIMING.prefill_step_s(16, 15 * 128)
    assert max(durations) == pytest.approx(entry_s + 127 * TIMING.step_s(16), abs=EARLY_S)
    assert [load.tier for load in run.loads] == [Tier.DISK]


def test_an_adapter_that_lost_its_slot_comes_from_the_cpu_tier_and_then_from_disk() -> None:
    facts = replace(FACTS, slots=1, cpu_adapters=1)
    requests = _requests([0.5, 3.0, 6.0, 9.0, 12.0], [0, 1, 0, 2, 1])
    run = simulate(World("residency-p2c", 1, 3, 0, facts=facts), requests)
    assert [outcome.tier for outcome in run.outcomes] == [
        Tier.DISK,
        Tier.DISK,
        Tier.CPU,
        Tier.DISK,
        Tier.DISK,
    ]
    cold, warm = run.outcomes[0].ttft_s, run.outcomes[2].ttft_s
    assert cold is not None and warm is not None
    assert cold - warm == pytest.approx(
        TIMING.load_s - TIMING.activate_s, abs=2 * EARLY_S + TIMING.fetch_disk_s
    )


def test_a_cold_disk_fetches_each_adapter_from_the_store_once_without_stalling_anybody() -> None:
    facts = replace(FACTS, slots=1, cpu_adapters=0, disk_warm=False)
    requests = _requests([0.5, 3.0, 6.0], [0, 1, 0])
    run = simulate(World("residency-p2c", 1, 2, 0, facts=facts), requests)
    assert [outcome.tier for outcome in run.outcomes] == [Tier.REMOTE, Tier.REMOTE, Tier.DISK]


def test_a_load_stalls_the_requests_that_run_on_its_worker() -> None:
    lone = simulate(
        World("residency-p2c", 1, 2, 0), _requests([1.0, 3.0], [0, 0], 1, 100)
    ).outcomes[1]
    beside = simulate(
        World("residency-p2c", 1, 2, 0), _requests([1.0, 3.0, 3.2], [0, 0, 1], 1, 100)
    ).outcomes[1]
    assert lone.ended_s is not None and beside.ended_s is not None
    assert beside.ended_s - lone.ended_s > TIMING.load_s


def test_a_load_beside_the_engine_is_waited_for_and_stalls_others_for_its_last_part() -> None:
    own = timing_of("own")
    runs = [
        simulate(
            World("residency-p2c", 1, 2, 0, timing), _requests([1.0, 3.0, 3.2], [0, 0, 1], 1, 100)
        )
        for timing in (TIMING, own)
    ]
    (_, stalled, _), (_, hardly, cold) = (run.outcomes for run in runs)
    assert stalled.ended_s is not None and hardly.ended_s is not None and cold.ttft_s is not None
    assert stalled.ended_s - hardly.ended_s == pytest.approx(
        TIMING.load_s - own.load_s, abs=own.step_s(2)
    )
    assert cold.ttft_s > own.prepare_s + own.load_s


def test_adapters_are_prepared_one_after_another() -> None:
    own = timing_of("own")
    run = simulate(
        World("residency-p2c", 1, 3, 0, own), _requests([1.0, 1.0, 1.0], [0, 1, 2], 1, 1)
    )
    first, second, third = sorted(load.at_s for load in run.loads)
    assert (
        second - first >= own.prepare_s - own.load_s
        and third - second >= own.prepare_s - own.load_s
    )


def test_the_bound_waits_for_what_is_done_beside_the_engine_too() -> None:
    own = timing_of("own")
    requests = _requests([1.0, 3.0], [0, 0], 1, 1)
    cold, warm = bound(requests, 1, FACTS, own).outcomes
    assert cold.ttft_s is not None and warm.ttft_s is not None
    assert cold.ttft_s - warm.ttft_s == pytest.approx(own.fetch_disk_s + own.prepare_s + own.load_s)


def test_behind_ray_it_is_vllm_that_loads() -> None:
    own = {
        policy: Case(policy, SCENARIOS["default"], 0, loads="own").world.timing
        for policy in ("ray-strict", "ray")
    }
    assert own == {"ray-strict": TIMING, "ray": timing_of("own")}


def _fewest_misses(adapters: list[int], places: int) -> int:
    """By trying every choice of victim."""
    states = {frozenset[int](): 0}
    for adapter in adapters:
        after: dict[frozenset[int], int] = {}
        for held, misses in states.items():
            options = [(held, misses)] if adapter in held else []
            if adapter not in held:
                lesser = [held] if len(held) < places else [held - {victim} for victim in held]
                options = [(kept | {adapter}, misses + 1) for kept in lesser]
            for state, count in options:
                after[state] = min(count, after.get(state, count))
        states = after
    return min(states.values())


@given(st.lists(st.integers(0, 6), max_size=24), st.integers(1, 4))
def test_nobody_misses_less_often_than_the_clairvoyant(adapters: list[int], places: int) -> None:
    assert hits_of([(a, float(n), float(n)) for n, a in enumerate(adapters)], places).count(
        False
    ) == _fewest_misses(adapters, places)


def test_what_is_in_use_keeps_its_place_in_the_bound() -> None:
    in_use = [(1, 0.0, 10.0), (2, 1.0, 1.0), (3, 2.0, 2.0), (2, 3.0, 3.0), (1, 4.0, 4.0)]
    assert hits_of(in_use, 2) == [False, False, False, False, True]
    idle = [(adapter, at, at) for adapter, at, _ in in_use]
    assert hits_of(idle, 2) == [False, False, False, True, False]
    assert hits_of([(1, 0.0, 9.0), (2, 1.0, 9.0), (3, 2.0, 9.0), (1, 3.0, 9.0)], 2) == [
        False,
        False,
        False,
        True,
    ], "nobody waits"


@pytest.mark.parametrize("policy", policies())
def test_no_policy_beats_the_clairvoyant_bound_of_the_same_requests(policy: str) -> None:
    requests = requests_of(SCENARIOS["default"], 40.0, 5, WINDOW)
    run, best = simulate(World(policy, 8, 1000, 5), requests), bound(requests, 8, FACTS, TIMING)
    assert len(run.loads) >= len(best.loads)
    ours, theirs = figures(run, WINDOW), figures(best, WINDOW)
    assert ours.ttft_p50_s >= theirs.ttft_p50_s
    assert ours.ttft_p99_s >= theirs.ttft_p99_s
    assert 40.0 < capacity_bound(best, 8, FACTS, TIMING) < 8 * TIMING.most_requests_per_s(128, 128)


def test_a_flash_crowd_comes_on_top_of_the_same_steady_requests() -> None:
    window = CountedWindow(5.0, 60.0)
    with_it = requests_of(SCENARIOS["flash"], 100.0, 1, window)
    steady = [request for request in with_it if request.adapter != 1000]
    calm = requests_of(SCENARIOS["default"], 100.0, 1, window)
    assert [(request.at_s, request.adapter) for request in steady] == [
        (request.at_s, request.adapter) for request in calm
    ]
    hot = [request.at_s for request in with_it if request.adapter == 1000]
    assert min(hot) >= window.flash_s
    assert len(hot) / (window.end_s - window.flash_s - 0.5) == pytest.approx(100.0, rel=0.1)
    assert [request.index for request in with_it] == list(range(len(with_it)))


def test_a_higher_rate_asks_for_the_same_adapters_in_the_same_order_only_sooner() -> None:
    slow, fast = (requests_of(SCENARIOS["lengths"], rate, 4, WINDOW) for rate in (20.0, 40.0))
    for one, other in itertools.islice(zip(slow, fast, strict=False), 100):
        assert one.at_s == pytest.approx(2 * other.at_s)
        assert (one.adapter, one.prompt_tokens, one.output_tokens) == (
            other.adapter,
            other.prompt_tokens,
            other.output_tokens,
        )


def test_lengths_carries_the_token_load_of_default() -> None:
    requests = requests_of(SCENARIOS["lengths"], 300.0, 1, CountedWindow(0.0, 60.0))
    assert sum(request.prompt_tokens for request in requests) / len(requests) == pytest.approx(
        128, rel=0.05
    )


def test_figures_count_only_what_arrived_within_the_window() -> None:
    early, late = _requests([0.5, 3.0], [0, 0])
    outcomes = [
        SimOutcome(early, 9.0, 1.0, 10.0, None, Tier.DISK, "w", 1),
        SimOutcome(late, 0.1, 3.0, 4.0, None, Tier.GPU, "w", 1),
    ]
    made = figures(SimRun(outcomes, []), WINDOW)
    assert (made.requests, made.ttft_p99_s, made.hit_rate) == (1, 0.1, 1.0)


def test_a_request_that_never_began_counts_as_one_that_waited_long() -> None:
    (request,) = _requests([3.0], [0])
    made = figures(
        SimRun([SimOutcome(request, None, 0.0, 3.0, "overloaded", None, "", 1)], []), WINDOW
    )
    assert made.failed == 1
    assert made.ttft_p99_s >= 60.0


def test_arrivals_of_the_policy_s_chance_do_not_touch_the_workload() -> None:
    ours, theirs = (
        simulate(World(policy, 8, 1000, 1), requests_of(SCENARIOS["default"], 30.0, 1, WINDOW))
        for policy in ("random", "p2c")
    )
    assert [outcome.request for outcome in ours.outcomes] == [
        outcome.request for outcome in theirs.outcomes
    ]


def test_a_single_server_with_random_arrivals_waits_as_theory_says() -> None:
    """The whole way through gateway and worker: M/D/1, one request at a time in the engine, no
    adapters.
    """
    timing = Timing(
        decode=((1, 0.001),),
        prefill_tokens_per_s=1e12,
        mixed_s=0.0,
        scheduled_ahead=False,
        max_sequences=1,
        outside_s=0.0,
        link_s=1e-6,
    )
    rng, at_s, rate, service_s = random.Random(7), 0.0, 6.0, 0.1
    times = [at_s := at_s + rng.expovariate(rate) for _ in range(12_000)]
    world = World("round-robin", 1, 0, 0, timing=timing, facts=replace(FACTS, capacity=100_000))
    run = simulate(world, _requests([1.0 + at for at in times], [None] * len(times), 1, 100))
    waits = [outcome.ttft_s - 0.001 for outcome in run.outcomes if outcome.ttft_s is not None]
    load = rate * service_s
    assert sum(waits) / len(waits) == pytest.approx(load * service_s / (2 * (1 - load)), rel=0.08)
