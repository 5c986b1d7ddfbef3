"""The simulator against what was measured on GPUs."""

from __future__ import annotations

import statistics

import pytest

from bench.routing.calibration import ROWS, CalibrationRow, simulated
from bench.routing.sim.scenarios import SCENARIOS, CountedWindow, requests_of
from bench.routing.sim.world import simulate
from bench.routing.study.runs import Case

SHORT = [row for row in ROWS if row.streams in (1, 64)]


@pytest.mark.parametrize("row", SHORT, ids=[row.name for row in SHORT])
def test_streams_on_one_h200_are_as_fast_as_measured(row: CalibrationRow) -> None:
    found = simulated(row)
    assert found.p50_ms == pytest.approx(row.measured.p50_ms, rel=0.2)
    assert found.tokens_per_s == pytest.approx(row.measured.tokens_per_s, rel=0.2)


def test_arrivals_at_four_h100s_wait_about_as_long_as_measured() -> None:
    """It was twice as fast: the steps in which a prompt is read were taken for usual ones."""
    [row] = [row for row in ROWS if row.rate_rps == 42 and row.policy == "ray"]
    assert simulated(row).p50_ms == pytest.approx(row.measured.p50_ms, rel=0.3)


@pytest.mark.parametrize("rate_rps", [10.0, 60.0, 120.0])
def test_a_first_token_comes_about_when_the_policy_expects_it(rate_rps: float) -> None:
    window = CountedWindow(4.0, 6.0)
    case = Case("expected-ttft", SCENARIOS["default"], 1, 8, window, "own")
    outcomes = simulate(case.world, requests_of(case.scenario, rate_rps, 1, window)).outcomes
    ratios = [
        o.expected_s / (o.ttft_s - (o.sent_s - o.request.at_s))
        for o in outcomes
        if o.ttft_s is not None and window.counts(o.request.at_s)
    ]
    assert 0.8 <= statistics.median(ratios) <= 1.25
