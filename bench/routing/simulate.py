"""Shell. `python -m bench.routing.simulate`: routing policies compared in virtual time, with the
gateway's production code and simulated workers.

    python -m bench.routing.simulate --scenario default --seeds 10 --json default.json --plot default.png
    python -m bench.routing.simulate --scenario all --seeds 10 --policies ray,expected-ttft --json all.json --plot all.png
    python -m bench.routing.simulate --scenario default --grow adapters --seeds 10 --plot growth.png
    python -m bench.routing.simulate --scenario default --events loss --plot loss.png
    python -m bench.routing.simulate --scenario default --overload 1.25,1.5,2
    python -m bench.routing.simulate --scenario default --by-rank --rate 150 --loads own --warm-up 60

No sockets, no sleeping, no model: the gateway's dispatcher, fleet, policies and admission, the
worker's residency and slots, and the wire format between them run as they are; clocks, sockets and
engines are simulated, engines by a table measured on an H200 (bench/routing/sim/timing.py). The
same command gives the same figures. The whole study, in resumable parts on many cores: `python -m
bench.routing`. Exit status: 0; 2 for flags that make no sense.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import multiprocessing
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.routing.sim import plot, report, study
from bench.routing.sim.production import policies
from bench.routing.sim.scenarios import SCENARIOS, WORKERS, Window
from bench.routing.sim.study import CLAIRVOYANT, Case

DEFAULT_SEEDS = 10
WARM_UP_SHARE = 1 / 3
"""Of the measured time, before it."""


def main(arguments: Sequence[str] | None = None) -> int:
    flags = _parser().parse_args(arguments)
    command = [
        "python",
        "-m",
        "bench.routing.simulate",
        *(sys.argv[1:] if arguments is None else arguments),
    ]
    try:
        cases = _cases(flags)
    except ValueError as exc:
        print(f"bench.routing.simulate: {exc}", file=sys.stderr)
        return 2
    logging.getLogger("loraplex").setLevel(logging.ERROR)  # a lost worker is part of the experiment
    document: dict[str, Any] = {
        "schema": report.SCHEMA,
        "version": metadata.version("loraplex"),
        "command": command,
        "seeds": flags.seeds,
    }
    with multiprocessing.get_context("fork").Pool(flags.jobs, maxtasksperchild=None) as pool:
        document |= _answer(flags, cases, _spread_out(pool))
    if flags.json:
        Path(flags.json).write_text(json.dumps(document, indent=1) + "\n")
    if flags.plot:
        _plot(flags, document, shlex.join(command))
    return 0


def _answer(
    flags: argparse.Namespace, cases: dict[str, list[Case]], spread_out: study.SpreadOut
) -> dict[str, Any]:
    """Runs what was asked for and prints its tables as they are done."""
    first = next(iter(cases.values()))
    if flags.grow:
        grown = report.growth_document(
            study.grow(first, flags.grow, flags.seeds, flags.rate, spread_out)
        )
        print(report.growth_table(grown))
        return {"scenario": study.facts_of(first[0]), "growth": grown}
    if flags.by_rank:
        made = report.waits_document(
            flags.rate, study.who_waits(first, flags.seeds, flags.rate, spread_out)
        )
        print(report.waits_table(made))
        return {"scenario": study.facts_of(first[0]), "waits": made}
    if flags.events:
        rate = (
            flags.rate or study.compare(first, flags.seeds, None, True, False, spread_out).rate_rps
        )
        event = report.event_document(
            study.watch(first, flags.events, flags.seeds, rate, spread_out)
        )
        print(report.event_table(event))
        return {"scenario": study.facts_of(first[0]), "event": event}
    scenarios = {
        name: _compare(flags, of_policies, spread_out) for name, of_policies in cases.items()
    }
    return {"scenarios": scenarios} if flags.scenario == "all" else scenarios[flags.scenario]


def _compare(
    flags: argparse.Namespace, cases: list[Case], spread_out: study.SpreadOut
) -> dict[str, Any]:
    began = time.monotonic()
    scenario = cases[0].scenario
    bound = not flags.policies or CLAIRVOYANT in flags.policies
    made = study.compare(cases, flags.seeds, flags.rate, not flags.no_capacity, bound, spread_out)
    document = {"scenario": study.facts_of(cases[0]), **report.comparison_document(made)}
    print(report.comparison_table(scenario.name, scenario.what, document, flags.seeds))
    if flags.overload:
        found = (
            made.capacities
            if not flags.no_capacity
            else study.capacities(cases, flags.seeds, study.CAPACITY_P99_S, spread_out)
        )
        document["overload"] = report.overload_document(
            study.overload(cases, flags.overload, flags.seeds, found, spread_out)
        )
        print(report.overload_table(document["overload"]))
    print(f"({time.monotonic() - began:.0f} s)\n", flush=True)
    return document


def _cases(flags: argparse.Namespace) -> dict[str, list[Case]]:
    """One case per policy, by scenario. Raises: ValueError for a policy that does not exist."""
    names = [name for name in flags.policies or policies() if name != CLAIRVOYANT]
    unknown = set(names) - set(policies())
    if unknown or not names:
        raise ValueError(
            f"no policy {', '.join(sorted(unknown)) or 'given'}; there are "
            f"{', '.join([*policies(), CLAIRVOYANT])}"
        )
    if flags.by_rank and (not flags.rate or flags.plot or flags.scenario == "all"):
        raise ValueError("--by-rank takes one --scenario and a --rate, and draws no --plot")
    window = Window(
        flags.duration * WARM_UP_SHARE if flags.warm_up is None else flags.warm_up, flags.duration
    )
    return {
        scenario: [
            Case(
                name,
                study.scenario_named(scenario, flags.adapters),
                0,
                flags.workers,
                window,
                not flags.cold_disks,
                flags.loads,
            )
            for name in names
        ]
        for scenario in (SCENARIOS if flags.scenario == "all" else [flags.scenario])
    }


def _plot(flags: argparse.Namespace, document: dict[str, Any], command: str) -> None:
    if flags.grow:
        plot.plot_growth(
            document["growth"],
            flags.plot,
            f"Growth with {flags.grow}, {document['scenario']['name']}\n{command}",
        )
    elif flags.events:
        plot.plot_event(
            document["event"],
            flags.plot,
            f"Event: {flags.events}, {document['scenario']['name']}\n{command}",
        )
    else:
        several = document.get("scenarios") or {flags.scenario: document}
        facts = next(iter(several.values()))["scenario"]
        what = (
            f"{facts['workers']} workers of {facts['worker']['slots']} slots, medians of "
            f"{flags.seeds} seeds, whiskers: least and most"
        )
        if len(several) == 1:
            what = (
                f"{facts['name']}: {facts['what']}; {document['rate_rps']:.0f} requests/s; {what}"
            )
        plot.plot_comparison(several, flags.plot, f"{what}\n{command}")


def _spread_out(pool: Any) -> study.SpreadOut:
    def spread_out(job: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        return list(pool.imap(_run, [(job, each) for each in arguments], chunksize=1))

    return spread_out


def _run(task: tuple[Callable[..., Any], tuple[Any, ...]]) -> Any:
    """In a process of the pool. The collector stays off while a run's objects only grow."""
    job, arguments = task
    gc.disable()
    try:
        return job(*arguments)
    finally:
        gc.collect()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.routing.simulate",
        description="Routing policies compared in virtual time.",
    )
    add = parser.add_argument
    add("--scenario", choices=[*SCENARIOS, "all"], default="default")
    add("--seeds", type=_at_least_one, default=DEFAULT_SEEDS, help="runs per figure (%(default)s)")
    add(
        "--policies",
        type=lambda text: text.split(","),
        default=None,
        help=f"of {', '.join([*policies(), CLAIRVOYANT])} (all)",
    )
    add("--workers", type=_at_least_one, default=WORKERS)
    add("--adapters", type=_at_least_one, default=None, help="instead of the scenario's own number")
    add(
        "--rate",
        type=_positive,
        default=None,
        help="requests/s of the comparison (default: see rate_is in the output)",
    )
    add(
        "--duration",
        type=_positive,
        default=60.0,
        help="seconds of virtual time that count (%(default)s)",
    )
    add("--warm-up", type=float, default=None, help="seconds before them (a third of them)")
    add("--no-capacity", action="store_true", help="compare at one rate only")
    add(
        "--cold-disks",
        action="store_true",
        help="workers fetch each adapter from the store once, instead of having it in the "
        "disk cache",
    )
    add(
        "--loads",
        choices=["vllm", "own"],
        default="vllm",
        help="as vLLM loads adapters, or this project's workers do (%(default)s; "
        "bench/routing/sim/timing.py)",
    )
    add(
        "--grow",
        choices=list(study.GROWTH),
        help="figures as the number of adapters or of workers grows, instead",
    )
    add(
        "--events",
        choices=["scale", "loss"],
        help="how a quarter more or fewer workers is taken, instead",
    )
    add(
        "--by-rank",
        action="store_true",
        help="who waits at --rate, by the popularity of the adapter and with production's "
        "queue, instead",
    )
    add(
        "--overload",
        type=lambda text: [_positive(part) for part in text.split(",")],
        help="also offer so many times each capacity: 1.25,2",
    )
    add("--json", metavar="FILE")
    add("--plot", metavar="FILE")
    add(
        "--jobs",
        type=_at_least_one,
        default=min(2, multiprocessing.cpu_count()),
        help="processes (%(default)s)",
    )
    return parser


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError("must be above 0")
    return number


if __name__ == "__main__":
    sys.exit(main())
