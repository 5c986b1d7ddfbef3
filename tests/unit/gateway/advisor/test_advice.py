from __future__ import annotations

import json
from pathlib import Path

import pytest

from gateway.advisor.advice import (
    FleetSize,
    Goal,
    Oversubscription,
    advise,
    expect,
    load_s_of,
)
from gateway.advisor.traffic import WINDOW_S, Traffic, TrafficCounter, from_access_log
from gateway.cli.main import main

FLEET = FleetSize(workers=2, slots=8, capacity=64)


def traffic(*counts: int, span_s: float = 1000.0, held_s: float = 2.0) -> Traffic:
    found = Traffic(span_s, {f"a{n:03}": count for n, count in enumerate(counts)})
    for _ in range(sum(counts)):
        found.held.add(held_s)
        found.warm.add(0.05)
    found.loads.add(0.2)
    return found


def zipf(adapters: int, requests: int) -> Traffic:
    total = sum(1 / (n + 1) for n in range(adapters))
    return traffic(*(max(1, round(requests / (n + 1) / total)) for n in range(adapters)))


def test_adapters_that_all_fit_need_no_more_slots_and_no_pins() -> None:
    found = advise(traffic(*[100] * 10), FLEET, Goal())
    assert found.now is not None and found.now.miss_rate == 0
    assert found.workers is not None and found.workers <= 2
    assert not found.pins and not found.host_adapters and not found.oversubscribed


def test_more_adapters_than_slots_ask_for_as_many_workers_as_the_misses_take() -> None:
    found = advise(zipf(400, 20_000), FLEET, Goal(0.1))
    assert found.now is not None and found.now.miss_rate > 0.1
    assert found.workers is not None and found.then is not None and found.slots is not None
    assert found.then.miss_rate <= 0.1 and found.workers * FLEET.slots >= found.slots
    one_less = advise(zipf(400, 20_000), FleetSize(found.workers - 1, 8, 64), Goal(0.1))
    assert one_less.now is not None and one_less.now.miss_rate > 0.1
    assert found.host_adapters == found.slots - FLEET.all_slots


def test_a_quick_first_token_takes_more_workers_than_few_misses_alone() -> None:
    busy = traffic(*[500] * 100, span_s=100.0, held_s=4.0)
    slow, quick = advise(busy, FLEET, Goal(0.5)), advise(busy, FLEET, Goal(0.5, 0.3))
    assert slow.workers is not None and quick.workers is not None
    assert quick.workers >= slow.workers > FLEET.workers
    assert quick.then is not None and quick.then.ttft_p99_s is not None
    assert quick.then.ttft_p99_s <= 0.3
    assert advise(busy, FLEET, Goal(0.5, 0.01)).workers is None  # a warm one takes 0.05 s


def test_more_adapters_in_flight_than_slots_are_said_to_be_too_many() -> None:
    found = advise(traffic(*[1000] * 40, span_s=1000.0, held_s=3.0), FLEET, Goal())
    assert found.in_flight > FLEET.all_slots and found.oversubscribed
    assert found.words[0].startswith("Oversubscribed")
    assert found.now is not None and found.now.ttft_p99_s is None


def test_the_hot_adapters_are_pinned_where_many_rare_ones_drive_them_out() -> None:
    rare = traffic(*[60] * 12, *[2] * 600)
    found = advise(rare, FLEET, Goal())
    assert set(found.pins) <= {f"a{n:03}" for n in range(12)} and found.pins
    assert len(found.pins) <= FLEET.all_slots // 2
    assert not advise(traffic(*[5] * 200), FLEET, Goal()).pins  # all alike: no pin helps


def test_requests_for_the_base_model_never_miss() -> None:
    mixed = zipf(400, 20_000)
    alone = advise(mixed, FLEET, Goal()).now
    mixed.others, mixed.held = mixed.requests, mixed.held.plus(mixed.held)
    halved = advise(mixed, FLEET, Goal()).now
    assert alone is not None and halved is not None
    assert halved.miss_rate == pytest.approx(alone.miss_rate / 2)


