"""Pure. What is asked of the simulator: capacities, a comparison at one rate, growth, overload,
scale events. Plans runs; `spread_out` runs them.

Each question becomes a list of independent jobs (a function of this module and its arguments,
picklable both), so that seeds and policies can run in as many processes as there are cores; results
come back in the order of the jobs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Protocol

from bench.routing.sim.clairvoyant import bound, capacity_bound
from bench.routing.sim.figures import (
    Figures,
    Flash,
    Moment,
    Spread,
    Waits,
    figures,
    flash,
    spread,
    timeline,
    waits,
)
from bench.routing.sim.pooled import pooled
from bench.routing.sim.production import STRICT, loader_of
from bench.routing.sim.scenarios import SCENARIOS, WORKERS, Scenario, Window, requests_of
from bench.routing.sim.search import highest, keeps
from bench.routing.sim.timing import Loader, timing_of
from bench.routing.sim.worker import WorkerFacts
from bench.routing.sim.world import Join, Loss, Run, World, adapter_name, simulate

CLAIRVOYANT = "clairvoyant"
ONE_POOL = "one-pool"
OURS = "expected-ttft"
REFERENCE = STRICT
CAPACITY_P99_S = 0.5
COMMON_P99_S = 1.0
"""The rate of the comparison in `default` is where the reference's p99 TTFT reaches this."""
COMMON_SHARE = 0.75
"""Everywhere else: this share of the best policy's median capacity."""
GUESS_RPS_PER_WORKER = 10.0
FIRST_SEED_STRIDE = 1.3
"""Small, from a rate that most policies can bear: runs at rates far above a capacity take much
longer than those below it.
"""
NEXT_SEED_STRIDE = 1.08
"""Capacities of two seeds of one policy differ by less than this, as a rule."""
MOST_REQUESTS = 20_000
"""Of one run of a growth study: large fleets are watched for a shorter time."""
GROWTH_RPS_PER_WORKER = 7.0
ADAPTERS_PER_WORKER = 125
MOST_ADAPTERS = 10_000
GROWTH = {
    "adapters": (16, 64, 128, 256, 1_000, 4_000, 10_000),
    "workers": (1, 2, 4, 8, 16, 64, 256, 1_000),
}
PRODUCTION_QUEUE, PRODUCTION_QUEUE_S = 1024, 60.0
"""The gateway's defaults (shared/config/gateway.py): overload is met with the bounds that
production has.
"""


@dataclass(frozen=True, slots=True)
class Case:
    """One policy in one situation with one seed."""

    policy: str
    scenario: Scenario
    seed: int
    workers: int = WORKERS
    window: Window = field(default_factory=Window)
    disk_warm: bool = True
    loads: Loader = "vllm"

    @property
    def world(self) -> World:
        facts = WorkerFacts("base", disk_warm=self.disk_warm)
        timing = timing_of(loader_of(self.policy, self.loads))
        return World(
            self.policy, self.workers, self.scenario.all_adapters, self.seed, timing, facts
        )


class SpreadOut(Protocol):
    """Runs `job(*arguments)` for each of the arguments, in any order and place; the results are in
    the order of the arguments.
    """

    def __call__(
        self, job: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]
    ) -> list[Any]: ...


# ---- jobs ----------------------------------------------------------------------------------------


def capacity(case: Case, guess_rps: float, stride: float, p99_s: float) -> float:
    """The highest Poisson rate with p99 TTFT at or under `p99_s` at which every request
    completes.
    """
    return highest(
        lambda rate: keeps(case.world, case.scenario, rate, case.window, p99_s),
        guess_rps,
        stride=stride,
    )


def measure(case: Case, rate_per_s: float) -> tuple[Figures, Flash | None]:
    requests = requests_of(case.scenario, rate_per_s, case.seed, case.window)
    run = simulate(case.world, requests)
    if not case.scenario.flash:
        return figures(run, case.window), None
    calm = simulate(
        case.world,
        requests_of(replace(case.scenario, flash=False), rate_per_s, case.seed, case.window),
    )
    hot = case.scenario.adapters
    return figures(run, case.window), flash(
        run, calm, hot, adapter_name(hot), case.workers, case.window
    )


def measure_bound(case: Case, rate_per_s: float) -> tuple[Figures, float]:
    """The clairvoyant bound for these requests, and its capacity."""
    world = case.world
    run = bound(
        requests_of(case.scenario, rate_per_s, case.seed, case.window),
        case.workers,
        world.facts,
        world.timing,
    )
    return figures(run, case.window), capacity_bound(run, case.workers, world.facts, world.timing)


def measure_pooled(case: Case, rate_per_s: float) -> Figures:
    """Of the default policy's run, had all slots been one worker's."""
    world = replace(case, policy=OURS).world
    run = simulate(world, requests_of(case.scenario, rate_per_s, case.seed, case.window))
    return figures(pooled(run, case.workers, world.facts), case.window)


