"""Pure. What a soak calls growth."""

from __future__ import annotations

from bench.chaos.slopes import RSS, SoakReport, SoakSample, slopes

RSS_OF = ("gateway", RSS)
WARM_S = 100.0


def samples(mb_per_s: float, before: float = 0.0) -> list[SoakSample]:
    """Twenty minutes; `before`: more in each second of the warm-up."""
    return [
        SoakSample(at, {RSS_OF: 50 + mb_per_s * at + before * min(at, WARM_S)})
        for at in map(float, range(0, 1200, 10))
    ]


def test_a_leak_of_more_than_a_megabyte_in_ten_minutes_is_growth_and_less_is_not() -> None:
    (leak,) = slopes(samples(1.1 / 600), WARM_S)
    assert not leak.flat and abs(leak.per_unit - 1.1) < 1e-6
    (little,) = slopes(samples(0.9 / 600), WARM_S)
    assert little.flat


def test_what_grows_during_the_warm_up_alone_is_flat() -> None:
    (slope,) = slopes(samples(0.0, before=1.0), WARM_S)
    assert slope.flat and abs(slope.per_unit) < 1e-6


def test_what_is_not_there_all_the_time_has_no_slope() -> None:
    partly = [*samples(0.0), SoakSample(1200.0, {})]
    assert slopes(partly, WARM_S) == []


def test_a_soak_that_is_too_short_to_tell_does_not_hold() -> None:
    assert slopes(samples(0.0)[:2], 0.0) == []
    facts = {"seconds": 10.0, "answers": 9, "left": 0, "changes": 0, "faults": 0}
    assert not SoakReport(**facts, failures=[], slopes=[]).holds
    assert SoakReport(**facts, failures=[], slopes=slopes(samples(0.0), WARM_S)).holds
    assert not SoakReport(**facts, failures=["x"], slopes=slopes(samples(0.0), WARM_S)).holds
