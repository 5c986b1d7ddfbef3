"""When a share of an alias is rolled back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.adapters.alias_rollback import SLICES, OutcomeWindow, ShareOutcomes
from shared.config.aliases import RollbackConfig

LIMIT = RollbackConfig(error_rate=0.1, min_requests=20, window_s=60.0)


def run(
    shares: ShareOutcomes, adapter: str, requests: int, failures: int, now: float = 0.0
) -> str | None:
    """The failures come last, so the verdict is about all of them."""
    verdict = None
    for i in range(requests):
        verdict = shares.note(adapter, i >= requests - failures, now) or verdict
    return verdict


def test_a_share_whose_errors_exceed_the_limit_is_rolled_back_with_the_figures() -> None:
    shares = ShareOutcomes(LIMIT)
    assert run(shares, "v7", 100, 0) is None
    verdict = run(shares, "v8", 20, 3)
    assert verdict is not None and "3 of 20" in verdict and "15.0%" in verdict


def test_too_few_requests_say_nothing() -> None:
    assert run(ShareOutcomes(LIMIT), "v8", 19, 19) is None


def test_a_rate_at_the_limit_is_allowed() -> None:
    assert run(ShareOutcomes(LIMIT), "v8", 20, 2) is None
    assert run(ShareOutcomes(LIMIT), "v8", 40, 5) is not None


def test_a_share_that_is_no_worse_than_the_others_stays() -> None:
    shares = ShareOutcomes(LIMIT)
    run(shares, "v7", 10, 10)
    assert run(shares, "v8", 100, 90) is None, "the trouble is everybody's"


def test_errors_leave_the_window() -> None:
    shares = ShareOutcomes(LIMIT)
    run(shares, "v8", 19, 19, now=0.0)
    assert shares.note("v8", True, 70.0) is None
    assert shares.count("v8", 70.0).requests == 1


def test_without_a_rollback_nothing_is_rolled_back_but_all_is_counted() -> None:
    shares = ShareOutcomes(None)
    assert run(shares, "v8", 1000, 1000) is None
    assert shares.count("v8", 0.0).errors == 1000


@given(st.lists(st.tuples(st.floats(0, 20), st.booleans()), max_size=100))
def test_a_window_counts_what_is_younger_and_forgets_what_is_older(
    events: list[tuple[float, bool]],
) -> None:
    window, now, kept = OutcomeWindow(60.0), 0.0, []
    for after, failed in events:
        now += after
        window.note(failed, now)
        kept.append((now, failed))
    count = window.count(now)
    slice_s = 60.0 / SLICES
    surely = [f for t, f in kept if t > now - 60.0 + slice_s]
    perhaps = [f for t, f in kept if t >= now - 60.0 - 1e-6]
    assert len(surely) <= count.requests <= len(perhaps)
    assert sum(surely) <= count.errors <= sum(perhaps)
    assert len(window._slices) <= SLICES
