"""Which requests a load test sends, and when."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import islice, pairwise, takewhile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.load.workload import (
    AtOnce,
    BaseOnly,
    Bursts,
    Constant,
    Distinct,
    Fixed,
    FlashCrowd,
    Gamma,
    Identical,
    LogNormal,
    Poisson,
    Uniform,
    UniformLength,
    Workload,
    Zipf,
    adapter_indices,
    arrival_times_s,
    draw_tokens,
    parse_length,
    prompt_text,
    requests,
)

MANY = 20_000
LOAD = Workload(
    arrival=Poisson(50.0),
    mix=Zipf(1.0),
    adapters=100,
    prompt=Fixed(32),
    output=LogNormal(64, 0.5),
    seed=7,
)


def _gaps(arrival: Poisson | Gamma | Constant | Bursts | AtOnce) -> list[float]:
    times = [0.0, *islice(arrival_times_s(arrival, random.Random(1)), MANY)]
    return [later - earlier for earlier, later in pairwise(times)]


def _cv(gaps: list[float]) -> float:
    mean = sum(gaps) / len(gaps)
    return float((sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5 / mean)


@pytest.mark.parametrize(
    ("arrival", "cv"), [(Poisson(40.0), 1.0), (Gamma(40.0, 3.0), 3.0), (Gamma(40.0, 0.3), 0.3)]
)
def test_random_arrivals_keep_their_rate_and_their_coefficient_of_variation(
    arrival: Poisson | Gamma, cv: float
) -> None:
    gaps = _gaps(arrival)
    assert sum(gaps) / len(gaps) == pytest.approx(1 / 40, rel=0.08)
    assert _cv(gaps) == pytest.approx(cv, rel=0.1)


def test_constant_arrivals_are_evenly_spaced_from_zero() -> None:
    assert list(islice(arrival_times_s(Constant(4.0), random.Random(0)), 4)) == [
        0.0,
        0.25,
        0.5,
        0.75,
    ]


def test_bursts_arrive_together_and_keep_the_mean_rate() -> None:
    assert list(islice(arrival_times_s(Bursts(10.0, 3), random.Random(0)), 7)) == pytest.approx(
        [0, 0, 0, 0.3, 0.3, 0.3, 0.6]
    )


def test_at_once_means_at_time_zero() -> None:
    assert set(islice(arrival_times_s(AtOnce(), random.Random(0)), 50)) == {0.0}


def _until(arrival: FlashCrowd, end_s: float) -> list[float]:
    return list(takewhile(lambda at_s: at_s < end_s, arrival_times_s(arrival, random.Random(2))))


def _between(times: list[float], start_s: float, end_s: float) -> int:
    return sum(start_s <= at_s < end_s for at_s in times)


def test_a_flash_crowd_comes_within_its_ramp_holds_and_leaves() -> None:
    times = _until(FlashCrowd(20.0, 200.0, at_s=50.0, ramp_s=10.0, hold_s=30.0), 200.0)
    for start_s, end_s, expected in (
        (0, 50, 1000),
        (50, 60, 1100),
        (60, 90, 6000),
        (90, 100, 1100),
        (100, 200, 2000),
    ):
        assert _between(times, start_s, end_s) == pytest.approx(expected, abs=5 * expected**0.5)


def test_a_flash_crowd_out_of_nothing_begins_on_time_and_ends() -> None:
    times = list(
        arrival_times_s(FlashCrowd(0.0, 100.0, at_s=7.0, ramp_s=1.0, hold_s=3.0), random.Random(0))
    )
    assert 7.0 <= times[0] < 8.0
    assert times[-1] <= 12.0
    assert len(times) == pytest.approx(400, abs=100)


@pytest.mark.parametrize(
    "arrival",
    [
        FlashCrowd(5.0, 4.0, 1.0),
        FlashCrowd(0.0, 0.0, 1.0),
        FlashCrowd(0.0, 1.0, -1.0),
    ],
)
def test_a_varying_rate_that_makes_no_sense_is_refused(
    arrival: FlashCrowd,
) -> None:
    with pytest.raises(ValueError):  # several messages, all for the user
        next(arrival_times_s(arrival, random.Random(0)))


@pytest.mark.parametrize(
    "arrival",
    [Poisson(0.0), Gamma(1.0, 0.0), Constant(-1.0), Bursts(1.0, 0), Poisson(float("inf"))],
)
def test_a_rate_a_cv_or_a_burst_that_is_not_above_zero_is_refused(
    arrival: Poisson | Gamma | Constant | Bursts,
) -> None:
    with pytest.raises(ValueError, match="above 0"):
        next(arrival_times_s(arrival, random.Random(0)))


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5])
def test_zipf_asks_for_adapters_in_proportion_to_their_rank(alpha: float) -> None:
    drawn = list(islice(adapter_indices(Zipf(alpha), 50, random.Random(3)), MANY))
    weights = [rank**-alpha for rank in range(1, 51)]
    for index in (0, 1, 4, 20, 49):
        expected = MANY * weights[index] / sum(weights)
        # five standard deviations
        assert drawn.count(index) == pytest.approx(expected, abs=5 * expected**0.5)
    assert set(drawn) <= set(range(50))


def test_uniform_asks_for_every_adapter_equally_often() -> None:
    drawn = list(islice(adapter_indices(Uniform(), 10, random.Random(3)), MANY))
    assert all(drawn.count(index) == pytest.approx(MANY / 10, rel=0.1) for index in range(10))


def test_distinct_never_repeats_before_every_adapter_had_its_turn() -> None:
    assert list(islice(adapter_indices(Distinct(), 3, random.Random(0)), 7)) == [
        0,
        1,
        2,
        0,
        1,
        2,
        0,
    ]


def test_identical_and_base_only_stay_with_one_model() -> None:
    assert set(islice(adapter_indices(Identical(), 9, random.Random(0)), 20)) == {0}
    assert set(islice(adapter_indices(BaseOnly(), 0, random.Random(0)), 20)) == {None}


def test_a_mix_without_adapters_is_refused() -> None:
    with pytest.raises(ValueError, match="needs at least one adapter"):
        next(adapter_indices(Zipf(1.0), 0, random.Random(0)))


@given(st.integers(0, 2**31), st.integers(1, 300))
def test_the_same_seed_makes_the_same_requests_and_prompts(seed: int, adapters: int) -> None:
    load = replace(LOAD, seed=seed, adapters=adapters)
    first, second = list(islice(requests(load), 20)), list(islice(requests(load), 20))
    assert first == second
    assert [prompt_text(load, request) for request in first] == [
        prompt_text(load, request) for request in second
    ]


def test_another_seed_makes_other_arrivals_adapters_and_prompts() -> None:
    ours, theirs = (
        list(islice(requests(LOAD), 50)),
        list(islice(requests(replace(LOAD, seed=8)), 50)),
    )
    assert [request.at_s for request in ours] != [request.at_s for request in theirs]
    assert [request.adapter for request in ours] != [request.adapter for request in theirs]
    assert prompt_text(LOAD, ours[0]) != prompt_text(replace(LOAD, seed=8), theirs[0])


def test_changing_the_mix_leaves_arrivals_lengths_and_prompts_alone() -> None:
    ours = list(islice(requests(LOAD), 200))
    theirs = list(islice(requests(replace(LOAD, mix=Uniform())), 200))
    assert [request.adapter for request in ours] != [request.adapter for request in theirs]
    assert [replace(request, adapter=0) for request in ours] == [
        replace(request, adapter=0) for request in theirs
    ]


def test_the_base_share_goes_to_the_base_model() -> None:
    drawn = list(islice(requests(replace(LOAD, base_share=0.25)), MANY))
    assert sum(request.adapter is None for request in drawn) / MANY == pytest.approx(0.25, rel=0.1)


def test_a_prompt_has_as_many_words_as_tokens_were_asked_for_and_no_two_are_alike() -> None:
    prompts = [prompt_text(LOAD, request) for request in islice(requests(LOAD), 200)]
    assert {len(prompt.split()) for prompt in prompts} == {32}
    assert len(set(prompts)) == 200


def test_requests_of_one_prefix_share_exactly_the_prefix() -> None:
    load = replace(LOAD, prefixes=2, prefix_tokens=10)
    by_prefix: dict[int | None, set[str]] = {}
    for request in islice(requests(load), 100):
        words = prompt_text(load, request).split()
        assert len(words) == 42
        by_prefix.setdefault(request.prefix, set()).add(" ".join(words[:10]))
    assert {prefix: len(texts) for prefix, texts in by_prefix.items()} == {0: 1, 1: 1}
    assert by_prefix[0] != by_prefix[1]


@given(st.integers(0, 1000))
def test_lengths_stay_within_their_bounds(seed: int) -> None:
    rng = random.Random(seed)
    assert 3 <= draw_tokens(UniformLength(3, 9), rng) <= 9
    assert 1 <= draw_tokens(LogNormal(2, 3.0, most_tokens=50), rng) <= 50


def test_log_normal_lengths_have_the_median_that_was_asked_for() -> None:
    rng = random.Random(5)
    lengths = sorted(draw_tokens(LogNormal(128, 0.5), rng) for _ in range(MANY))
    assert lengths[MANY // 2] == pytest.approx(128, rel=0.03)
    # one sigma up
    assert lengths[int(MANY * 0.8413)] == pytest.approx(128 * 2.71828**0.5, rel=0.05)


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("128", Fixed(128)),
        ("uniform:16:256", UniformLength(16, 256)),
        ("lognormal:128:0.5", LogNormal(128, 0.5)),
        ("lognormal:9:1:40", LogNormal(9, 1.0, 40)),
    ],
)
def test_lengths_are_read_as_written(text: str, length: Fixed | UniformLength | LogNormal) -> None:
    assert parse_length(text) == length


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "-3",
        "1.5",
        "uniform:9:3",
        "uniform:9",
        "lognormal:128",
        "lognormal:128:-1",
        "pareto:1:2",
        "lognormal:1:nan",
    ],
)
def test_lengths_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(ValueError):  # several messages, all for the user
        parse_length(text)
