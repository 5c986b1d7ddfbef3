"""The simulator that `loraplex advise --simulate` asks."""

from __future__ import annotations

from collections import Counter

import pytest

from bench.what_if import answer, arrivals, least_workers, timing_like, tokens_of, try_out
from gateway.advisor.advice import FleetSize, Goal
from gateway.advisor.question import SimulatorQuestion, decode_question, encode
from gateway.advisor.traffic import Traffic

FLEET = FleetSize(workers=2, slots=4, capacity=64)


def traffic(adapters: int = 6, requests: int = 600, span_s: float = 60.0) -> Traffic:
    """Answers of 40 tokens that hold a place for two seconds."""
    found = Traffic(span_s)
    for n in range(requests):
        cold = n % 10 == 0
        found.add(
            f"a{n % adapters}",
            2.0 + 0.3 * cold,
            None if cold else 0.1,
            0.3 if cold else None,
            20,
            40,
        )
    return found


def test_the_engine_is_as_fast_as_the_traffic_says() -> None:
    timing = timing_like(traffic(), FLEET)
    # 20 requests a second for two seconds each, on two workers: 10 run on each
    assert timing.step_s(10) == pytest.approx((2.0 - 0.1) / 39)
    waits = 1.5 if timing.scheduled_ahead else 0.5
    first_s = timing.outside_s + waits * timing.step_s(10) + timing.prefill_step_s(10, 20)
    assert first_s == pytest.approx(0.1)
    loads_s = timing.fetch_disk_s + timing.prepare_s + timing.load_s
    assert loads_s == pytest.approx(0.3) and timing.max_sequences == 64


def test_requests_come_as_often_and_ask_for_adapters_as_often_as_was_seen() -> None:
    planned = list(arrivals(traffic(), 1))
    assert tokens_of(traffic()) == (20, 40) and tokens_of(Traffic()) == (128, 128)
    assert len(planned) == 5 * 600
    assert len(planned) / planned[-1].at_s == pytest.approx(10.0, rel=0.1)
    share = sum(r.adapter == 0 for r in planned) / len(planned)
    assert share == pytest.approx(1 / 6, abs=0.03)


def test_beside_adapters_that_came_once_others_come_that_never_came() -> None:
    seen = traffic()
    for n in range(60):
        seen.add(f"rare{n}", 2.0, 0.1, None, 20, 40)
    drawn = Counter(r.adapter for r in arrivals(seen, 1))
    known = {adapter for adapter in drawn if adapter is not None and adapter < 66}
    assert len(drawn) > 4 * len(known)


def test_a_larger_fleet_misses_less_and_the_simulator_says_how_many_workers_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bench.what_if.WARM_UP", 100)
    monkeypatch.setattr("bench.what_if.COUNTED", 300)
    seen = traffic(adapters=12)
    timing = timing_like(seen, FLEET)
    misses = [try_out(seen, FLEET.times(n), timing)[1].miss_rate for n in (2, 3, 4)]
    assert misses[0] > 0.2 > misses[2]
    question = SimulatorQuestion(seen, FLEET, Goal(0.2), workers=2)
    found = answer(decode_question(encode(question)))
    assert found.requests == 300 and found.workers in (3, 4)
    assert found.then is not None and found.then.miss_rate <= 0.2


@pytest.mark.parametrize("first", [1, 3, 5, 9])
@pytest.mark.parametrize("least", [1, 2, 5, 7])
def test_the_least_number_of_workers_is_found_from_wherever_the_search_begins(
    first: int, least: int
) -> None:
    assert least_workers(lambda n: n >= least, first) == least
    assert least_workers(lambda n: False, first) is None