def measure_overload(case: Case, rate_per_s: float) -> Figures:
    """With the bounded queue of production: what cannot be served in time is refused."""
    return figures(_overloaded(case, rate_per_s), case.window)


def measure_waits(case: Case, rate_per_s: float) -> Waits:
    """Likewise."""
    return waits(_overloaded(case, rate_per_s), case.window)


def _overloaded(case: Case, rate_per_s: float) -> Run:
    world = replace(case.world, max_queued=PRODUCTION_QUEUE, queue_timeout_s=PRODUCTION_QUEUE_S)
    return simulate(world, requests_of(case.scenario, rate_per_s, case.seed, case.window))


def measure_event(case: Case, rate_per_s: float, event: str) -> list[Moment]:
    """A quarter of the workers joins (`scale`) or is lost (`loss`) a third into the measured
    time.
    """
    number = max(1, case.workers // 4)
    happening = (
        Join(case.window.flash_s, number) if event == "scale" else Loss(case.window.flash_s, number)
    )
    world = replace(case.world, events=(happening,))
    return timeline(
        simulate(world, requests_of(case.scenario, rate_per_s, case.seed, case.window)), case.window
    )


# ---- questions -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Comparison:
    """Of several policies in one scenario; `capacities` and `figures` by policy, one per seed."""

    scenario: Scenario
    rate_rps: float
    rate_is: str
    capacities: dict[str, list[float]]
    figures: dict[str, list[Figures]]
    flashes: dict[str, list[Flash]]

    def spreads(self, policy: str) -> dict[str, Spread]:
        """Of every figure of a policy, by name."""
        rows = [asdict(row) for row in self.figures[policy]]
        made = (
            {field.name: spread([row[field.name] for row in rows]) for field in fields(Figures)}
            if rows
            else {}
        )
        if self.capacities.get(policy):
            made["capacity_rps"] = spread(self.capacities[policy])
        return made


def capacities(
    cases: Sequence[Case], seeds: int, p99_s: float, spread_out: SpreadOut
) -> dict[str, list[float]]:
    """By policy, of each of `seeds` seeds (0, 1, ...). The first seed's capacity is the guess for
    the others.
    """
    first = spread_out(
        capacity,
        [(case, GUESS_RPS_PER_WORKER * case.workers, FIRST_SEED_STRIDE, p99_s) for case in cases],
    )
    others = [
        (replace(case, seed=seed), guess or 1.0, NEXT_SEED_STRIDE, p99_s)
        for case, guess in zip(cases, first, strict=True)
        for seed in range(1, seeds)
    ]
    rest = spread_out(capacity, others)
    found: dict[str, list[float]] = {}
    for nth, (case, at) in enumerate(zip(cases, first, strict=True)):
        found[case.policy] = [at, *rest[nth * (seeds - 1) : (nth + 1) * (seeds - 1)]]
    return found


def compare(
    cases: Sequence[Case],
    seeds: int,
    rate_rps: float | None,
    with_capacity: bool,
    with_bound: bool,
    spread_out: SpreadOut,
) -> Comparison:
    """`cases`: one per policy, all of one scenario, with any seed."""
    cases = [replace(case, seed=0) for case in cases]
    scenario = cases[0].scenario
    found = capacities(cases, seeds, CAPACITY_P99_S, spread_out) if with_capacity else {}
    rate_is = "as asked for"
    if rate_rps is None:
        rate_rps, rate_is = _common_rate(cases, seeds, found, spread_out)
    jobs = [(replace(case, seed=seed), rate_rps) for case in cases for seed in range(seeds)]
    measured: dict[str, list[Figures]] = {}
    flashes: dict[str, list[Flash]] = {}
    for (case, _), (row, crowd) in zip(jobs, spread_out(measure, jobs), strict=True):
        measured.setdefault(case.policy, []).append(row)
        if crowd is not None:
            flashes.setdefault(case.policy, []).append(crowd)
    if with_bound:
        bounds = spread_out(
            measure_bound, [(replace(cases[0], seed=seed), rate_rps) for seed in range(seeds)]
        )
        measured[CLAIRVOYANT] = [row for row, _ in bounds]
        found[CLAIRVOYANT] = [at for _, at in bounds]
    return Comparison(scenario, rate_rps, rate_is, found, measured, flashes)


def _common_rate(
    cases: Sequence[Case], seeds: int, found: dict[str, list[float]], spread_out: SpreadOut
) -> tuple[float, str]:
    reference = [case for case in cases if case.policy == REFERENCE]
    if cases[0].scenario.name == "default" and reference:
        at = capacities(reference, seeds, COMMON_P99_S, spread_out)[REFERENCE]
        return statistics.median(
            at
        ), f"where p99 TTFT of {REFERENCE} reaches {COMMON_P99_S:g} s (median over seeds)"
    if not found:
        found = capacities(cases, 1, CAPACITY_P99_S, spread_out)
    best = max(statistics.median(values) for values in found.values())
    return COMMON_SHARE * best, f"{COMMON_SHARE:g} x the best policy's median capacity"


@dataclass(frozen=True, slots=True)
class Growth:
    """Figures by policy and point, one per seed, as `of` (adapters or workers) grows."""

    of: str
    points: tuple[int, ...]
    rates_rps: tuple[float, ...]
    adapters: tuple[int, ...]
    figures: dict[str, list[list[Figures]]]


def grow(
    cases: Sequence[Case], of: str, seeds: int, rate_rps: float | None, spread_out: SpreadOut
) -> Growth:
    """Every policy at the same load per worker; with the workers, the adapters grow as well, to
    MOST_ADAPTERS.
    """
    situations = [_grown(cases[0], of, point) for point in GROWTH[of]]
    per_worker = (rate_rps or GROWTH_RPS_PER_WORKER * cases[0].workers) / cases[0].workers
    rates = [per_worker * situation.workers for situation in situations]
    jobs = []
    for case in cases:
        for situation, rate in zip(situations, rates, strict=True):
            at_most = min(1.0, MOST_REQUESTS / (rate * situation.window.end_s))
            window = Window(
                situation.window.warm_up_s * at_most, situation.window.duration_s * at_most
            )
            jobs += [
                (replace(situation, policy=case.policy, window=window, seed=seed), rate)
                for seed in range(seeds)
            ]
    results = iter(spread_out(measure, jobs))
    measured = {
        case.policy: [[next(results)[0] for _ in range(seeds)] for _ in situations]
        for case in cases
    }
    return Growth(
        of, GROWTH[of], tuple(rates), tuple(s.scenario.adapters for s in situations), measured
    )


def _grown(case: Case, of: str, point: int) -> Case:
    if of == "adapters":
        return replace(case, scenario=replace(case.scenario, adapters=point))
    adapters = min(MOST_ADAPTERS, ADAPTERS_PER_WORKER * point)
    return replace(case, workers=point, scenario=replace(case.scenario, adapters=adapters))


@dataclass(frozen=True, slots=True)
class Event:
    """How each policy went through a scale event or a loss: timelines by policy, one per seed."""

    what: str
    at_s: float
    rate_rps: float
    timelines: dict[str, list[list[Moment]]]


def watch(
    cases: Sequence[Case], event: str, seeds: int, rate_rps: float, spread_out: SpreadOut
) -> Event:
    jobs = [(replace(case, seed=seed), rate_rps, event) for case in cases for seed in range(seeds)]
    results = iter(spread_out(measure_event, jobs))
    timelines = {case.policy: [next(results) for _ in range(seeds)] for case in cases}
    return Event(event, cases[0].window.flash_s, rate_rps, timelines)


@dataclass(frozen=True, slots=True)
class Overload:
    """By policy and by how many times its own capacity was offered: figures, one per seed."""

    capacities: dict[str, float]
    figures: dict[str, dict[float, list[Figures]]]


def overload(
    cases: Sequence[Case],
    times: Sequence[float],
    seeds: int,
    at: dict[str, list[float]],
    spread_out: SpreadOut,
) -> Overload:
    medians = {case.policy: statistics.median(at[case.policy]) for case in cases}
    jobs = [
        (replace(c, seed=seed), medians[c.policy] * more)
        for c in cases
        for more in times
        for seed in range(seeds)
    ]
    results = iter(spread_out(measure_overload, jobs))
    measured = {
        case.policy: {more: [next(results) for _ in range(seeds)] for more in times}
        for case in cases
    }
    return Overload(medians, measured)


def who_waits(
    cases: Sequence[Case], seeds: int, rate_rps: float, spread_out: SpreadOut
) -> dict[str, list[Waits]]:
    """By policy, one per seed."""
    jobs = [(replace(case, seed=seed), rate_rps) for case in cases for seed in range(seeds)]
    results = iter(spread_out(measure_waits, jobs))
    return {case.policy: [next(results) for _ in range(seeds)] for case in cases}


def scenario_named(name: str, adapters: int | None) -> Scenario:
    """Raises: KeyError if there is none of that name."""
    scenario = SCENARIOS[name]
    return replace(scenario, adapters=adapters) if adapters else scenario


def facts_of(case: Case) -> dict[str, Any]:
    """What the JSON says of the situation."""
    timing, worker = timing_of(case.loads), case.world.facts
    return {
        "name": case.scenario.name,
        "what": case.scenario.what,
        "workers": case.workers,
        "loads": case.loads,
        "adapters": case.scenario.all_adapters,
        "mix": repr(case.scenario.mix),
        "prompt": repr(case.scenario.prompt),
        "output": repr(case.scenario.output),
        "warm_up_s": case.window.warm_up_s,
        "duration_s": case.window.duration_s,
        "worker": {field.name: getattr(worker, field.name) for field in fields(worker)},
        "timing": {field.name: getattr(timing, field.name) for field in fields(timing)},
    }
