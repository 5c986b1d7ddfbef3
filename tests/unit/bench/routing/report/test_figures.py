"""From runs to figures and capacities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.routing.report.figures import fair_shares, jain, spread
from bench.routing.sim.scenarios import SCENARIOS, CountedWindow
from bench.routing.sim.world import World
from bench.routing.study.search import highest, keeps

SHORT = CountedWindow(1.0, 3.0)


def _here(job: Callable[..., Any], arguments: Any) -> list[Any]:
    return [job(*each) for each in arguments]


@given(st.floats(1.0, 2000.0), st.floats(1.0, 500.0), st.sampled_from([1.08, 1.3, 2.0]))
def test_bisection_finds_the_highest_rate_that_passes_wherever_it_starts(
    limit: float, guess: float, stride: float
) -> None:
    found = highest(lambda rate: rate <= limit * 1.0001, guess, stride=stride)
    assert limit / 1.0201 <= found <= limit * 1.0001, "rates have five digits"


def test_a_promise_that_no_rate_keeps_has_capacity_zero() -> None:
    assert highest(lambda rate: False, 50.0, stride=1.3) == 0.0


def test_a_rate_keeps_its_promise_below_the_capacity_and_breaks_it_far_above() -> None:
    world = World("round-robin", 2, 100, 0)
    assert keeps(world, SCENARIOS["fits"], 5.0, SHORT, 0.5)
    assert not keeps(world, SCENARIOS["fits"], 400.0, SHORT, 0.5)


@given(st.lists(st.floats(0.1, 100.0), min_size=1, max_size=20))
def test_jain_is_one_for_equals_and_never_below_one_over_n(values: list[float]) -> None:
    assert jain([3.0] * len(values)) == pytest.approx(1.0)
    assert 1 / len(values) - 1e-9 <= jain(values) <= 1 + 1e-9


def test_jain_of_one_who_gets_everything_is_one_over_n() -> None:
    assert jain([1.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)
    assert jain([]) == 1.0


def test_fair_shares_give_the_modest_what_they_want_and_the_rest_alike() -> None:
    assert fair_shares({1: 10.0, 2: 2.0, 3: 10.0}, 12.0) == {2: 2.0, 1: 5.0, 3: 5.0}
    assert fair_shares({1: 1.0, 2: 2.0}, 12.0) == {1: 1.0, 2: 2.0}


def test_a_spread_is_the_median_and_the_extremes() -> None:
    made = spread([3.0, 1.0, 2.0, 9.0])
    assert (made.median, made.min, made.max) == (2.5, 1.0, 9.0)
