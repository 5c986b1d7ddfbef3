"""Lives of workers that are over are remembered for a while, and no more of them than a bound."""

from __future__ import annotations

import pytest

from gateway.fleet import past_lives
from gateway.fleet.past_lives import FAILED_STARTS, PastLives

MOST = 3


def test_the_oldest_lives_are_forgotten_beyond_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(past_lives, "MOST_REMEMBERED", MOST)
    past = PastLives()
    for n in range(2 * MOST):
        past.end("w0", n, reported=True)
        past.held(f"w{n}", "tiny", (("pirate", "d1"),), at=0.0)
        for _ in range(FAILED_STARTS):
            past.failed_to_start(f"w{n}", f"base{n}", "no memory", at=0.0)
    known = range(MOST, 2 * MOST)
    assert [n for n in range(2 * MOST) if past.is_over("w0", n, replaced=True)] == [*known]
    assert [n for n in range(2 * MOST) if past.last_held(f"w{n}", "tiny", 1.0)] == [*known]
    assert [n for n in range(2 * MOST) if past.cannot_start(f"base{n}", (), 1.0)] == [*known]


def test_a_life_that_another_one_replaced_may_come_back_once_that_is_gone() -> None:
    past = PastLives()
    past.end("w0", 1, reported=False)
    assert past.is_over("w0", 1, replaced=True) and not past.is_over("w0", 1, replaced=False)
