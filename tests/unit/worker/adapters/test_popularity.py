"""Popularity: counts that fade."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.adapters.identity import AdapterRef
from worker.adapters import popularity as heat
from worker.adapters.popularity import FADE_S, FORGOTTEN, Popularity

A, B = AdapterRef("tiny", "a", "d"), AdapterRef("tiny", "b", "d")


def test_what_is_asked_for_often_is_warmer_than_what_was_asked_for_last() -> None:
    known = Popularity()
    for second in range(5):
        known.note(A, float(second))
    known.note(B, 10.0)
    assert known.of(A) > known.of(B)


def test_old_requests_fade_until_one_new_one_counts_more() -> None:
    known = Popularity()
    for _ in range(5):
        known.note(A, 0.0)
    known.note(B, 2 * FADE_S)  # e^2 > 5
    assert known.of(B) > known.of(A)


def test_an_adapter_that_nobody_asked_for_is_the_coldest() -> None:
    known = Popularity()
    known.note(A, 0.0)
    assert known.of(B) == -math.inf < known.of(A)


@given(st.lists(st.tuples(st.sampled_from([A, B]), st.floats(0, 1e6)), min_size=1, max_size=50))
def test_the_order_is_that_of_the_faded_counts_however_late_it_is(
    requests: list[tuple[AdapterRef, float]],
) -> None:
    known = Popularity()
    for adapter, at in sorted(requests, key=lambda request: request[1]):
        known.note(adapter, at)
    last = max(at for _, at in requests) / FADE_S
    for adapter in (A, B):
        times = [at / FADE_S for who, at in requests if who is adapter]
        expected = (
            max(times) + math.log(sum(math.exp(t - max(times)) for t in times))
            if times
            else -math.inf
        )
        if expected < last - FORGOTTEN and known.of(adapter) == -math.inf:
            continue
        assert known.of(adapter) == pytest.approx(expected)


@pytest.mark.parametrize("per_s", [0.5, 3.0, 100.0])
def test_the_rate_is_that_of_requests_that_keep_coming_and_none_a_while_after_the_last(
    per_s: float,
) -> None:
    known, began = Popularity(10.0), 1e6  # a machine that has been up for days
    count = int(60 * per_s)
    for n in range(count):
        known.note(A, began + n / per_s)
    end = began + (count - 1) / per_s
    assert known.per_s(A, end) == pytest.approx(per_s, rel=0.15)
    assert known.per_s(A, end + 100.0) < per_s / 1000
    assert known.per_s(B, end) == 0.0


def test_what_has_faded_to_nothing_is_forgotten_and_the_rest_is_not() -> None:
    known = Popularity()
    for _ in range(5):
        known.note(A, 0.0)
    known.note(B, FORGOTTEN * FADE_S)
    assert known.of(A) > -math.inf, "five requests take longer than one"
    known.note(B, (FORGOTTEN + math.log(5.1)) * FADE_S)
    assert known.of(A) == -math.inf < known.of(B)


def test_it_remembers_a_bounded_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heat, "MAX_KNOWN", 2)
    known = Popularity()
    for n in range(4):
        known.note(AdapterRef("tiny", f"a{n}", "d"), float(n))
    assert [known.of(AdapterRef("tiny", f"a{n}", "d")) > -math.inf for n in range(4)] == [
        False,
        False,
        True,
        True,
    ]
