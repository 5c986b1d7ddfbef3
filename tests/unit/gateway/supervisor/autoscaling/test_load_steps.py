"""Load steps 1x -> 4x -> 1x -> 0 -> 1x in virtual time: when capacity comes, and what it costs
beside a schedule that knows the future.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from gateway.supervisor.autoscaling.autoscaler import Autoscaler
from gateway.supervisor.autoscaling.reports import LoadReport, ModelLoad, WorkerLoad
from gateway.supervisor.autoscaling.worker_set import (
    EndWorker,
    ScaledModel,
    StartWorker,
    WorkerSet,
)
from shared.config.deployment import AutoscalingConfig

TICK_S = 0.25
STEP_S = 900.0
START_S = 40.0
TARGET = 10
LOADS = (10, 40, 10, 0, 10)
"""Requests ongoing in each step."""
CONFIG = AutoscalingConfig(
    min_replicas=0,
    max_replicas=4,
    target_ongoing_requests=float(TARGET),
    upscale_delay_s=5.0,
    downscale_delay_s=60.0,
    look_back_period_s=10.0,
    metrics_interval_s=1.0,
)


@dataclass
class Steps:
    """The run: worker seconds, and for each time how many serve."""

    worker_s: float = 0.0
    serving: list[tuple[float, int]] = field(default_factory=list)
    cut: int = 0


def run() -> Steps:
    """Requests stay at their worker until it is retired, then the others take them (they move)."""
    workers = WorkerSet({"m": ScaledModel(Autoscaler("m", CONFIG, 1, 256), 0)}, (), 600.0)
    ready_at: dict[str, float] = {}
    found = Steps()
    for tick in range(int(len(LOADS) * STEP_S / TICK_S)):
        now = tick * TICK_S
        load = LOADS[int(now // STEP_S)]
        retiring = set(workers.status(now).models["m"].retiring)
        serving = sorted(n for n, at in ready_at.items() if at <= now and n not in retiring)
        share = math.ceil(load / len(serving)) if serving else 0
        seen = {
            name: WorkerLoad(serving=True, requests=min(share, max(0, load - n * share)), slots=16)
            for n, name in enumerate(serving)
        }
        seen |= {name: WorkerLoad(serving=False) for name in retiring}
        queued = 0 if serving else load
        workers.report(LoadReport("g0", {"m": ModelLoad(queued=queued, workers=seen)}), now)
        for action in workers.step(now):
            match action:
                case StartWorker(name):
                    ready_at[name] = now + START_S
                case EndWorker(name):
                    found.cut += seen[name].requests if name in seen else 0
                    del ready_at[name]
                    workers.gone(name)
        found.worker_s += len(ready_at) * TICK_S
        found.serving.append((now, len(serving)))
    return found


def clairvoyant_s() -> float:
    """Each worker that a step needs is there from START_S before it (it starts then) to its end."""
    needed = [math.ceil(load / TARGET) for load in LOADS]
    rises = sum(max(0, b - a) for a, b in zip([0, *needed], needed, strict=False))
    return sum(needed) * STEP_S + rises * START_S


def test_worker_seconds_are_within_15_percent_of_a_schedule_that_knows_the_future() -> None:
    found = run()
    assert found.cut == 0
    assert found.worker_s <= 1.15 * clairvoyant_s()


def first(found: Steps, after_s: float, count: int) -> float:
    return next(at for at, serving in found.serving if at >= after_s and serving == count) - after_s


def test_capacity_comes_after_the_delay_and_one_start_and_from_zero_after_one_start() -> None:
    found = run()
    # until the mean over the window asks for the last of them, the delay, and the start
    most_s = CONFIG.look_back_period_s + CONFIG.upscale_delay_s + START_S + 4 * TICK_S
    assert START_S <= first(found, STEP_S, 4) <= most_s
    assert first(found, 4 * STEP_S, 1) <= START_S + 2 * TICK_S
    assert first(found, 3 * STEP_S, 0) <= 60.0 + CONFIG.look_back_period_s + 4 * TICK_S
