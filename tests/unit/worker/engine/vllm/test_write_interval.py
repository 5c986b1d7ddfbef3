"""How often streams are written to."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.engine.vllm.write_interval import BUSY_SHARE, WAIT_SHARE, WriteInterval


def gaps(pacing: WriteInterval, step_s: float, steps: int = 200) -> list[float]:
    """Seconds between the steps in which streams are written to."""
    now, last, found = 0.0, 0.0, []
    for _ in range(steps):
        now += step_s
        if pacing.flush:
            found.append(now - last)
            last = now
        pacing.stepped(now, step_s)
    return found[1:]


def pressed(most_s: float, looks: int = 20) -> WriteInterval:
    pacing = WriteInterval(most_s)
    for _ in range(looks):
        pacing.look(0.9, 0.0)
    return pacing


def test_without_pressure_every_token_is_sent_at_once() -> None:
    pacing = WriteInterval(0.05)
    for _ in range(100):
        pacing.look(BUSY_SHARE, WAIT_SHARE)
    assert gaps(pacing, 0.01) == pytest.approx([0.01] * 199)


@pytest.mark.parametrize(("busy", "wait"), [(0.9, 0.0), (0.1, 0.5)])
def test_a_front_end_that_fills_its_core_or_waits_for_one_sends_several_tokens_together(
    busy: float, wait: float
) -> None:
    pacing = WriteInterval(0.05)
    for _ in range(20):
        pacing.look(busy, wait)
    found = gaps(pacing, 0.01)
    assert min(found) > 0.035


def test_a_bound_of_zero_means_never() -> None:
    assert gaps(pressed(0.0), 0.01) == pytest.approx([0.01] * 199)


def test_it_begins_small_and_ends_when_the_pressure_does() -> None:
    pacing = WriteInterval(0.05)
    pacing.look(0.9, 0.0)
    assert 0 < pacing.gap_s < 0.02
    for _ in range(10):
        pacing.look(0.9, 0.0)
    assert pacing.gap_s == 0.05
    pacing.look(0.5, 0.0)  # less, but no calm
    assert pacing.gap_s == 0.05
    for _ in range(10):
        pacing.look(0.1, 0.01)
    assert pacing.gap_s == 0.0


@given(st.floats(0.001, 0.2), st.floats(0.01, 0.2))
def test_no_gap_is_longer_than_allowed_by_more_than_half_a_step_unless_a_single_step_is(
    step_s: float, most_s: float
) -> None:
    assert max(gaps(pressed(most_s), step_s)) <= max(step_s, most_s) + 0.5 * step_s + 1e-9


@given(st.lists(st.floats(0.001, 0.05), min_size=50, max_size=50))
def test_steps_of_any_length_never_hold_a_stream_back_for_long(steps_s: list[float]) -> None:
    pacing, now, last = pressed(0.04), 0.0, 0.0
    for step_s in steps_s:
        now += step_s
        if pacing.flush:
            assert now - last <= 0.04 + 2 * max(steps_s)
            last = now
        pacing.stepped(now, step_s)
    assert now - last <= 0.04 + 2 * max(steps_s)
