"""What a fleet run shows of a worker's death, and of growth."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.fleet.figures import (
    Seen,
    failures,
    figures,
    linear,
    lowest_share,
    paces,
    recovery_s,
    served_again_s,
    table,
    together,
    tokens_within,
)
from bench.load.measure import BIN_S, LoadOutcome


def _answer(
    at_s: float,
    *,
    lasts_s: float = 1.0,
    tokens: int = 10,
    tier: str = "gpu",
    worker: str = "w0",
    error: str | None = None,
) -> LoadOutcome:
    return LoadOutcome(
        adapter="a", scheduled_s=at_s, started_s=at_s, ended_s=at_s + lasts_s,
        first_byte_s=at_s, first_token_s=at_s, last_token_s=at_s + lasts_s,
        status=200, error=error, output_tokens=tokens, by_usage=True, tier=tier, worker=worker,
    )  # fmt: skip


def _nothing(at_s: float, error: str = "http_503") -> LoadOutcome:
    return LoadOutcome(
        adapter="a",
        scheduled_s=at_s,
        started_s=at_s,
        ended_s=at_s,
        first_byte_s=at_s,
        status=503,
        error=error,
    )


def test_linear_is_throughput_per_worker_against_the_smallest_fleet() -> None:
    assert linear({8: 760.0, 2: 200.0, 4: 400.0}) == pytest.approx({2: 1.0, 4: 1.0, 8: 0.95})
    assert linear({}) == {}


def test_an_answer_counts_with_the_share_of_its_tokens_that_came_in_the_window() -> None:
    assert tokens_within([_answer(0.0, lasts_s=2.0, tokens=20)], 0.5, 1.5) == pytest.approx(10)
    assert tokens_within([_answer(3.0, lasts_s=0.0, tokens=1)], 0.0, 3.0) == 0.0
    assert tokens_within([_nothing(1.0)], 0.0, 3.0) == 0.0


@given(
    st.lists(
        st.tuples(st.floats(0, 50), st.floats(0, 20), st.integers(1, 500)), min_size=1, max_size=30
    ),
    st.floats(0.1, 60),
)
def test_windows_that_meet_count_every_token_once(
    answers: list[tuple[float, float, int]], cut_s: float
) -> None:
    seen = [_answer(at_s, lasts_s=lasts_s, tokens=tokens) for at_s, lasts_s, tokens in answers]
    parts = tokens_within(seen, 0.0, cut_s) + tokens_within(seen, cut_s, 100.0)
    assert parts == pytest.approx(sum(tokens for *_, tokens in answers))


def test_generators_that_started_one_after_the_other_share_the_clock_of_the_first() -> None:
    late = Seen(12.0, [_answer(1.0)], {4: 10})
    both = together([late, Seen(10.0, [_answer(1.0)], {4: 5})])
    assert both.start_s == 10.0
    assert sorted(o.scheduled_s for o in both.outcomes) == [1.0, 3.0]
    assert both.tokens_by_bin == {4: 5, 4 + int(2.0 / BIN_S): 10}


def test_requests_that_got_nothing_are_told_from_answers_that_broke_off() -> None:
    made = failures(
        [_answer(0.0), _answer(0.0, error="error_event"), _nothing(0.0), _nothing(0.0, "timeout")]
    )
    assert (made["failed_before_first_byte"], made["broken_off"]) == (2, 1)
    assert made["errors"] == {"error_event": 1, "http_503": 1, "timeout": 1}


def test_only_requests_that_were_due_in_the_window_are_timed_and_cold_is_any_tier_but_the_gpu() -> (
    None
):
    seen = Seen(
        0.0,
        [
            _answer(0.5),
            _answer(1.5),
            _answer(1.6, tier="cpu"),
            _answer(1.7, tier="remote"),
            _answer(2.5),
        ],
        {},
    )
    made = figures(seen, 1.0, 2.0)
    assert made["requests"]["due"] == 3
    assert made["ttft_warm"]["count"] == 1 and made["ttft_cold"]["count"] == 2


def test_throughput_is_back_when_it_stays_at_nine_tenths_of_what_it_was() -> None:
    flicker = [100] * 40 + [0] * 8 + [100] + [0] * 3 + [95] * 40
    assert recovery_s(flicker, 0.25, at_s=10.0, settled_s=2.0) == pytest.approx(3.0, abs=0.51)
    assert recovery_s([100] * 40 + [50] * 40, 0.25, 10.0, 2.0) is None
    assert recovery_s([100] * 80, 0.25, 10.0, 2.0) == 0.0
    assert recovery_s([], 0.25, 10.0, 2.0) is None
    assert recovery_s([100] * 80, 0.25, -1.0, 2.0) is None, "the load had not begun"


def test_the_warm_up_does_not_lower_what_throughput_was() -> None:
    assert recovery_s([0] * 20 + [100] * 20 + [60] * 40, 0.25, 10.0, 5.0) is None


def test_a_request_that_was_given_up_waited_as_long_as_it_lived_and_a_refused_one_did_not() -> None:
    given_up = replace(_nothing(1.0, "timeout"), ended_s=31.0)
    made = figures(Seen(0.0, [_answer(1.0), given_up, _nothing(1.0)], {}), 0.0, 2.0)
    assert made["ttft"]["count"] == 2 and made["ttft"]["max"] == 30.0
    assert made["requests"]["succeeded"] == 1


def _row(*, ttft_s: float = 0.1, **more: object) -> dict[str, object]:
    ttft = dict.fromkeys(("mean", "p50", "p99"), ttft_s)
    figures = {"ttft": ttft, "ttft_warm": None, "ttft_cold": None, "output_tokens_per_s": 1.0}
    figures["requests"] = {"failed_before_first_byte": 0, "broken_off": 0}
    return {
        "part": "policies",
        "run": "1",
        "figures": figures,
        "loads": {"per_1000_requests": 0.0},
        **more,
    }


def test_the_table_has_what_routing_expected_where_it_expects_anything() -> None:
    ours = [
        _row(policy="expected-ttft", share=0.7, expected_over_actual={"p50": median})
        for median in (0.9, 1.0, 1.3)
    ]
    shown = table([*ours, _row(policy="ray", share=0.7)])
    head, _, mine, rays = (line.split("|") for line in shown.splitlines()[:4])
    at = head.index(" expected/actual ")
    assert (mine[at], rays[at]) == (" 1.00 ", " - ")
    assert "mean 1.00, p99 1.00 (pairs: 1)" in shown


def test_policies_are_compared_in_pairs_of_the_same_requests() -> None:
    pairs = ((0.1, 0.2, 0), (0.8, 0.4, 1))
    rows = [
        _row(policy=policy, share=1.4, repetition=again, ttft_s=ttft_s)
        for ours, rays, again in pairs
        for policy, ttft_s in (("expected-ttft", ours), ("ray", rays))
    ]
    alone = _row(policy="ray", share=1.4, repetition=2, ttft_s=9.0)
    assert "140% of capacity: mean 1.00, p99 1.00 (pairs: 2)" in table([*rows, alone])


def test_policies_are_shown_by_what_was_offered_lowest_first() -> None:
    old = _row(policy="ray", share=0.7)
    made = [_row(policy="ray", share=None, rps=10.5), old, _row(policy="ray", share=None, rps=8.0)]
    assert paces(made) == ["8 requests/s a worker", "10.5 requests/s a worker", "70% of capacity"]
    shown = [line.split("|")[1].strip() for line in table(made).splitlines()[2:]]
    assert shown == paces(made)


def test_the_worst_second_is_told_as_a_share_of_what_was_before() -> None:
    assert lowest_share([100] * 40 + [25] * 4 + [100] * 20, 0.25, 10.0, 2.0) == pytest.approx(0.25)
    assert lowest_share([], 0.25, 10.0, 2.0) is None
    assert lowest_share([100] * 80, 0.25, -1.0, 2.0) is None, "the load had not begun"


def test_a_worker_serves_again_with_its_first_answer_after_the_restart() -> None:
    seen = [
        _answer(1.0, worker="w1"),
        _answer(9.0, worker="w1"),
        _answer(7.0, worker="w1"),
        _answer(6.0, worker="w0"),
    ]
    assert served_again_s(seen, "w1", 5.0) == 7.0
    assert served_again_s(seen, "w1", 10.0) is None
