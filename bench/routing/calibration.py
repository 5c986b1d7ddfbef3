"""Shell. `python -m bench.routing.calibration`: the simulator beside what was measured on GPUs.

The rows are those of bench/results/gpu-8b.md (one H200, 2026-11-27) and of
bench/results/fleet-8b-4xh100-2026-11-27.md. The first ones are closed loops, as `bench.engine.gpu`
sends them: so many streams, four requests each, about 130 tokens in and 128 out. Those of four
H100s are Poisson arrivals.

The host of the H100s was slower: with the base model and 256 streams on one worker a token took
16.5 ms there, and 10.7 ms on the H200. All times of an engine are longer by as much. The policies
have changed since; `ray` has not.
"""

from __future__ import annotations

import logging
import random
import sys
from dataclasses import dataclass, replace

from bench.load.measure import percentile
from bench.load.workload import PlannedRequest, Zipf
from bench.routing.report.figures import ttft_s
from bench.routing.sim.scenarios import CountedWindow, TrafficScenario, requests_of
from bench.routing.sim.timing import PROMPT, Timing, timing_of
from bench.routing.sim.worker import WorkerFacts
from bench.routing.sim.world import SimOutcome, Simulation, World, simulate

OUTPUT = 128
PER_STREAM = 4
WARMED_S = 60.0
"""From here on every adapter is warm, and no request runs."""
H100_HOST = 16.5 / 10.7
H100_HOST_PLACES = 157
WARM_UP_S, COUNTED_S = 10.0, 30.0


@dataclass(frozen=True, slots=True)
class GpuFigures:
    """Milliseconds; `tokens_per_s` 0.0: not measured."""

    p50_ms: float
    p99_ms: float
    tokens_per_s: float = 0.0


@dataclass(frozen=True, slots=True)
class CalibrationRow:
    """`streams`: of a closed loop on one H200. `rate_rps`: of arrivals at four H100s."""

    name: str
    adapters: int
    measured: GpuFigures
    streams: int = 0
    rate_rps: float = 0.0
    policy: str = "expected-ttft"


ROWS = (
    CalibrationRow("16 adapters, 1 stream", 16, GpuFigures(20, 24, 165), 1),
    CalibrationRow("16 adapters, 64 streams", 16, GpuFigures(406, 517, 5160), 64),
    CalibrationRow("16 adapters, 256 streams", 16, GpuFigures(681, 1256, 10592), 256),
    CalibrationRow("4 H100s, 42/s", 500, GpuFigures(74, 315), 0, 42),
    CalibrationRow("4 H100s, 42/s, ray", 500, GpuFigures(73, 294), 0, 42, "ray"),
    CalibrationRow("4 H100s, 54/s", 500, GpuFigures(69, 511), 0, 54),
    CalibrationRow("4 H100s, 54/s, ray", 500, GpuFigures(111, 1687), 0, 54, "ray"),
)


class ClosedLoop(Simulation):
    """So many streams, each of which sends its next request when the one before has ended. All
    begin at WARMED_S. Before that, each adapter has had a request.
    """

    def __init__(self, world: World, streams: int) -> None:
        first = [_planned(n, 1.0 + n, n) for n in range(world.adapters)]
        super().__init__(world, first)
        rng, self._number, self._streams = random.Random(world.seed), len(first), streams
        self._left = [rng.randrange(world.adapters) for _ in range(PER_STREAM * max(streams, 2))]

    def begin(self) -> None:
        super().begin()
        for _ in range(self._streams):
            self.agenda.at(WARMED_S, self.request_ended)

    def _going(self) -> bool:
        return bool(self._left) or self.open > 0

    def request_ended(self) -> None:
        if self._left and self.agenda.now >= WARMED_S:
            planned = _planned(self._number, self.agenda.now, self._left.pop())
            self._number += 1
            self.agenda.after(0.0, self._arrive, planned)


def _planned(number: int, at_s: float, adapter: int) -> PlannedRequest:
    return PlannedRequest(number, at_s, adapter, None, PROMPT, OUTPUT)


def closed_loop(row: CalibrationRow) -> list[SimOutcome]:
    facts = WorkerFacts("base", capacity=512)
    world = World(row.policy, 1, row.adapters, 1, timing_of("own"), facts)
    outcomes = ClosedLoop(world, row.streams).run().outcomes
    return [o for o in outcomes if o.request.at_s >= WARMED_S]


def arrivals(row: CalibrationRow) -> list[SimOutcome]:
    window = CountedWindow(WARM_UP_S, COUNTED_S)
    facts = WorkerFacts("base", cpu_adapters=H100_HOST_PLACES)
    timing = slower(timing_of("own"), H100_HOST)
    world = World(row.policy, 4, row.adapters, 1, timing, facts)
    scenario = TrafficScenario("zipf", "", row.adapters, Zipf(1.0))
    outcomes = simulate(world, requests_of(scenario, row.rate_rps, 1, window)).outcomes
    return [o for o in outcomes if window.counts(o.request.at_s)]


def slower(timing: Timing, times: float) -> Timing:
    """All that the engine is busy with takes so many times as long."""
    return replace(
        timing,
        decode=tuple((n, seconds * times) for n, seconds in timing.decode),
        prefill_tokens_per_s=timing.prefill_tokens_per_s / times,
        mixed_s=timing.mixed_s * times,
        load_s=timing.load_s * times,
        prepare_s=timing.prepare_s * times,
    )


def simulated(row: CalibrationRow) -> GpuFigures:
    outcomes = closed_loop(row) if row.streams else arrivals(row)
    waits = sorted(1e3 * ttft_s(o) for o in outcomes)
    ends = [o.ended_s for o in outcomes if o.ended_s is not None]
    lasted_s = max(ends) - min(o.request.at_s for o in outcomes)
    rate = OUTPUT * len(ends) / lasted_s if row.streams else 0.0
    return GpuFigures(percentile(waits, 0.5), percentile(waits, 0.99), rate)


def main() -> int:
    logging.getLogger("loraplex").setLevel(logging.ERROR)
    print("| row | measured p50, p99 ms; tokens/s | simulated | ratios |\n|---|---|---|---|")
    for row in ROWS:
        found, told = simulated(row), row.measured
        pairs = [(found.p50_ms, told.p50_ms), (found.p99_ms, told.p99_ms)]
        if told.tokens_per_s:
            pairs.append((found.tokens_per_s, told.tokens_per_s))
        ours = "; ".join(f"{one:,.0f}" for one, _ in pairs)
        theirs = "; ".join(f"{other:,.0f}" for _, other in pairs)
        ratios = ", ".join(f"{one / other:.2f}" for one, other in pairs)
        print(f"| {row.name} | {theirs} | {ours} | {ratios} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
