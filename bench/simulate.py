"""Shell. `python -m bench.simulate --events wave`: workers that come and go with a day's load, in
virtual time, ours beside Ray's rule.

    python -m bench.simulate --events wave --out bench/results/wave

The gateway's dispatcher, the supervisor's decision and its worker set, and the workers' residency
run as they are; engines, sockets and clocks are simulated. The day is as long as `--day-s`, and all
delays are as much shorter. 1,000 adapters are asked for by Zipf's law, at a rate that swings like a
sine between `--low` and `--high` requests per second.

Each way to scale has several targets, from cheap to dear. The cheapest one that keeps the 99th
percentile of the time to the first token is its price: seconds of all workers together. It is found
by halving, as a dearer target never answers later. Each seed is another day.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import math
import random
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.load.workload import Fixed, PlannedRequest, Poisson, Workload, Zipf, requests
from bench.routing.sim.production import loader_of
from bench.routing.sim.timing import timing_of
from bench.routing.sim.world import Simulation, World
from gateway.supervisor.autoscaling.autoscaler import Autoscaler
from gateway.supervisor.autoscaling.reports import LoadReport
from gateway.supervisor.autoscaling.worker_set import (
    EndWorker,
    ScaledModel,
    StartWorker,
    WorkerSet,
)
from shared.config.deployment import AutoscalingConfig, BottleneckConfig
from shared.link import messages

BASE = "base"
ADAPTERS, TOKENS, SLOTS = 1000, Fixed(128), 16
STEP_S = 0.5
DRAIN_S = 120.0
MOST_WORKERS = 24


@dataclass(frozen=True, slots=True)
class Way:
    """One way to scale and to route. `targets` go from cheap to dear; `slots` is the share of slots
    that adapters in use may fill (None: they do not count).
    """

    name: str
    policy: str
    warm_s: float
    settings: tuple[tuple[float, float | None], ...]
    """(requests per worker, slots)."""


RAYS = tuple((float(target), None) for target in (64, 32, 24, 20, 16, 14, 12, 10, 8, 6))
WAYS = (
    Way(
        "ours",
        "expected-ttft",
        2.0,
        tuple((64.0, slots) for slots in (1.0, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)),
    ),
    Way("Ray's scaling, our routing", "expected-ttft", 0.0, RAYS),
    Way("Ray's scaling and routing", "ray-strict", 0.0, RAYS),
)


@dataclass(slots=True)
class Day:
    """What became of one day. `points` are (time, requests ongoing, wanted, present)."""

    gpu_s: float = 0.0
    ttft_p99_s: float = 0.0
    failed: int = 0
    requests: int = 0
    changes: int = 0
    points: list[tuple[float, float, int, int]] = field(default_factory=list)


class ScaledSimulation(Simulation):
    """A simulation whose workers the production worker set starts and ends."""

    def __init__(self, world: World, planned: list[PlannedRequest], workers: WorkerSet) -> None:
        super().__init__(world, planned)
        self._set, self.day = workers, Day()
        self._by_name: dict[str, Any] = {}
        self._starting: set[str] = set()
        self._start_s = 0.0
        self._wanted = 0

    def begin_with(self, start_s: float) -> None:
        self._start_s = start_s
        self.begin()
        self.agenda.after(0.0, self._scale)

    def _scale(self) -> None:
        now, day = self.agenda.now, self.day
        loads = self.dispatcher.loads([BASE])
        self._set.report(LoadReport("g0", loads), now)
        for action in self._set.step(now):
            match action:
                case StartWorker(name):
                    self._starting.add(name)
                    delay_s = self._start_s if now else 0.0
                    self.agenda.after(delay_s, self._serve, name)
                case EndWorker(name):
                    self._starting.discard(name)
                    worker = self._by_name.pop(name, None)
                    if worker is not None:
                        worker.die()
                    self._set.gone(name)
        status = self._set.status(now)
        self.dispatcher.on_scaling(status.models)
        model = status.models[BASE]
        present = len(self._by_name) + len(self._starting)
        day.gpu_s += present * STEP_S
        day.changes += model.wanted != self._wanted
        self._wanted = model.wanted
        day.points.append((now, float(model.ongoing), model.wanted, present))
        self.agenda.after(STEP_S, self._scale)

    def _serve(self, name: str) -> None:
        if name not in self._starting:
            return  # it was told to leave before it served
        self._starting.discard(name)
        before = len(self.workers)
        self._join(1)
        worker = self.workers[before]
        # the supervisor's names come again, each time as another life
        del self._wires.workers[worker.peer]
        worker.id, worker.epoch = name, before + 1
        worker.peer = messages.identity(name, worker.epoch)
        self._wires.workers[worker.peer] = worker
        self._by_name[name] = worker


def arrivals(flags: argparse.Namespace) -> list[PlannedRequest]:
    """A day's requests: those of the peak, thinned out by a sine that begins and ends low."""
    load = Workload(Poisson(flags.high), Zipf(1.0), ADAPTERS, TOKENS, TOKENS, flags.seed)
    rng = random.Random(f"{flags.seed}/wave")

    def thinned() -> Iterator[PlannedRequest]:
        for request in requests(load):
            if request.at_s >= flags.day_s:
                return
            share = (1 - math.cos(2 * math.pi * request.at_s / flags.day_s)) / 2
            if rng.random() * flags.high < flags.low + share * (flags.high - flags.low):
                yield request

    return list(thinned())


