"""Pure. One run of a study as a value: what it is, what came of it, about how long it takes. A
study's items can run in any order and place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, Literal, TypeAlias, assert_never

import msgspec

from bench.routing.sim import scenarios
from bench.routing.sim.scenarios import SCENARIOS, CountedWindow, TrafficScenario
from bench.routing.sim.timing import Loader
from bench.routing.study import runs, search
from bench.routing.study.runs import CLAIRVOYANT, Case

Kind: TypeAlias = Literal["keeps", "figures", "bound", "pooled", "overload", "scale", "loss"]
"""A run that asks whether a rate keeps the promise on p99; one for figures; the clairvoyant
bound's; the default policy's with all slots one pool; with production's queue; with an event.
"""
REQUEST_S, LARGE_REQUEST_S, WORKER_S = 0.00030, 0.00042, 0.25e-6
"""Processor time of one request with the usual 8 workers and with more, and what each worker adds
(blind policies scan them). Measured on two busy cores with Python 3.11.
"""
TIMES = {
    "keeps": 0.8,
    "pooled": 1.3,
    "overload": 1.8,
    "bound": 0.1,
    "fits": 0.4,
    "expected-ttft": 1.2,
}
"""By kind, scenario or policy. A run that fails its promise ends early; long queues are dear; with
few adapters heartbeats are short.
"""


class Item(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`adapters` 0: as many as the scenario has. `p99_s` is the promise, for `keeps` alone."""

    kind: Kind
    policy: str
    scenario: str
    seed: int
    rate_rps: float = 0.0
    workers: int = scenarios.WORKERS
    adapters: int = 0
    warm_up_s: float = 60.0
    duration_s: float = 60.0
    p99_s: float = 0.0
    loads: Loader = "vllm"

    @property
    def name(self) -> str:
        where = f"{self.scenario} {self.workers}w" + (f" {self.adapters}a" if self.adapters else "")
        loads = "" if self.loads == "vllm" else f" {self.loads} loads"
        return f"{self.kind} {where}{loads} {self.policy} seed {self.seed} at {self.rate_rps:g}/s"

    @property
    def estimate_s(self) -> float:
        """Processor time."""
        scenario = SCENARIOS[self.scenario]
        seconds = self.warm_up_s + self.duration_s
        if scenario.flash:
            crowd_s = self.duration_s * (1 - scenarios.FLASH_AT)
            # a second run, without the crowd
            seconds += crowd_s + (seconds if self.kind == "figures" else 0.0)
        request_s = (
            REQUEST_S if self.workers <= scenarios.WORKERS else LARGE_REQUEST_S
        ) + WORKER_S * self.workers
        times = math.prod(TIMES.get(word, 1.0) for word in (self.kind, self.scenario, self.policy))
        return times * self.rate_rps * seconds * request_s


def scenario_of(item: Item) -> TrafficScenario:
    return runs.scenario_named(item.scenario, item.adapters or None)


def case_of(item: Item) -> Case:
    policy = "round-robin" if item.policy == CLAIRVOYANT else item.policy  # the bound has none
    return Case(
        policy,
        scenario_of(item),
        item.seed,
        item.workers,
        CountedWindow(item.warm_up_s, item.duration_s),
        loads=item.loads,
    )


class DoneItem(msgspec.Struct, frozen=True):
    """A finished item, one line of a study's file. `at` is when, in seconds since 1970; `code` says
    of which code.
    """

    item: Item
    result: Any
    cpu_s: float
    at: float
    code: str


def perform(item: Item) -> Any:
    """The item's result, as JSON has it. Raises: KeyError for a policy or scenario that does not
    exist.
    """
    case = case_of(item)
    match item.kind:
        case "keeps":
            return search.keeps(case.world, case.scenario, item.rate_rps, case.window, item.p99_s)
        case "figures":
            figures, flash = runs.measure(case, item.rate_rps)
            return {"figures": asdict(figures), "flash": None if flash is None else asdict(flash)}
        case "bound":
            figures, capacity_rps = runs.measure_bound(case, item.rate_rps)
            return {"figures": asdict(figures), "capacity_rps": capacity_rps}
        case "pooled":
            return {"figures": asdict(runs.measure_pooled(case, item.rate_rps))}
        case "overload":
            return {"figures": asdict(runs.measure_overload(case, item.rate_rps))}
        case "scale" | "loss":
            return {
                "moments": [
                    asdict(moment) for moment in runs.measure_event(case, item.rate_rps, item.kind)
                ]
            }
        case _:
            assert_never(item.kind)


class Results:
    """What is known so far. The later of two results for one item holds."""

    def __init__(self, done: Iterable[DoneItem] = ()) -> None:
        self._results: dict[Item, Any] = {}
        self._tried: dict[Item, dict[int, bool]] = {}
        for each in sorted(done, key=lambda each: each.at):
            self.add(each.item, each.result)

    def __contains__(self, item: Item) -> bool:
        return item in self._results

    def __len__(self) -> int:
        return len(self._results)

    def add(self, item: Item, result: Any) -> None:
        self._results[item] = result
        if item.kind == "keeps":
            self._tried.setdefault(at(item, 0.0), {})[search.rung_of(item.rate_rps)] = result

    def copy(self) -> Results:
        made = Results()
        made._results = dict(self._results)
        made._tried = {searched: dict(tried) for searched, tried in self._tried.items()}
        return made

    def get(self, item: Item) -> Any:
        """None if it is not there."""
        return self._results.get(item)

    def tried(self, searched: Item) -> Mapping[int, bool]:
        """By rung, of a search: an item of kind `keeps` at rate 0."""
        return self._tried.get(searched, {})


def at(item: Item, rate_rps: float) -> Item:
    return msgspec.structs.replace(item, rate_rps=rate_rps)


def still_good(
    done: Iterable[DoneItem], redo: Iterable[str], code: str | None = None
) -> list[DoneItem]:
    """Without what older code made of the policies in `redo`. `code` None: the newest that each of
    them has.
    """
    rows, stale = list(done), set(redo)
    newest: dict[str, str] = {}
    for row in sorted(rows, key=lambda row: row.at):
        newest[row.item.policy] = row.code
    return [
        row
        for row in rows
        if row.item.policy not in stale or row.code == (code or newest[row.item.policy])
    ]


def with_seed(item: Item, seed: int) -> Item:
    return msgspec.structs.replace(item, seed=seed)
