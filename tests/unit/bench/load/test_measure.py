"""The figures of a load test, from its requests."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.load.measure import (
    BIN_S,
    Histogram,
    LoadOutcome,
    LoadRun,
    Meter,
    Slo,
    cold_flags,
    latency,
    percentile,
)
from bench.load.report import document, table


def _outcome(
    at_s: float = 0.0,
    *,
    ttft_s: float = 0.1,
    tokens: int = 11,
    gap_s: float = 0.02,
    adapter: str | None = "a",
    error: str | None = None,
    late_s: float = 0.0,
    cold: bool | None = None,
) -> LoadOutcome:
    first_s = at_s + ttft_s
    last_s = first_s + gap_s * (tokens - 1)
    return LoadOutcome(
        adapter=adapter, scheduled_s=at_s, started_s=at_s + late_s, ended_s=last_s,
        first_byte_s=first_s, first_token_s=first_s, last_token_s=last_s,
        status=200, error=error, detail="why" if error else "", output_tokens=tokens,
        prompt_tokens=5, by_usage=True, cold=cold,
    )  # fmt: skip


def _run(
    *outcomes: LoadOutcome,
    slo: Slo | None = None,
    open_loop: bool = True,
    warmed: frozenset[str | None] = frozenset(),
) -> LoadRun:
    return LoadRun(
        outcomes=outcomes,
        meter=Meter(),
        slo=slo or Slo(),
        open_loop=open_loop,
        cpu_s=0.01,
        warmed=warmed,
    )


def test_percentiles_interpolate_between_neighbours() -> None:
    assert [
        percentile([1.0, 2.0, 3.0, 4.0], share) for share in (0.0, 0.5, 0.9, 1.0)
    ] == pytest.approx([1.0, 2.5, 3.7, 4.0])
    assert percentile([5.0], 0.99) == 5.0


def test_there_is_no_percentile_of_nothing() -> None:
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)
    assert latency([None, None]) is None


@given(
    st.lists(st.floats(1e-5, 100.0), min_size=1, max_size=300),
    st.sampled_from([0.1, 0.5, 0.9, 0.99, 1.0]),
)
def test_the_histogram_agrees_with_the_exact_percentile_to_one_percent(
    times_s: list[float], share: float
) -> None:
    histogram = Histogram()
    for time_s in times_s:
        histogram.add(time_s)
    ordered = sorted(times_s)
    exact = min(
        time_s
        for index, time_s in enumerate(ordered)
        if (index + 1) / len(ordered) >= share - 1e-12
    )
    assert histogram.percentile(share) == pytest.approx(exact, rel=0.0101)


def test_the_histogram_stays_small_however_much_it_sees() -> None:
    histogram, rng = Histogram(), random.Random(0)
    for _ in range(50_000):
        histogram.add(rng.lognormvariate(-4, 2))
    assert len(histogram.counts) < 1_100
    assert histogram.count == 50_000


def test_latency_counts_from_the_scheduled_time_however_late_the_request_was_sent() -> None:
    late = _outcome(10.0, ttft_s=0.5, late_s=0.4)
    assert late.ttft_s == pytest.approx(0.5)
    assert late.lag_s == pytest.approx(0.4)


def test_a_request_sent_a_moment_early_does_not_gain_from_it() -> None:
    early = _outcome(10.0, ttft_s=0.5, late_s=-0.0004)
    assert early.ttft_s == pytest.approx(0.5004)
    assert early.lag_s == 0.0


def test_goodput_counts_the_requests_that_keep_every_bound_and_no_failed_one() -> None:
    run = _run(
        _outcome(0.0),
        _outcome(0.5, ttft_s=0.3),  # too late
        _outcome(0.6, gap_s=0.05),  # too slow
        _outcome(0.7, error="no_done"),
        _outcome(0.8, tokens=1, ttft_s=0.2),  # on the bound; one token has no gap
        slo=Slo(ttft_s=0.2000001, itl_s=0.03),
    )  # fmt: skip
    made = document(run)
    assert made["goodput"]["share"] == pytest.approx(2 / 5)
    assert made["goodput"]["requests_per_s"] == pytest.approx(2 / made["duration_s"])


def test_without_an_slo_there_is_no_goodput() -> None:
    assert document(_run(_outcome()))["goodput"] is None


def test_an_slo_on_tokens_is_not_kept_by_an_answer_without_token_times() -> None:
    assert not Slo(ttft_s=1.0).kept_by(LoadOutcome("a", 0.0, 0.0, 0.1, status=200, output_tokens=3))
    assert Slo(e2e_s=1.0).kept_by(LoadOutcome("a", 0.0, 0.0, 0.1, status=200, output_tokens=3))


def test_the_first_scheduled_request_of_an_adapter_is_cold_and_the_base_never() -> None:
    outcomes = [
        _outcome(3.0, adapter="a"),
        _outcome(1.0, adapter="a"),
        _outcome(0.0, adapter=None),
        _outcome(2.0, adapter="b"),
    ]
    assert cold_flags(outcomes, frozenset()) == [False, True, False, True]
    assert cold_flags(outcomes, frozenset({"a"})) == [False, False, False, True]


def test_what_the_server_says_about_cold_wins() -> None:
    outcomes = [_outcome(0.0, cold=False), _outcome(1.0, cold=True), _outcome(2.0)]
    assert cold_flags(outcomes, frozenset()) == [False, True, False]
    assert document(_run(*outcomes))["cold"] == {"by": "mixed"}


def test_figures_come_from_successful_requests_only() -> None:
    made = document(
        _run(
            _outcome(0.0, ttft_s=0.1),
            _outcome(1.0, ttft_s=9.0, error="cut"),
            _outcome(2.0, ttft_s=0.3),
        )
    )
    assert made["requests"] | {"warm_up": 0, "warm_up_failed": 0} == made["requests"]
    assert (
        made["requests"]["sent"],
        made["requests"]["succeeded"],
        made["requests"]["failed"],
    ) == (3, 2, 1)
    assert made["ttft"]["count"] == 2
    assert made["ttft"]["max"] == pytest.approx(0.3)
    assert made["throughput"]["output_tokens"] == 22
    assert made["errors"] == {"cut": {"count": 1, "sample": "why"}}


def test_a_generator_that_fell_behind_is_reported() -> None:
    made = document(_run(*[_outcome(at / 10, late_s=0.05) for at in range(20)]))
    assert not made["generator"]["kept_up"]
    assert any("late" in warning for warning in made["warnings"])
    assert "WARNING" in table(made)


def test_a_closed_loop_has_no_lag() -> None:
    assert document(_run(_outcome(), open_loop=False))["generator"]["lag"] is None


def test_adapters_are_listed_by_how_often_they_were_asked_for() -> None:
    made = document(
        _run(
            *[_outcome(at, adapter=name) for at, name in enumerate("abbcccc")],
            _outcome(9.0, adapter=None),
        )
    )
    assert [(row["adapter"], row["requests"], row["cold"]) for row in made["adapters"]["top"]] == [
        ("c", 4, 1),
        ("b", 2, 1),
        (None, 1, 0),
        ("a", 1, 1),
    ]
    assert made["adapters"]["seen"] == 3


def test_the_timeline_holds_every_token_in_its_bin() -> None:
    meter = Meter(start_s=100.0)
    meter.tokens(3, 100.0)
    meter.tokens(2, 100.0 + 2.5 * BIN_S)
    made = document(
        LoadRun(
            outcomes=[_outcome(0.0, ttft_s=4 * BIN_S, tokens=1)],
            meter=meter,
            slo=Slo(),
            open_loop=False,
            cpu_s=0.0,
        )
    )
    assert made["timeline"]["output_tokens"] == [3, 0, 2, 0, 0]
    assert made["timeline"]["completed"] == [0, 0, 0, 0, 1]


def test_a_run_in_which_nothing_was_sent_still_makes_a_table() -> None:
    assert "0 sent" in table(document(_run()))
