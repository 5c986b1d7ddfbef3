"""Shell. What is remembered of the last hour, and how much of it at most."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from gateway.telemetry.ended_request import EndedRequest
from gateway.telemetry.recorder import (
    COLUMNS,
    MAX_CODES,
    MAX_REFUSED,
    MAX_WORKERS,
    STEP_S,
    STEPS,
    LatencyHistogram,
    Recorder,
    decode_steps,
    encode_steps,
)
from shared.link.messages import Done, Tier


def ended(at: float = 100.0, **more: Any) -> EndedRequest:
    """One that arrived 1 s before its end, was sent at once, and its first token after 0.2 s."""
    found = EndedRequest(
        "base", "a", "finished", Done(1, 10, 5), at - 1, at - 1, at - 0.8, at, "r1", "key1"
    )
    found = msgspec.structs.replace(found, **more)
    if found.done is None:
        return found
    of = found.done
    return msgspec.structs.replace(
        found, prompt_tokens=of.prompt_tokens, output_tokens=of.output_tokens
    )


def last(recorder: Recorder, now: float, column: str) -> float | None:
    return recorder.series(now)[column][-1]


def test_the_tokens_of_an_answer_that_its_client_left_count() -> None:
    recorder = Recorder()
    recorder.ended(ended(done=None, outcome="aborted", prompt_tokens=10, output_tokens=4))
    assert sum(n or 0.0 for n in recorder.series(105.0)["output_tokens_per_s"]) > 0
    assert sum(n or 0.0 for n in recorder.series(105.0)["itl_ms"]) == 0


def test_a_step_has_the_figures_of_the_requests_that_ended_in_it() -> None:
    recorder = Recorder()
    recorder.ended(ended())
    recorder.ended(ended(done=Done(2, 30, 5, 0.1, 0.1, Tier.DISK), moves=1))
    now = 101.0
    assert last(recorder, now, "requests_per_s") == 2 / STEP_S
    assert last(recorder, now, "output_tokens_per_s") == 10 / STEP_S
    assert last(recorder, now, "prompt_tokens_per_s") == 40 / STEP_S
    assert last(recorder, now, "moved") == 1
    # four gaps in 0.8 s; a moved answer stood still, which is no gap between tokens
    assert last(recorder, now, "itl_ms") == pytest.approx(200)
    assert last(recorder, now, "ttft_warm_p50_ms") == pytest.approx(200, rel=0.1)
    assert last(recorder, now, "ttft_cold_p50_ms") == pytest.approx(200, rel=0.1)


def test_an_answer_that_came_whole_has_no_first_token_and_no_gaps() -> None:
    recorder = Recorder()
    recorder.ended(ended(streamed=False))
    assert last(recorder, 101.0, "requests_per_s") == 1 / STEP_S
    assert last(recorder, 101.0, "itl_ms") is last(recorder, 101.0, "ttft_warm_p50_ms") is None


def test_what_the_engine_refused_has_no_first_token() -> None:
    recorder = Recorder()
    recorder.ended(ended(outcome="invalid", engine_status=400))
    assert last(recorder, 101.0, "requests_per_s") == 1 / STEP_S
    assert last(recorder, 101.0, "ttft_warm_p50_ms") is None


def test_time_without_requests_is_empty_and_older_than_an_hour_is_forgotten() -> None:
    recorder = Recorder()
    recorder.ended(ended(100.0))
    assert recorder.series(100.0)["requests_per_s"].count(None) == STEPS - 1
    assert recorder.series(100.0 + STEP_S)["requests_per_s"][-2:] == [0.1, None]
    assert recorder.series(100.0 + STEP_S * STEPS)["requests_per_s"] == [None] * STEPS
    assert set(recorder.series(0.0)) == set(COLUMNS)


def test_its_memory_does_not_grow() -> None:
    recorder = Recorder(most_requests=3)
    for n in range(5 * STEPS):
        recorder.ended(ended(n * STEP_S, request_id=f"r{n}"))
    for n in range(5 * MAX_CODES):
        recorder.error(f"code{n}", 5 * STEPS * STEP_S)
    assert len(recorder._steps) == STEPS
    assert len(recorder.errors(5 * STEPS * STEP_S)) == MAX_CODES
    assert [e.request_id for e in recorder.requests()] == ["r1799", "r1798", "r1797"]


def test_a_flood_of_refused_requests_pushes_none_out_that_was_served() -> None:
    recorder = Recorder()
    recorder.ended(ended(100.0, request_id="served"))
    for n in range(5 * MAX_REFUSED):
        recorder.refused(ended(101.0 + n, request_id=f"r{n}", outcome="limited"))
    recorder.ended(ended(102.5, request_id="later"))
    found = [e.request_id for e in recorder.requests()]
    assert len(found) == MAX_REFUSED + 2 and found[-2:] == ["later", "served"]


def test_restarts_and_moves_are_counted_by_worker_and_news_are_kept_for_who_follows() -> None:
    recorder = Recorder()
    for epoch in (1, 1, 2, 3):
        recorder.sample(100.0, 0, 0, {("w0", epoch): (0, 0), ("w1", 7): (0, 0)})
    recorder.moved("w1")
    assert (recorder.restarts, recorder.moved_from) == ({"w0": 2}, {"w1": 1})
    recorder.ended(ended(request_id="unseen"))
    assert recorder.news() == []
    recorder.follow(True)
    recorder.ended(ended(request_id="one"))
    recorder.refused(ended(request_id="two"))
    assert [e.request_id for e in recorder.news()] == ["two", "one"]
    assert recorder.news() == []


def test_moves_of_new_workers_are_counted_however_many_there_were_before() -> None:
    recorder = Recorder()
    for n in range(MAX_WORKERS + 5):
        recorder.moved(f"pod-{n}")
    recorder.moved(f"pod-{MAX_WORKERS + 4}")
    assert len(recorder.moved_from) == MAX_WORKERS and "pod-0" not in recorder.moved_from
    assert recorder.moved_from[f"pod-{MAX_WORKERS + 4}"] == 2


def test_a_worker_that_stays_keeps_its_counts_however_many_come_and_go() -> None:
    recorder = Recorder()
    for epoch in (1, 2, 3):
        recorder.sample(0.0, 0, 0, {("w0", epoch): (0, 0)})
    for n in range(2 * MAX_WORKERS):
        recorder.moved("w0")
        recorder.moved(f"pod-{n}")
        recorder.sample(0.0, 0, 0, {("w0", 3): (0, 0), (f"pod-{n}", 1): (0, 0)})
    assert recorder.restarts == {"w0": 2}
    assert recorder.moved_from["w0"] == 2 * MAX_WORKERS
    assert len(recorder.moved_from) == MAX_WORKERS


def test_requests_are_found_by_key_adapter_worker_status_and_id_the_newest_first() -> None:
    recorder = Recorder()
    recorder.ended(ended(request_id="one", worker="w0"))
    recorder.ended(ended(request_id="two", tenant="key2", outcome="failed", code="overloaded"))
    recorder.refused(ended(request_id="one", adapter=None, outcome="refused"))

    def ids(**asked: str) -> list[str]:
        return [e.request_id for e in recorder.requests(**asked)]

    assert ids() == ["one", "two", "one"]
    assert ids(tenant="key2") == ids(status="failed") == ids(status="overloaded") == ["two"]
    assert ids(worker="w0") == ["one"]
    assert ids(adapter="a") == ids(adapter="base:a") == ["two", "one"]
    newest = recorder.find("one")
    assert newest is not None and newest.outcome == "refused"
    assert recorder.find("three") is None


def test_loads_and_evictions_are_what_the_workers_have_counted() -> None:
    recorder = Recorder()
    recorder.sample(1.0, 3, 5, {("w0", 1): (2, 0)})
    recorder.sample(2.0, 1, 2, {("w0", 1): (2, 0)})
    recorder.sample(3.0, 0, 0, {("w0", 1): (42, 40), ("w1", 9): (1, 0)})
    assert (last(recorder, 3.0, "loads"), last(recorder, 3.0, "evictions")) == (43, 40)
    assert (last(recorder, 3.0, "queued"), last(recorder, 3.0, "ongoing")) == (3, 5)
    recorder.sample(4.0, 0, 0, {("w0", 2): (3, 1)})  # a new life counts from its begin
    assert (last(recorder, 4.0, "loads"), last(recorder, 4.0, "evictions")) == (46, 41)


def test_candidates_are_kept_of_no_more_than_ten_decisions_a_second() -> None:
    recorder = Recorder()
    assert sum(recorder.explains(n / 1000) for n in range(1000)) == 10


@pytest.mark.parametrize("value_s", [0.0005, 0.002, 0.05, 1.0, 30.0])
def test_a_quantile_is_wrong_by_a_tenth_at_most(value_s: float) -> None:
    histogram = LatencyHistogram()
    histogram.observe(value_s)
    found = histogram.quantile(0.5)
    assert found is not None and found == pytest.approx(max(value_s, 0.001), rel=0.1)
    assert LatencyHistogram().quantile(0.5) is None


def test_a_load_that_two_processes_see_in_two_steps_is_one() -> None:
    one, two = Recorder(), Recorder()
    for at, seen in ((85.0, (0, 0)), (99.9, (0, 0)), (100.5, (3, 2)), (111.0, (3, 2))):
        one.sample(at, 0, 0, {("w0", 1): seen})
    for at, seen in ((75.0, (0, 0)), (85.0, (5, 0)), (99.9, (8, 2)), (111.0, (8, 2))):
        two.sample(at, 0, 0, {("w0", 1): seen})
    others = decode_steps(encode_steps(two.steps))
    hour = one.series(115.0, others=others)
    assert [hour["loads"][n] for n in (-4, -3, -2, -1)] == [5, 0, 3, 0]
    assert sum(n or 0 for n in hour["evictions"]) == 2


def test_the_last_hour_of_two_processes_is_one_by_its_sums() -> None:
    one, two = Recorder(), Recorder()
    one.ended(ended(100.0))
    two.ended(ended(100.0, t_head=99.6))
    for recorder in (one, two):
        recorder.error("overloaded", 100.0)
        recorder.sample(100.0, 1, 2, {("w0", 1): (2, 0)})
    two.ended(ended(120.0))
    others = decode_steps(encode_steps(two.steps))
    series, alone = one.series(120.0, others=others), one.series(120.0)
    assert [series["requests_per_s"][n] for n in (-3, -1)] == [2 / STEP_S, 1 / STEP_S]
    assert (series["queued"][-3], series["ongoing"][-3]) == (2, 4)
    assert series["loads"][-3] == alone["loads"][-3] == 2, "both have seen the same loads"
    assert series["ttft_warm_p95_ms"][-3] == pytest.approx(600, rel=0.1)
    assert alone["ttft_warm_p95_ms"][-3] == pytest.approx(200, rel=0.1)
    assert one.errors(120.0, others) == {"overloaded": 2}
    assert one.errors(120.0) == {"overloaded": 1}, "they were not added to its own"
