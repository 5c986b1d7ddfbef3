"""Shell. `python -m bench.routing.one_pool REPORT.json`: what a fleet would reach if all its slots
were one worker's, computed from a study's report.

No placement of adapters can beat a fleet that needs none: one queue, first come first served, for
all slots. A request stays in its slot as long as the engine's own table says. Its steps are those
of a batch that is equally full everywhere. Prompts stretch them, and so do loads: as many per
request as the report has for the default policy, or for the clairvoyant bound. The capacity is the
highest rate on the ladder of bench/routing/study/search.py whose p99 TTFT is at most 0.5 s, the
median of five seeds. Answers are taken as 128 tokens long.

Exit status: 0; 2 if the report cannot be read.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.load.measure import percentile
from bench.routing.sim.pooled import starts_of
from bench.routing.sim.scenarios import SCENARIOS, CountedWindow, TrafficScenario, requests_of
from bench.routing.sim.timing import Timing, timing_of
from bench.routing.sim.worker import WorkerFacts
from bench.routing.study.runs import CAPACITY_P99_S, CLAIRVOYANT, OURS, scenario_named
from bench.routing.study.search import highest

SEEDS = 5
WINDOW = CountedWindow(60.0, 60.0)
TOKENS = 128
SETTLE = 200
"""Rounds in which batch and stay settle to each other; they come closer by a tenth at least in
each.
"""


@dataclass(frozen=True, slots=True)
class Loads:
    """Per request: from below the CPU tier, and from it."""

    cold: float
    warm: float


def stay_s(rate_rps: float, workers: int, loads: Loads, timing: Timing) -> float | None:
    """How long a request is in its slot, at this rate of all workers together. None: the engines
    cannot keep up.
    """
    each = rate_rps / workers
    lost = each * (
        TOKENS / timing.prefill_tokens_per_s
        + loads.cold * timing.load_s
        + loads.warm * timing.activate_s
    )
    if lost >= 1.0:
        return None
    found = TOKENS * timing.step_s(1) / (1.0 - lost)
    for _ in range(SETTLE):
        running = each * found
        if running > timing.max_sequences:
            return None
        found = TOKENS * timing.step_s(math.ceil(running)) / (1.0 - lost)
    return found


def keeps(
    scenario: TrafficScenario,
    rate_rps: float,
    workers: int,
    loads: Loads,
    timing: Timing,
    seed: int,
) -> bool:
    """Whether p99 TTFT is within the promise."""
    facts = WorkerFacts("base")
    lasts_s = stay_s(rate_rps, workers, loads, timing)
    if lasts_s is None:
        return False
    requests = requests_of(scenario, rate_rps, seed, WINDOW)
    slot_uses = [(request.adapter or 0, request.at_s, lasts_s) for request in requests]
    starts = starts_of(slot_uses, workers * facts.slots)
    waits = sorted(
        start - at_s
        for (_, at_s, _), start in zip(slot_uses, starts, strict=True)
        if WINDOW.counts(at_s)
    )
    warm_s = timing.outside_s + timing.prefill_step_s(1, TOKENS)
    return percentile(waits, 0.99) + warm_s <= CAPACITY_P99_S


def capacity(
    scenario: TrafficScenario,
    workers: int,
    loads: Loads,
    timing: Timing,
    guess_rps: float,
    seeds: int = SEEDS,
) -> float:
    """Requests per second; the median over the seeds."""

    def of(seed: int) -> float:
        return highest(
            lambda rate: keeps(scenario, rate, workers, loads, timing, seed), guess_rps, stride=1.08
        )

    return statistics.median(of(seed) for seed in range(seeds))


def loads_of(document: Mapping[str, Any], policy: str) -> Loads:
    """As a report has them."""
    every = document["policies"][policy]["loads_per_request"]["median"]
    cold = document["more"][policy]["cold_loads_per_request"]["median"]
    return Loads(cold, every - cold)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench.routing.one_pool",
        description="What the fleet would reach if its slots were one worker's.",
    )
    parser.add_argument("report", type=Path, help="NAME.json of bench.study --report")
    flags = parser.parse_args(arguments)
    try:
        report = json.loads(flags.report.read_bytes())
        several: dict[str, Any] = {**report["scenarios"], **report["fleets"]}
    except (OSError, ValueError, KeyError) as exc:
        print(
            f"bench.routing.one_pool: {flags.report}: {exc!r}; it takes what "
            "`bench.routing --report` writes",
            file=sys.stderr,
        )
        return 2
    print(
        f"{'':<14}{OURS:>15}{'its loads, one pool':>21}"
        f"{'clairvoyant loads, one pool':>29}   requests/s"
    )
    for name, document in several.items():
        facts = document.get("scenario")
        ours = facts and document["policies"].get(OURS, {}).get("capacity_rps")
        if (
            not ours
            or facts["name"] not in SCENARIOS
            or SCENARIOS[facts["name"]].flash
            or document["policies"][OURS]["ttft_p99_s"] is None
        ):
            continue
        scenario = scenario_named(facts["name"], facts["adapters"])
        timing = timing_of(facts.get("loads", "vllm"))
        found = [
            capacity(scenario, facts["workers"], loads_of(document, of), timing, ours["median"])
            for of in (OURS, CLAIRVOYANT)
        ]
        print(f"{name:<14}{ours['median']:>15.0f}{found[0]:>21.0f}{found[1]:>29.0f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
