"""The decision is Ray's: its golden vectors, its acceptance list, and random load traces against a
transcription of its formulas in exact numbers.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from fractions import Fraction
from typing import Any

import pytest

from gateway.supervisor.autoscaling.autoscaler import Autoscaler
from gateway.supervisor.autoscaling.decision import (
    PendingChange,
    ScalingDecision,
    ScalingRules,
    decide,
)
from gateway.supervisor.autoscaling.load_window import aggregate
from gateway.supervisor.autoscaling.reports import ModelLoad, WorkerLoad
from shared.config.deployment import AutoscalingConfig
from tests.unit.gateway.supervisor.autoscaling.ray_formulas import RayDeployment, Series, measured

TRACES = int(os.environ.get("AUTOSCALING_TRACES", "1000"))
TICKS = 25
PEAKS = (0, 0, 1, 4, 12)
"""The most requests of one series, until the load changes."""
LOOK_BACKS_MS = (1_995, 9_995, 29_995)
"""Between two ticks of 10 ms, so that floats and whole numbers drop the same points."""

R1 = [(0.2, 5.0), (0.8, 7.0), (1.5, 6.0)]
R2 = [(0.1, 3.0), (0.9, 4.0), (1.4, 8.0)]
Q = [(0.3, 2.0), (1.0, 3.0)]


def config(**more: Any) -> AutoscalingConfig:
    return AutoscalingConfig(
        **{"min_replicas": 0, "max_replicas": 100, "bottlenecks": None, **more}
    )


def rules(
    up: float = 1.0, down: float = 1.0, delays: tuple[float, float, float] = (0, 0, 0)
) -> ScalingRules:
    return ScalingRules(0, 1000, *delays, up, down)


def load(queued: int = 0, **requests: int) -> ModelLoad:
    workers = {name: WorkerLoad(serving=True, requests=n) for name, n in requests.items()}
    return ModelLoad(queued=queued, workers=workers)


@pytest.mark.parametrize(("how", "value"), [("mean", 13.764705882), ("max", 18), ("min", 10)])
def test_three_series_merge_into_rays_golden_numbers(how: Any, value: float) -> None:
    assert aggregate([R1, R2, Q], how, 2.0) == pytest.approx(value)


def test_times_of_several_series_are_rounded_to_10_ms_and_a_lone_one_is_taken_as_it_is() -> None:
    lone = [(0.004, 2.0), (1.004, 4.0)]
    assert aggregate([lone], "mean", 2.004) == pytest.approx(3.0)
    assert aggregate([lone, [(0.0, 0.0)]], "mean", 2.004) == pytest.approx(
        (2 * 0.996 + 4 * 1.004) / 2
    )


def test_no_series_is_no_load() -> None:
    assert aggregate([], "mean", 1.0) == aggregate([[]], "max", 1.0) == 0.0


@pytest.mark.parametrize(
    ("running", "wanted", "ongoing", "up", "down", "target", "expected"),
    [
        (1, 1, 5, 1, 1, 2, 3),
        (1, 1, 4, 1, 1, 2, 2),
        (4, 4, 0, 1, 1, 2, 1),
        (1, 1, 0, 1, 1, 2, 0),
        (0, 0, 0, 1, 1, 2, 0),
        (0, 0, 1, 1, 1, 2, 1),
        (2, 2, 12, 2, 1, 2, 10),
        (10, 10, 18, 1, 0.3, 2, 9),
        (2, 5, 4, 1, 1, 2, 2),
        (1, 1, 500, 1, 1, 1e9, 1),
    ],
)
def test_rays_golden_decisions(
    running: int,
    wanted: int,
    ongoing: float,
    up: float,
    down: float,
    target: float,
    expected: int,
) -> None:
    decision, _ = decide(
        rules(up, down),
        PendingChange(),
        0.0,
        running=running,
        wanted=wanted,
        ongoing=ongoing,
        target_ongoing=target,
    )
    assert decision.wanted == expected


def test_a_steady_load_at_its_target_is_never_one_worker_more_by_rounding() -> None:
    for tenths in range(1, 2000):
        now = 1e5 + tenths / 10
        points = [(now - 0.1 * n, 3.0) for n in range(20, -1, -1)]
        mean = aggregate([points, [(now - 1.9, 3.0)]], "mean", now + 0.05)
        decision, _ = decide(
            rules(), PendingChange(), now, running=3, wanted=3, ongoing=mean, target_ongoing=2.0
        )
        assert decision.recommended == 3


class Run:
    """One autoscaler, a tick every `tick_s`, and workers that serve at once unless told."""

    def __init__(self, tick_s: float = 0.1, start: int = 1, **more: Any) -> None:
        self.scaler = Autoscaler("m", config(**more), start, 100)
        self.now, self.tick_s = 1000.0, tick_s
        self.began = self.now
        self.history: list[tuple[float, int]] = []
        self.last: ScalingDecision | None = None

    def play(self, seconds: float, ongoing: int) -> Run:
        """Every request runs on the first worker, or waits if there is none."""
        for _ in range(round(seconds / self.tick_s)):
            names = [f"w{n}" for n in range(self.scaler.wanted)]
            rest = dict.fromkeys(names, 0)
            if names:
                rest[names[0]] = ongoing
            self.scaler.report("g0", load(0 if names else ongoing, **rest), self.now)
            before = self.scaler.wanted
            self.last = self.scaler.decide(self.now, names)
            if self.scaler.wanted != before:
                self.history.append((round(self.now - self.began, 1), self.scaler.wanted))
            self.now += self.tick_s
        return self


QUICK = {"look_back_period_s": 0.05, "metrics_interval_s": 0.01, "target_ongoing_requests": 2.0}


def test_more_load_is_acted_on_after_the_delay_and_one_equal_tick_begins_it_anew() -> None:
    assert Run(**QUICK).play(31, 6).history == [(30.0, 3)]
    broken = Run(**QUICK).play(20, 6).play(0.1, 2).play(31, 6)
    assert broken.history == [(50.1, 3)]


def test_the_recommendation_that_counts_is_that_of_the_moment_the_delay_ends() -> None:
    assert Run(**QUICK).play(15, 6).play(16, 10).history == [(30.0, 5)]


def test_a_hundred_requests_reach_the_most_workers_in_one_step() -> None:
    assert Run(**{**QUICK, "max_replicas": 8}).play(31, 100).history == [(30.0, 8)]


def test_a_burst_shorter_than_the_delay_changes_nothing() -> None:
    assert Run(**QUICK).play(29, 100).play(60, 2).history == []


@pytest.mark.parametrize(("to_zero", "at"), [(None, 1201.0), (60.0, 661.0)])
def test_no_load_leads_to_one_worker_and_then_to_none(to_zero: float | None, at: float) -> None:
    run = Run(1.0, **QUICK, downscale_to_zero_delay_s=to_zero, initial_replicas=4, start=4)
    assert run.play(1300, 0).history == [(600.0, 1), (at, 0)]


def test_min_replicas_keeps_the_last_worker() -> None:
    run = Run(1.0, **QUICK, min_replicas=1, initial_replicas=4, start=4)
    assert run.play(1300, 0).history == [(600.0, 1)]


def test_a_request_for_a_model_without_workers_starts_one_at_once() -> None:
    run = Run(**QUICK, initial_replicas=0, start=0)
    run.play(5, 0)
    assert run.history == []
    assert run.play(0.1, 1).history == [(5.0, 1)]


def test_what_waits_counts_as_much_as_what_runs() -> None:
    scaler = Autoscaler("m", config(**{**QUICK, "target_ongoing_requests": 1.0}), 1, 1)
    for tick in range(400):
        scaler.report("g0", load(queued=2, w0=1), tick / 10)
        scaler.decide(tick / 10, ["w0"])
    assert scaler.wanted == 3


def test_the_mean_of_a_sawtooth_is_its_middle_and_the_maximum_its_tip() -> None:
    wanted = {}
    for how in ("mean", "max", "min"):
        scaler = Autoscaler(
            "m",
            config(target_ongoing_requests=1.0, upscale_delay_s=0.0, aggregation_function=how),
            1,
            1,
        )
        for tick in range(100):
            scaler.report("g0", load(w0=1 + tick % 8), tick * 0.5)
        decision = scaler.decide(50.0, ["w0"])
        wanted[how] = decision.recommended
    assert wanted == {"mean": 5, "max": 8, "min": 1}


def test_a_process_that_ended_leaves_no_phantom_load() -> None:
    scaler = Autoscaler("m", config(target_ongoing_requests=1.0, upscale_delay_s=0.0), 1, 1)
    scaler.report("g0", load(w0=1), 0.0)
    scaler.report("g1", load(w0=9), 0.0)
    assert scaler.decide(1.0, ["w0"]).ongoing == 10
    scaler.forget("g1")
    scaler.report("g0", load(w0=1), 2.0)
    assert scaler.decide(2.0, ["w0"]).ongoing == 1


def test_a_process_that_is_silent_is_forgotten_after_two_intervals_but_not_before_10_s() -> None:
    for interval_s, until in ((10.0, 20.0), (1.0, 10.0)):
        scaler = Autoscaler("m", config(metrics_interval_s=interval_s), 1, 1)
        scaler.report("g1", load(w0=9), 0.0)
        assert scaler.decide(until - 0.01, ["w0"]).ongoing == 9
        assert scaler.decide(until, ["w0"]).ongoing == 0


def test_a_worker_that_left_leaves_no_load() -> None:
    scaler = Autoscaler("m", config(), 2, 1)
    scaler.report("g0", load(w0=1, w1=5), 0.0)
    assert scaler.decide(1.0, ["w0", "w1"]).ongoing == 6
    assert scaler.decide(1.1, ["w0"]).ongoing == 1


def test_half_an_hour_of_a_steady_load_changes_nothing_after_the_first_step() -> None:
    rng = random.Random(1)
    run = Run(1.0, target_ongoing_requests=2.0)
    for _ in range(1800):
        run.play(1.0, 7 + rng.choice((-1, 0, 0, 0, 1)))
    assert [wanted for _, wanted in run.history] == [4]


def test_a_load_that_swings_around_the_target_changes_the_count_once_per_downscale_delay() -> None:
    for half_period_s in (20, 100, 590):
        run = Run(1.0, target_ongoing_requests=2.0)
        for n in range(3600 // half_period_s):
            run.play(half_period_s, 8 + (1 if n % 2 else -1))
        downs = [
            at
            for (at, now), (_, was) in zip(run.history[1:], run.history, strict=False)
            if now < was
        ]
        assert not downs and len(run.history) <= 2, (half_period_s, run.history)


def test_a_decision_says_what_it_counted_and_what_holds_it_back() -> None:
    run = Run(**QUICK).play(10, 9)
    assert run.last is not None
    assert (run.last.recommended, run.last.cause, run.last.held_by) == (
        5,
        "requests",
        "upscale_delay_s",
    )
    assert run.last.held_s == pytest.approx(20.1)
    assert run.last.reason == (
        "9 requests ongoing, target 2 per worker: 5 recommended because of requests, held back by "
        "upscale_delay_s for 20.1 s"
    )
    capped = Run(**{**QUICK, "max_replicas": 2}).play(31, 9).play(5, 9).last
    assert capped is not None and (capped.bounded_by, capped.held_by) == ("max_replicas", "")
    assert capped.reason.endswith("5 recommended because of requests, bounded by max_replicas")


# ---- random traces -------------------------------------------------------------------------------


def random_trace(seed: int, met: Counter[str]) -> None:
    """One random config and load. `met` counts what happened, so that no rule stays untried."""
    rng = random.Random(seed)
    how = rng.choice(("mean", "mean", "max", "min"))
    look_back_ms = rng.choice(LOOK_BACKS_MS)
    least, most = sorted((rng.choice((0, 0, 1, 3)), rng.choice((1, 4, 12, 50))))
    target = Fraction(rng.choice(("0.5", "1", "2", "2.5", "3", "7")))
    up_delay, down_delay = (100 * rng.randint(0, rng.choice((0, 50, 300))) for _ in "ab")
    zero_delay = rng.choice((None, 100 * rng.randint(0, 50)))
    up, down = (Fraction(rng.choice(("1", "1", "0.3", "0.5", "2", "1.7"))) for _ in "ab")
    scaler = Autoscaler(
        "m",
        AutoscalingConfig(
            min_replicas=least,
            max_replicas=most,
            target_ongoing_requests=float(target),
            upscale_delay_s=up_delay / 1000,
            downscale_delay_s=down_delay / 1000,
            downscale_to_zero_delay_s=None if zero_delay is None else zero_delay / 1000,
            upscaling_factor=float(up),
            downscaling_factor=float(down),
            look_back_period_s=look_back_ms / 1000,
            aggregation_function=how,
            bottlenecks=None,
        ),
        start := rng.randint(0, 12),
        1,
    )
    ray = RayDeployment(least, most, target, up_delay, down_delay, zero_delay, up, down)
    wanted = max(least, min(most, start))
    series: dict[tuple[str, str], Series] = {}
    heard: dict[str, int] = {}
    now_ms = 1_000_000
    running = rng.randint(0, wanted)
    peak = rng.choice(PEAKS)
    for _ in range(TICKS):
        now_ms += 10 * rng.choice((10, 50, 100, 600, 1000))
        now = now_ms / 1000
        if rng.random() < 0.2:
            peak = rng.choice(PEAKS)
        if rng.random() < 0.5:
            running = min(wanted, running + rng.randint(0, 3)) if running <= wanted else wanted
        names = [f"w{n}" for n in range(running)]
        for process in rng.sample(("g0", "g1", "g2"), rng.randint(1, 3)):
            known = names[: rng.randint(0, len(names))] if rng.random() < 0.1 else names
            values = {name: rng.randint(0, peak) for name in known}
            queued = rng.randint(0, peak) if rng.random() < 0.5 else 0
            scaler.report(process, load(queued, **values), now)
            heard[process] = now_ms
            for key in [k for k in series if k[0] == process and k[1] not in {"", *values}]:
                del series[key]
            for name, value in {"": queued, **values}.items():
                points = series.setdefault((process, name), [])
                points.append((now_ms, value))
                while points[0][0] <= now_ms - look_back_ms:
                    points.pop(0)
        if rng.random() < 0.05:
            scaler.forget("g1")
            series = {key: s for key, s in series.items() if key[0] != "g1"}
        now_ms += 10 * rng.choice((0, 1, 10, 37))
        now = now_ms / 1000
        silent = {process for process, at in heard.items() if now_ms - at >= 20_000}
        series = {key: s for key, s in series.items() if key[0] not in silent}
        counted = [s for (_, name), s in series.items() if name == "" or name in names]
        total = measured(counted, how, now_ms)
        decision = scaler.decide(now, names)
        before, wanted = wanted, ray.tick(running, wanted, total, now_ms)
        assert abs(decision.ongoing - float(total)) < 1e-9, seed
        assert decision.wanted == wanted, (seed, decision)
        met.update((how, decision.held_by, decision.bounded_by, f"look back {look_back_ms}"))
        met["up"] += wanted > before
        met["down"] += wanted < before
        met["to zero"] += before > 0 == wanted
        met["from zero"] += before == 0 < wanted
        met["idle at zero"] += before == wanted == 0
        met["a factor changed it"] += decision.recommended != -(-total // target)


def test_random_load_traces_are_decided_as_the_formulas_say() -> None:
    met: Counter[str] = Counter()
    for seed in range(TRACES):
        random_trace(seed, met)
    rules_met = {
        *("mean", "max", "min", "up", "down", "to zero", "from zero", "idle at zero"),
        *("upscale_delay_s", "downscale_delay_s", "downscale_to_zero_delay_s"),
        *("min_replicas", "max_replicas", "a factor changed it"),
        *(f"look back {ms}" for ms in LOOK_BACKS_MS),
    }
    assert all(met[rule] > TRACES // 50 for rule in rules_met), met
    print(f"\n{TRACES} traces of {TICKS} ticks are equal; {dict(sorted(met.items()))}")
