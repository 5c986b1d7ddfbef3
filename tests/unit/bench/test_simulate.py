"""A short day in the simulator, scaled by the production worker set."""

from __future__ import annotations

import argparse

from bench.simulate import WAYS, arrivals, live

FLAGS = argparse.Namespace(day_s=30.0, low=1.0, high=12.0, start_s=1.0, goal_s=0.5, seed=3)


def test_a_day_begins_and_ends_low_and_has_its_peak_at_noon() -> None:
    times_s = [request.at_s for request in arrivals(FLAGS)]
    noon = sum(10 <= at < 20 for at in times_s)
    assert noon > 2 * sum(not 10 <= at < 20 for at in times_s) / 2
    assert times_s == sorted(times_s) and times_s[-1] < 30


def test_workers_come_and_go_with_the_day_and_no_request_fails() -> None:
    day = live(WAYS[0], (4.0, 1.0), FLAGS)
    assert day.failed == 0 and day.requests == len(arrivals(FLAGS))
    present = [point[3] for point in day.points]
    assert max(present) > 2 > present[-1] - 1
    assert day.gpu_s == sum(present) * 0.5


def test_the_same_day_is_lived_the_same_way_twice() -> None:
    first, second = (live(WAYS[1], (4.0, None), FLAGS) for _ in range(2))
    assert first.points == second.points and first.ttft_p99_s == second.ttft_p99_s
