"""Counters of several gateway processes, their sum, and their bounds."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram

from gateway.telemetry import counters
from gateway.telemetry.counters import CounterSet, Distribution, Snapshot
from gateway.telemetry.metric_definitions import ADAPTER_LABELS, TTFT_BUCKETS_S
from gateway.telemetry.prometheus import Metrics

BOUNDS = {"ttft": (1.0, 2.0)}


@given(st.lists(st.one_of(st.sampled_from(TTFT_BUCKETS_S), st.floats(0, 100)), max_size=50))
def test_values_fall_into_the_buckets_that_prometheus_would_put_them_in(
    values: list[float],
) -> None:
    registry = CollectorRegistry()
    theirs, ours = (
        Histogram("x", "x", buckets=TTFT_BUCKETS_S, registry=registry),
        Distribution(TTFT_BUCKETS_S),
    )
    for value in values:
        theirs.observe(value)
        ours.observe(value)
    below = 0
    for bound, count in zip((*TTFT_BUCKETS_S, float("inf")), ours.counts, strict=True):
        below += count
        le = "+Inf" if bound == float("inf") else str(float(bound))
        assert registry.get_sample_value("x_bucket", {"le": le}) == below
    assert registry.get_sample_value("x_sum") == pytest.approx(ours.total)


def test_the_sum_of_processes_is_what_one_process_would_have_counted() -> None:
    rng, one, parts = random.Random(1), CounterSet(BOUNDS), [CounterSet(BOUNDS) for _ in range(3)]
    for _ in range(200):
        part, value, key = rng.choice(parts), rng.randrange(4), ("requests", rng.choice("ab"))
        for each in (one, part):
            each.count(key, value)
            each.distribution(("ttft", "a")).observe(value)
    total = CounterSet(BOUNDS)
    for number, part in enumerate(parts):
        total.add(counters.decode(counters.encode(part.snapshot(f"g{number}"))))
    assert sorted(total.snapshot("").counters) == sorted(one.snapshot("").counters)
    mine, its = total.distribution(("ttft", "a")), one.distribution(("ttft", "a"))
    assert (mine.counts, mine.total) == (its.counts, its.total)


def test_buckets_of_another_version_are_left_out_and_the_rest_is_kept() -> None:
    total = CounterSet(BOUNDS)
    total.add(
        Snapshot(
            "g1",
            ((("requests", "a"), 3),),
            ((("ttft", "a"), (1, 2), 1.0), (("gone", "a"), (1, 2, 3), 1.0)),
        )
    )
    assert total.snapshot("").counters == ((("requests", "a"), 3),) and not total.distributions


def test_a_process_that_is_started_again_goes_on_from_its_last_numbers() -> None:
    before = Metrics("g1")
    before.retried()
    before.error("overloaded")
    after = Metrics("g1")
    after.restore(counters.decode(counters.encode(before.snapshot())))
    after.retried()
    assert after.value("loraplex_retries_total", {}) == 2
    assert after.value("loraplex_error_responses_total", {"code": "overloaded"}) == 1


def test_adapters_with_a_series_of_their_own_keep_it_over_a_restart_and_stay_bounded() -> None:
    before = Snapshot(
        "g0", tuple((("adapter_requests", "a", f"x{i}"), 1.0) for i in range(ADAPTER_LABELS))
    )
    metrics = Metrics("g0")
    metrics.restore(before)
    assert (
        metrics._adapter_label("a", "x7") == "x7" and metrics._adapter_label("a", "new") == "_other"
    )


def test_a_process_that_does_not_answer_shows_its_last_counts_and_no_gauge() -> None:
    parts = [
        Snapshot(
            "g0", ((("requests", "a", "finished"), 2),), gauges=((("queue_depth", "a", "g0"), 5),)
        ),
        Snapshot(
            "g1", ((("requests", "a", "finished"), 3),), gauges=((("queue_depth", "a", "g1"), 7),)
        ),
    ]
    shown = Metrics("g0").render(parts, {"g0": True, "g1": False}).decode()
    assert 'loraplex_requests_total{base="a",outcome="finished"} 5.0' in shown
    assert (
        'loraplex_queue_depth{base="a",process="g0"} 5.0' in shown
        and 'queue_depth{base="a",process="g1"}' not in shown
    )
    assert (
        'loraplex_gateway_process_up{process="g1"} 0.0' in shown
        and 'loraplex_gateway_requests{process="g1"} 3.0' in shown
    )
