"""Pure. The runs that a study is made of (`measure...`: one policy, one situation, one seed), and
what is known once they have ended: a comparison, growth, an event, overload.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from bench.routing.report.figures import (
    Figures,
    Flash,
    Moment,
    SeedSpread,
    figures,
    flash,
    spread,
    timeline,
)
from bench.routing.sim.clairvoyant import bound, capacity_bound
from bench.routing.sim.pooled import pooled
from bench.routing.sim.production import STRICT, loader_of
from bench.routing.sim.scenarios import (
    SCENARIOS,
    WORKERS,
    CountedWindow,
    TrafficScenario,
    requests_of,
)
from bench.routing.sim.timing import Loader, timing_of
from bench.routing.sim.worker import WorkerFacts
from bench.routing.sim.world import Join, Loss, SimRun, World, adapter_name, simulate

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
ADAPTERS_PER_WORKER = 125
MOST_ADAPTERS = 10_000
PRODUCTION_QUEUE, PRODUCTION_QUEUE_S = 1024, 60.0
"""The gateway's defaults (shared/config/gateway.py): overload is met with the bounds that
production has.
"""


@dataclass(frozen=True, slots=True)
class Case:
    """One policy in one situation with one seed."""

    policy: str
    scenario: TrafficScenario
    seed: int
    workers: int = WORKERS
    window: CountedWindow = field(default_factory=CountedWindow)
    loads: Loader = "vllm"

    @property
    def world(self) -> World:
        facts = WorkerFacts("base")
        timing = timing_of(loader_of(self.policy, self.loads))
        return World(
            self.policy, self.workers, self.scenario.all_adapters, self.seed, timing, facts
        )


# ---- jobs ----------------------------------------------------------------------------------------


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


def _overloaded(case: Case, rate_per_s: float) -> SimRun:
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


# ---- answers -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CompareAnswer:
    """Of several policies in one scenario; `capacities` and `figures` by policy, one per seed."""

    scenario: TrafficScenario
    rate_rps: float
    rate_is: str
    capacities: dict[str, list[float]]
    figures: dict[str, list[Figures]]
    flashes: dict[str, list[Flash]]

    def spreads(self, policy: str) -> dict[str, SeedSpread]:
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


@dataclass(frozen=True, slots=True)
class GrowAnswer:
    """Figures by policy and point, one per seed, as `of` (adapters or workers) grows."""

    of: str
    points: tuple[int, ...]
    rates_rps: tuple[float, ...]
    adapters: tuple[int, ...]
    figures: dict[str, list[list[Figures]]]


@dataclass(frozen=True, slots=True)
class EventAnswer:
    """How each policy went through a scale event or a loss: timelines by policy, one per seed."""

    what: str
    at_s: float
    rate_rps: float
    timelines: dict[str, list[list[Moment]]]


@dataclass(frozen=True, slots=True)
class OverloadAnswer:
    """By policy and by how many times its own capacity was offered: figures, one per seed."""

    capacities: dict[str, float]
    figures: dict[str, dict[float, list[Figures]]]


def scenario_named(name: str, adapters: int | None) -> TrafficScenario:
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