def live(way: Way, setting: tuple[float, float | None], flags: argparse.Namespace) -> Day:
    """One day, scaled this way."""
    target, slots = setting
    config = AutoscalingConfig(
        min_replicas=1,
        max_replicas=MOST_WORKERS,
        initial_replicas=2,
        target_ongoing_requests=target,
        upscale_delay_s=flags.day_s / 200,
        downscale_delay_s=flags.day_s / 30,
        look_back_period_s=flags.day_s / 200,
        metrics_interval_s=0.5,
        bottlenecks=None if slots is None else BottleneckConfig(slots=slots),
    )
    scaler = Autoscaler(BASE, config, 2, 256)
    workers = WorkerSet({BASE: ScaledModel(scaler, 0)}, (), DRAIN_S, way.warm_s)
    timing = timing_of(loader_of(way.policy, "own"))
    world = World(way.policy, 0, ADAPTERS, flags.seed, timing)
    sim = ScaledSimulation(world, arrivals(flags), workers)
    sim.begin_with(flags.start_s)
    sim.agenda.run(sim._going)
    outcomes = sim._run.outcomes
    times_s = sorted(o.ttft_s for o in outcomes if o.ttft_s is not None)
    day = sim.day
    day.requests, day.failed = len(outcomes), sum(o.failed is not None for o in outcomes)
    day.ttft_p99_s = times_s[math.ceil(0.99 * len(times_s)) - 1]
    return day


def cheapest(way: Way, flags: argparse.Namespace) -> Day | None:
    """The day of the cheapest setting that keeps the goal. None: not even the dearest does."""
    low, high, best = 0, len(way.settings), None
    while low < high:
        middle = (low + high) // 2
        setting = way.settings[middle]
        day = live(way, setting, flags)
        slots = "-" if setting[1] is None else f"{setting[1]:g}"
        print(
            f"| {flags.seed} | {way.name} | {setting[0]:g} | {slots} | {day.gpu_s:.0f} "
            f"| {1e3 * day.ttft_p99_s:.0f} ms | {day.failed} | {day.changes} |",
            flush=True,
        )
        if day.ttft_p99_s <= flags.goal_s:
            high, best = middle, day
        else:
            low = middle + 1
    return best


def wave(flags: argparse.Namespace) -> int:
    print(
        "| seed | way | requests per worker | slots | worker seconds | p99 TTFT | failed ", end=""
    )
    print("| changes |\n|---|---|---|---|---|---|---|---|")
    ratios: dict[str, list[float]] = {way.name: [] for way in WAYS[1:]}
    for seed in map(int, flags.seeds.split(",")):
        flags.seed = seed
        days = {way.name: day for way in WAYS if (day := cheapest(way, flags)) is not None}
        ours = days.get(WAYS[0].name)
        for name, found in ratios.items():
            if ours is not None and name in days:
                found.append(ours.gpu_s / days[name].gpu_s)
        if flags.out is not None:
            _write(flags.out.with_name(f"{flags.out.name}-{seed}"), days)
    for name, found in ratios.items():
        if found:
            each = ", ".join(f"{ratio:.2f}" for ratio in found)
            print(f"\nours / {name}: {statistics.mean(found):.2f} of the worker seconds ({each})")
    return 0


def _write(out: Path, days: dict[str, Day]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    found = {
        name: {"gpu_s": day.gpu_s, "ttft_p99_s": day.ttft_p99_s, "points": day.points}
        for name, day in days.items()
    }
    out.with_suffix(".json").write_text(json.dumps(found))
    if importlib.util.find_spec("matplotlib") is None:
        print("no picture: matplotlib is not installed", file=sys.stderr)
        return
    _plot(days, out.with_suffix(".png"))


def _plot(days: dict[str, Day], path: Path) -> None:
    """Load, wanted and present over the day, one panel for each way, all to the same scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        len(days), 1, sharex=True, sharey=True, figsize=(9, 2.4 * len(days)), squeeze=False
    )
    top = 1 + max(point[3] for day in days.values() for point in day.points)
    for (panel,), (name, day) in zip(panels, days.items(), strict=True):
        at, ongoing, wanted, present = zip(*day.points, strict=True)
        other = panel.twinx()
        (load,) = other.plot(at, ongoing, color="#9ecae1", linewidth=1)
        other.set_ylabel("requests ongoing")
        other.set_ylim(0, 150)
        (green,) = panel.plot(at, present, drawstyle="steps-post", color="#74c476", linewidth=4)
        (red,) = panel.plot(at, wanted, drawstyle="steps-post", color="#e6550d", linewidth=1)
        panel.set_ylabel("workers")
        panel.set_ylim(0, top)
        panel.set_zorder(other.get_zorder() + 1)
        panel.patch.set_visible(False)
        panel.legend(
            [red, green, load], ["wanted", "present", "requests ongoing"], loc="upper left"
        )
        panel.set_title(
            f"{name}: {day.gpu_s:.0f} worker seconds, p99 {1e3 * day.ttft_p99_s:.0f} ms"
        )
    panels[-1][0].set_xlabel("seconds of the day")
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.simulate")
    parser.add_argument("--events", choices=["wave"], required=True)
    parser.add_argument("--day-s", type=float, default=600.0)
    parser.add_argument("--low", type=float, default=5.0, help="requests/s at night")
    parser.add_argument("--high", type=float, default=60.0, help="requests/s at noon")
    parser.add_argument("--start-s", type=float, default=5.0, help="of a worker")
    parser.add_argument("--goal-s", type=float, default=0.5, help="p99 of the time to first token")
    parser.add_argument("--seeds", default="1", help="one day for each, separated by commas")
    parser.add_argument("--out", type=Path)
    logging.disable(logging.CRITICAL)  # workers are lost and found all day long
    return wave(parser.parse_args())


if __name__ == "__main__":
    raise SystemExit(main())