def test_where_no_answer_was_streamed_it_is_said_what_a_first_token_is_then() -> None:
    whole = Traffic(span_s=100.0)
    whole.add("a", 2.0, None, None)
    fleet = FleetSize(1, 16, 256)
    assert "waits alone" in advise(whole, fleet, Goal(ttft_p99_s=1.0)).words[-1]
    whole.add("a", 2.0, 0.1, None)
    assert "waits alone" not in " ".join(advise(whole, fleet, Goal(ttft_p99_s=1.0)).words)


def test_nothing_seen_is_said() -> None:
    found = advise(Traffic(), FLEET, Goal())
    assert found.words == ("No requests have been seen yet.",) and found.workers is None


def test_a_fleet_is_oversubscribed_once_it_lasts_and_says_so_rarely() -> None:
    seen = Oversubscription()
    assert not seen.look(9, 8, 0.0) and not seen.look(9, 8, 29.0)
    assert seen.look(9, 8, 30.0) and not seen.look(9, 8, 100.0)
    assert not seen.look(8, 8, 110.0)  # a break
    assert not seen.look(9, 8, 700.0) and seen.look(9, 8, 730.0)
    assert not Oversubscription().look(5, 0, 0.0)  # no worker, no slots: another matter


def test_what_was_counted_longer_ago_than_an_hour_is_forgotten() -> None:
    counter = TrafficCounter()
    counter.current("m", 0.0).add("a", 2.0, 0.1, None)
    counter.current("m", 10.0).add("a", 2.0, None, 0.5)
    found = counter.traffic("m", 20.0)
    assert (found.counts, found.span_s) == ({"a": 2}, 20.0)
    assert (found.warm.count, found.loads.count) == (1, 1)
    counter.current("m", WINDOW_S + 1).add("b", 1.0, 0.1, None)
    found = counter.traffic("m", WINDOW_S + 11)
    assert found.counts == {"a": 2, "b": 1} and found.span_s == WINDOW_S + 11
    counter.current("m", 5 * WINDOW_S).add("c", 1.0, 0.1, None)
    assert counter.traffic("m", 5 * WINDOW_S).counts == {"c": 1}
    assert counter.traffic("other", 5 * WINDOW_S).requests == 0


def test_the_time_without_requests_counts_for_how_often_they_come() -> None:
    counter = TrafficCounter()
    counter.current("m", 0.0).add("a", 2.0, 0.1, None)
    counter.current("other", 1.9 * WINDOW_S).add("b", 2.0, 0.1, None)
    assert counter.traffic("m", 1.9 * WINDOW_S + 10).span_s == pytest.approx(1.9 * WINDOW_S + 10)
    found = counter.traffic("other", 1.9 * WINDOW_S + 10)
    assert found.counts == {"b": 1} and found.span_s == pytest.approx(1.9 * WINDOW_S + 10)
    counter.current("m", 10 * WINDOW_S).add("a", 2.0, 0.1, None)
    found = counter.traffic("m", 10 * WINDOW_S + 10)
    assert (found.counts, found.span_s) == ({"a": 1}, WINDOW_S + 10)


def line(ts: float, adapter: str | None, **more: object) -> str:
    fields = {"ts": ts, "event": "request", "model": "m" if adapter is None else f"m:{adapter}"}
    times = {"queue_ms": 100.0, "ttft_ms": 150.0, "load_ms": 0.0, "total_ms": 2100.0}
    return json.dumps({**fields, "adapter": adapter, **times, **more})


