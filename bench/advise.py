"""Shell. `python -m bench.advise`: the closed forms of `loraplex advise` beside the simulator.

The simulator runs the gateway's and the workers' own code in virtual time.

    python -m bench.advise --scenarios fits,default,hot,flat,lengths --loads 0.1,0.3

Each workload is seen once, by the first of `--sizes`. The closed forms know of it what a gateway
counts: which adapter each request asked for, how long it held its place, how long warm first tokens
and loads took. From that they tell what fleets of the other sizes would do, and each of these is
simulated too. Of the first size they know the times, so only the others are predictions.
"""

from __future__ import annotations

import argparse
import dataclasses
import math

from bench.routing.sim.scenarios import SCENARIOS, CountedWindow, requests_of
from bench.routing.sim.timing import timing_of
from bench.routing.sim.worker import WorkerFacts
from bench.routing.sim.world import SimRun, World, adapter_name, simulate
from gateway.advisor.advice import Expectation, FleetSize, expect
from gateway.advisor.traffic import Traffic
from shared.link.messages import Tier

TOKENS = 128


@dataclasses.dataclass(slots=True)
class Errors:
    """Of the predictions for one workload: misses in points, first tokens as shares of the
    simulator's.
    """

    misses: list[float] = dataclasses.field(default_factory=list)
    ttfts: list[float] = dataclasses.field(default_factory=list)
    overloaded_s: list[float] = dataclasses.field(default_factory=list)
    """The simulator's p99 where the formulas say that the fleet cannot keep up."""

    def row(self) -> str:
        points = f"{100 * min(self.misses):+.1f} to {100 * max(self.misses):+.1f}"
        shares = f"{min(self.ttfts):+.0%} to {max(self.ttfts):+.0%}" if self.ttfts else "-"
        late = ", ".join(f"{s:.1f} s" for s in self.overloaded_s) or "-"
        return f"{points} | {shares} | {late} |"


def main() -> int:
    flags = _parser().parse_args()
    sizes = [tuple(map(int, size.split("x"))) for size in flags.sizes.split(",")]
    print(
        "| workload | load | workers x slots | misses, simulator | formula | error "
        "| TTFT p99, simulator | formula | error |\n|---|---|---|---|---|---|---|---|---|"
    )
    found = {
        (scenario, load): _workload(scenario, load, sizes, flags)
        for scenario in flags.scenarios.split(",")
        for load in map(float, flags.loads.split(","))
    }
    print(
        "\n| workload | load | misses, points off | p99 of the first token off "
        "| p99 where it cannot keep up |\n|---|---|---|---|---|"
    )
    for (scenario, load), errors in found.items():
        print(f"| {SCENARIOS[scenario].what} | {load:g} | {errors.row()}")
    return 0


def _workload(
    scenario: str,
    load: float,
    sizes: list[tuple[int, ...]],
    flags: argparse.Namespace,
) -> Errors:
    """Prints one row for each size of the fleet. The errors are those of all but the first."""
    errors = Errors()
    timing, window = timing_of("own"), CountedWindow(flags.warm_up_s, flags.seconds)
    rate = load * sizes[0][0] * timing.most_requests_per_s(TOKENS, TOKENS)
    planned = requests_of(SCENARIOS[scenario], rate, flags.seed, window)
    load_s = timing.fetch_disk_s + timing.prepare_s + timing.load_s
    seen, fleet = Traffic(), FleetSize(0, 0, 0)
    for n, (workers, slots) in enumerate(sizes):
        facts = dataclasses.replace(WorkerFacts("base"), slots=slots)
        adapters = SCENARIOS[scenario].all_adapters
        run = simulate(World(flags.policy, workers, adapters, flags.seed, timing, facts), planned)
        first = not n
        if first:
            seen, fleet = traffic_of(run, window), FleetSize(workers, slots, facts.capacity, load_s)
        expected = expect(seen, fleet, FleetSize(workers, slots, facts.capacity))
        misses, ttft_s = _seen(run, window)
        if not first:
            errors.misses.append(expected.miss_rate - misses)
            if expected.ttft_p99_s is None:
                errors.overloaded_s.append(ttft_s)
            else:
                errors.ttfts.append(expected.ttft_p99_s / ttft_s - 1)
        where = f"| {scenario} | {load:g} | {workers} x {slots}{' (seen)' if first else ''} "
        print(where + _shown(misses, ttft_s, expected), flush=True)
    return errors


def traffic_of(run: SimRun, window: CountedWindow) -> Traffic:
    """What the gateway would have counted."""
    found = Traffic(window.duration_s)
    for outcome in run.outcomes:
        if outcome.ended_s is None or not window.counts(outcome.request.at_s):
            continue
        sent_s, adapter = outcome.sent_s, outcome.request.adapter
        ttft_s = outcome.ttft_s - (sent_s - outcome.request.at_s) if outcome.ttft_s else None
        found.add(
            None if adapter is None else adapter_name(adapter),
            outcome.ended_s - sent_s,
            ttft_s,
            None if outcome.tier is Tier.GPU else outcome.load_s,
            outcome.request.prompt_tokens,
            outcome.request.output_tokens,
        )
    return found


def _seen(run: SimRun, window: CountedWindow) -> tuple[float, float]:
    counted = [o for o in run.outcomes if window.counts(o.request.at_s) and o.ttft_s is not None]
    times_s = sorted(o.ttft_s for o in counted if o.ttft_s is not None)
    misses = sum(o.tier is not Tier.GPU for o in counted) / len(counted)
    return misses, times_s[math.ceil(0.99 * len(times_s)) - 1]


def _shown(misses: float, ttft_s: float, e: Expectation) -> str:
    told = (
        "cannot keep up | - |"
        if e.ttft_p99_s is None
        else f"{1e3 * e.ttft_p99_s:.0f} ms | {e.ttft_p99_s / ttft_s - 1:+.0%} |"
    )
    return (
        f"| {misses:.1%} | {e.miss_rate:.1%} | {100 * (e.miss_rate - misses):+.1f} points "
        f"| {1e3 * ttft_s:.0f} ms | {told}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.advise")
    parser.add_argument("--scenarios", default="fits,default,hot,flat,lengths")
    parser.add_argument("--sizes", default="4x16,4x8,4x32,6x16", help="workers x slots")
    parser.add_argument("--loads", default="0.1,0.3", help="of the most the first size completes")
    parser.add_argument("--policy", default="expected-ttft")
    parser.add_argument("--warm-up-s", type=float, default=100.0)
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--seed", type=int, default=1)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
