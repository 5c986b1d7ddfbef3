"""Shell. `python -m bench.routing.ablate`: what each rule of the default policy earns.

    python -m bench.routing.ablate --seconds 600        # goes on where the last call stopped
    python -m bench.routing.ablate --table              # of what there is

Each rule and each constant is switched off, or halved and doubled, one at a time. The arrivals of a
seed are the same for all, so differences are not those of chance. Loads are shares of the rate at
which the default policy keeps a p99 of 0.5 s, found with a seed of its own. The gateway has
production's queue. The fleet is a quarter of the usual one in slots and adapters: 4 workers of 8.

The table has geometric means over the seeds of the ratios to the policy as it is: of mean, p50 and
p99. Above 1, the rule earns something. A star marks a mean or a p99 whose 95% interval (Student's,
of the logarithms) is beyond 1.03 or below 0.97.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from bench.load.measure import percentile
from bench.routing.report.figures import ttft_s
from bench.routing.sim.scenarios import SCENARIOS, CountedWindow, requests_of
from bench.routing.sim.timing import Loader
from bench.routing.sim.world import World, simulate
from bench.routing.study.runs import (
    CAPACITY_P99_S,
    OURS,
    PRODUCTION_QUEUE,
    PRODUCTION_QUEUE_S,
    Case,
    scenario_named,
)
from bench.routing.study.search import highest, keeps
from gateway.fleet import worker_view
from gateway.routing.expected_ttft import policy, price
from shared.link.messages import Tier
from worker.adapters import residency, slot_eviction

WORKERS, SLOTS, SMALLER = 4, 8, 4
WINDOW = CountedWindow(4.0, 12.0)
GUESS_RPS = {"default": 42, "fits": 110, "hot": 85, "flat": 28, "flash": 35, "lengths": 42}
SEED_BLOCKS = (range(1, 6), range(6, 11))
"""All cells with the first seeds, then all with the others."""
STUDENT_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
"""By the number of seeds."""
EARNS = 1.03
AS_IT_IS, RAY = "as it is", "ray"
SHARES: dict[Loader, tuple[float, ...]] = {"own": (0.7, 1.0, 1.4, 2.0), "vllm": (0.7, 1.4)}


@dataclass(frozen=True, slots=True)
class Change:
    """One name of one module or class has another value."""

    name: str
    owner: object
    attribute: str
    value: object


def _nothing(*_: object) -> float:
    return 0.0


def _never(*_: object) -> bool:
    return False


def _unshared(
    self: policy.ExpectedTTFT,
    request: Any,
    key: Any,
    workers: Any,
    now: float,
    shared_by: float = 1.0,
    only_copy: bool = False,
    chance: float | None = None,
) -> Any:
    return _CHEAPEST(self, request, key, workers, now, only_copy=only_copy, chance=chance)


def _homes_alone(self: policy.ExpectedTTFT, key: Any, pool: Any, *given: Any) -> Any:
    others = _OTHERS(self, key, pool, *given)
    return [w for w in others if w.tier_at(key) is not Tier.CPU] or others


def _own_chance(workers: Any) -> None:
    """No chance is given, so each worker has its own."""


def _load_without_stall(*given: Any) -> tuple[float, float]:
    return _LOAD(*given)[0], 0.0


def _load_not_behind_others(worker: Any, key: Any, now: float) -> tuple[float, float]:
    load_s, stall_s = _LOAD(worker, key, now)
    return (load_s if key in worker.coming else load_s / (1 + len(worker.coming))), stall_s


def _none_kept(*_: object, **__: object) -> set[Any]:
    return set()


_CHEAPEST, _OTHERS = policy.ExpectedTTFT._cheapest, policy.ExpectedTTFT._others
_LOAD = price._load_s
_DEFAULT = policy.ExpectedTTFT

CHANGES: tuple[Change, ...] = (
    Change("running sequences cost nothing", price, "CROWD_S", 0.0),
    Change("slots cost nothing", price, "_no_slot", _nothing),
    Change("second copies have the worker's own chance", policy, "mean_chance", _own_chance),
    Change("no price for the wait in line", price, "_in_line", _nothing),
    Change("stalls cost nothing", price, "_load_s", _load_without_stall),
    Change("loads ahead cost nothing", price, "_load_s", _load_not_behind_others),
    Change("loads and slots are not shared", _DEFAULT, "_cheapest", _unshared),
    Change("quiet holders are not taken at once", policy, "_is_quiet", _never),
    Change("copies in host memory are not seen", _DEFAULT, "_others", _homes_alone),
    Change("empty slots do not come first", worker_view.WorkerView, "has_empty_slot", True),
    Change("second copies wait in line", worker_view.WorkerView, "has_open_slot", True),
    Change("one home", policy, "HOMES", 1),
    Change("service time is not learned", policy, "WEIGHT", 0.0),
    Change("no line at workers", worker_view, "LINE_PER_SLOT", 0),
    Change("waiting requests do not count as age", residency, "COUNT_S", 0.0),
    Change("adapters in steady use lose slots", slot_eviction.SlotEviction, "kept", _none_kept),
    Change("a slot closes after two seconds", residency, "SLOT_WAIT_S", 2.0),
    Change("a slot closes after half a second", residency, "SLOT_WAIT_S", 0.5),
    Change("two places in line per slot", worker_view, "LINE_PER_SLOT", 2),
    Change("four homes", policy, "HOMES", 4),
    Change("running sequences cost twice", price, "CROWD_S", price.CROWD_S * 2),
    Change("running sequences cost half", price, "CROWD_S", price.CROWD_S / 2),
    Change("four times the weight of the newest", policy, "WEIGHT", policy.WEIGHT * 4),
    Change("twice the load time until measured", price, "LOAD_S", price.LOAD_S * 2),
    Change("half the load time until measured", price, "LOAD_S", price.LOAD_S / 2),
)
BY_NAME = {change.name: change for change in CHANGES}


class Run(msgspec.Struct, frozen=True):
    """`share` 0: the search for the capacity."""

    scenario: str
    loads: Loader
    share: float
    seed: int
    change: str


@contextmanager
def made(change: Change | None) -> Iterator[None]:
    if change is None:
        yield
        return
    before = getattr(change.owner, change.attribute)
    setattr(change.owner, change.attribute, change.value)
    try:
        yield
    finally:
        setattr(change.owner, change.attribute, before)


def case_of(run: Run) -> Case:
    scenario = scenario_named(run.scenario, SCENARIOS[run.scenario].adapters // SMALLER)
    name = RAY if run.change == RAY else OURS
    return Case(name, scenario, run.seed, WORKERS, WINDOW, loads=run.loads)


def world_of(case: Case) -> World:
    facts = replace(case.world.facts, slots=SLOTS, cpu_adapters=4 * SLOTS)
    return replace(
        case.world, facts=facts, max_queued=PRODUCTION_QUEUE, queue_timeout_s=PRODUCTION_QUEUE_S
    )


def capacity_rps(run: Run) -> float:
    case = case_of(run)

    def passes(rate: float) -> bool:
        return keeps(world_of(case), case.scenario, rate, WINDOW, CAPACITY_P99_S)

    return highest(passes, GUESS_RPS[run.scenario], stride=1.08)


def figures(run: Run, rate_rps: float) -> tuple[float, float, float]:
    """Mean, p50 and p99 of TTFT in seconds."""
    case = case_of(run)
    with made(BY_NAME.get(run.change)):
        found = simulate(world_of(case), requests_of(case.scenario, rate_rps, run.seed, WINDOW))
    waits = sorted(ttft_s(o) for o in found.outcomes if WINDOW.counts(o.request.at_s))
    return sum(waits) / len(waits), percentile(waits, 0.5), percentile(waits, 0.99)


def plan(
    loads: Sequence[Loader],
    shares: Sequence[float],
    scenarios: Sequence[str],
    changes: Sequence[str],
) -> list[Run]:
    """In the order in which runs are made."""
    return [
        Run(scenario, loader, share, seed, change)
        for block in SEED_BLOCKS
        for loader in loads
        for share in shares
        if share in SHARES[loader]
        for scenario in scenarios
        for seed in block
        for change in (AS_IT_IS, RAY, *changes)
    ]


class Kept:
    """What is known, one line of a file each."""

    def __init__(self, path: Path) -> None:
        self._path, self.found = path, dict[Run, Any]()
        text = path.read_text() if path.exists() else ""
        self._cut_off = bool(text) and not text.endswith("\n")
        for line in text.splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # cut off when a call was killed
            self.found[msgspec.convert(row["run"], Run)] = row["result"]

    def add(self, run: Run, result: Any) -> None:
        self.found[run] = result
        with self._path.open("a") as file:
            file.write(
                "\n" * self._cut_off
                + json.dumps({"run": msgspec.to_builtins(run), "result": result})
                + "\n"
            )
        self._cut_off = False


def work(kept: Kept, runs: Sequence[Run], until: float) -> int:
    """Returns how many are left."""
    for nth, run in enumerate(runs):
        if time.monotonic() > until:
            return len([r for r in runs[nth:] if r not in kept.found])
        if run in kept.found:
            continue
        search = Run(run.scenario, run.loads, 0.0, 0, AS_IT_IS)
        if search not in kept.found:
            kept.add(search, capacity_rps(search))
        kept.add(run, figures(run, kept.found[search] * run.share))
    return 0


# ---- the table -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ratio:
    """Geometric mean, and the factor up and down to the ends of its 95% interval."""

    mean: float
    factor: float

    @property
    def sure(self) -> bool:
        return self.mean / self.factor > EARNS or self.mean * self.factor < 1 / EARNS


def ratio_of(pairs: Sequence[tuple[float, float]]) -> Ratio:
    """Of (changed, as it is), seed by seed; at least two."""
    logs = [math.log(one / other) for one, other in pairs]
    spread = STUDENT_95[len(logs)] * statistics.stdev(logs) / math.sqrt(len(logs))
    return Ratio(math.exp(statistics.mean(logs)), math.exp(spread))


def ratios(kept: Kept, scenario: str, loads: Loader, share: float, change: str) -> list[Ratio]:
    """Of mean, p50 and p99; empty if there are less than two seeds of both."""
    pairs = []
    for seed in range(1, 11):
        one = kept.found.get(Run(scenario, loads, share, seed, change))
        other = kept.found.get(Run(scenario, loads, share, seed, AS_IT_IS))
        if one and other:
            pairs.append((one, other))
    if len(pairs) < 2:
        return []
    return [ratio_of([(a[nth], b[nth]) for a, b in pairs]) for nth in range(3)]


def cell(found: Sequence[Ratio]) -> str:
    """Mean, p50, p99; the interval of the p99 as a factor."""
    if not found:
        return ""
    mean, p50, p99 = found
    stars = ["*" if r.sure else "" for r in (mean, p50, p99)]
    each = [f"{r.mean:.2f}{star}" for r, star in zip(found, stars, strict=True)]
    return " ".join([*each, f"x{p99.factor:.2f}"])


def table(kept: Kept, loads: Loader, share: float, scenarios: Sequence[str]) -> str:
    def absolute(scenario: str) -> str:
        rows = [
            kept.found[run]
            for seed in range(1, 11)
            if (run := Run(scenario, loads, share, seed, AS_IT_IS)) in kept.found
        ]
        if not rows:
            return ""
        columns = (sum(column) / len(rows) * 1e3 for column in zip(*rows, strict=True))
        return " ".join(f"{ms:,.0f}" for ms in columns) + f" ({len(rows)})"

    lines = [
        "| change | " + " | ".join(scenarios) + " |",
        "|---" * (1 + len(scenarios)) + "|",
        f"| {AS_IT_IS}, ms (seeds) | " + " | ".join(map(absolute, scenarios)) + " |",
    ]
    for change in (RAY, *BY_NAME):
        found = [cell(ratios(kept, scenario, loads, share, change)) for scenario in scenarios]
        lines.append(f"| {change} | " + " | ".join(found) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.routing.ablate")
    add = parser.add_argument
    add("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    add("--share", nargs="+", type=float, default=[1.4, 0.7, 2.0, 1.0], help="of the capacity")
    add("--loads", nargs="+", choices=["own", "vllm"], default=["own", "vllm"])
    add("--changes", nargs="+", choices=list(BY_NAME), default=list(BY_NAME), metavar="CHANGE")
    add("--seconds", type=float, default=1e9, help="after which no further run is begun")
    add("--out", type=Path, default=Path("ablate.jsonl"))
    add("--table", action="store_true", help="print what there is; run nothing")
    flags = parser.parse_args()
    logging.getLogger("loraplex").setLevel(logging.ERROR)
    kept = Kept(flags.out)
    left = 0
    if not flags.table:
        runs = plan(flags.loads, flags.share, flags.scenarios, flags.changes)
        left = work(kept, runs, time.monotonic() + flags.seconds)
        print(f"{left} runs are left: the same command goes on", file=sys.stderr)
    for loads in flags.loads:
        for share in sorted(flags.share):
            if any(r.loads == loads and r.share == share for r in kept.found):
                print(f"\n{loads} loads, {share:g} of the capacity\n")
                print(table(kept, loads, share, flags.scenarios))
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