def test_an_access_log_is_read_and_what_is_no_request_is_passed_over() -> None:
    lines = [
        line(102.1, "a"),
        "not json",
        json.dumps({"ts": 1, "event": "serving"}),
        line(112.1, "b", load_ms=40.0, ttft_ms=400.0),
        line(122.1, None),
        line(130.0, "c", total_ms=None),
        line(120.0, "d", queue_ms=None, load_ms=None, total_ms=0.2, status=503),  # refused
        line(120.0, "d", load_ms=None, status=499),  # its client left before its worker told
    ]
    models, unreadable = from_access_log(lines)
    (found,) = models.values()
    assert unreadable == sum(not text.startswith("{") for text in lines)
    assert from_access_log(reversed(lines)) == (models, unreadable), "rotated, newest first"
    assert found.counts == {"a": 1, "b": 1} and found.others == 1
    assert found.span_s == pytest.approx(22.1) and found.held.sum_s == pytest.approx(5.96)
    assert (found.loads.count, found.warm.count) == (1, 2)
    assert found.warm.sum_s == pytest.approx(0.1)


def test_the_time_of_a_whole_answer_is_no_time_to_a_first_token() -> None:
    whole = line(102.1, "a", ttft_ms=2100.0, streamed=False)
    (found,) = from_access_log([line(100.0, "a"), whole])[0].values()
    assert (found.counts, found.held.count, found.warm.count) == ({"a": 2}, 2, 1)


@pytest.mark.parametrize(
    "cut",
    [
        b'{"ts":1,"event":"request","model":"m:a","adapter":"a","total_ms":-5}',
        b'{"ts":1e308,"event":"request","model":"m","total_ms":5}',
        b'{"ts":NaN,"event":"request","model":"m","total_ms":5}',
        b'{"ts":1,"event":"request","model":"m","total_ms":5,"output_tokens":-1}',
        b'{"ts":1.5,"event":"req',
        b"\x1f\x8b\x00\xff",
    ],
)
def test_a_line_that_cannot_be_is_counted_and_not_believed(cut: bytes) -> None:
    whole = line(100.0, "a").encode()
    assert from_access_log([whole, b"", cut]) == (from_access_log([whole])[0], 1)


@pytest.mark.parametrize(
    "option",
    ["--workers=0", "--slots=-3", "--miss-rate=2", "--miss-rate=nan", "--ttft-p99=-1"],
)
def test_a_fleet_or_a_goal_that_cannot_be_is_refused(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["advise", "--from", str(tmp_path / "log"), option])
    assert option.partition("=")[0] in capsys.readouterr().err


def test_the_command_advises_from_a_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "gateway.log"
    log.write_text("\n".join(line(100 + n / 10, f"a{n % 50}") for n in range(2000)))
    assert main(["advise", "--from", str(log), "--slots", "8", "--workers", "2"]) == 0
    shown = capsys.readouterr().out
    assert "m: With 2 worker(s) of 8 slots" in shown and "workers wanted" in shown
    assert main(["advise", "--from", str(tmp_path / "none")]) == 1


def test_waits_for_a_slot_are_not_taken_for_loads_where_a_larger_fleet_is_asked_for() -> None:
    """40 adapters in flight want 16 slots: what they waited for was no load."""
    busy = traffic(*[1000] * 40, span_s=1000.0, held_s=3.0)
    for _ in range(busy.requests):
        busy.loads.add(5.0)
    seen, larger = FleetSize(2, 8, 64, load_s=0.05), FleetSize(16, 8, 64)
    told, untold = expect(busy, seen, larger), expect(busy, FleetSize(2, 8, 64), larger)
    assert told.ttft_p99_s is not None and told.ttft_p99_s < 0.2
    assert load_s_of(busy, seen) == 0.05 and load_s_of(busy, larger) > 4.0
    assert untold.miss_rate == told.miss_rate == 0
    rare = traffic(*[2] * 400)
    rare.loads.add(0.4)
    assert load_s_of(rare, FleetSize(8, 16, 64, load_s=0.05)) == pytest.approx(0.3)  # as seen


def test_adapters_that_came_once_foretell_others_that_never_came_yet() -> None:
    known, more = traffic(*[50] * 8), traffic(*[50] * 8, *[1] * 40, *[2] * 5)
    old, new = (advise(seen, FLEET, Goal()).now for seen in (known, more))
    assert old is not None and old.miss_rate == 0
    assert new is not None and 0.07 < new.miss_rate < 0.12  # 45 rare ones that are hardly kept
