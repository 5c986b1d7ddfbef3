from __future__ import annotations

import math
import random
from collections import Counter, OrderedDict

import pytest

from gateway.advisor.closed_forms import (
    Alike,
    Wait,
    characteristic_time_s,
    least,
    miss_rate,
    quantile_s,
    wait_of,
    wait_probability,
)
from gateway.advisor.times import Times
from gateway.advisor.unseen import unseen


def zipf(items: int, alpha: float) -> list[float]:
    return [(n + 1) ** -alpha for n in range(items)]


def lru_miss_rate(rates: list[float], places: int, requests: int) -> float:
    """By trying it."""
    rng, cache, missed = random.Random(1), OrderedDict[int, None](), 0
    for n, item in enumerate(rng.choices(range(len(rates)), rates, k=2 * requests)):
        if item in cache:
            cache.move_to_end(item)
            continue
        missed += n >= requests  # the first half warms up
        cache[item] = None
        if len(cache) > places:
            cache.popitem(last=False)
    return missed / requests


@pytest.mark.parametrize("alpha", [0.0, 1.0, 1.5])
@pytest.mark.parametrize("places", [10, 60, 150])
def test_the_share_of_misses_is_that_of_an_lru_cache(alpha: float, places: int) -> None:
    rates = zipf(200, alpha)
    assert miss_rate(rates, places) == pytest.approx(lru_miss_rate(rates, places, 20_000), abs=0.02)


def test_items_that_are_asked_for_once_take_places_and_are_never_found() -> None:
    rates, once_per_s = zipf(50, 1.0), 1.0
    total = sum(rates)
    drawn = random.Random(4)
    cache, missed, next_new = OrderedDict[int, None](), 0, 1000
    for n in range(40_000):
        item = drawn.choices(range(50), rates)[0]
        if drawn.random() < once_per_s / (total + once_per_s):
            item, next_new = next_new, next_new + 1
        missed += n >= 20_000 and item not in cache
        cache.pop(item, None)
        cache[item] = None
        if len(cache) > 60:
            cache.popitem(last=False)
    once = Alike(1e9, once_per_s / 1e9)
    assert miss_rate(rates, 60, once) == pytest.approx(missed / 20_000, abs=0.02)
    assert miss_rate([], 5, once) == pytest.approx(1.0)


def test_items_that_are_alike_count_as_if_each_were_written_down() -> None:
    rates = [*zipf(30, 1.0), *[0.02] * 40]
    assert miss_rate(rates[:30], 25, Alike(40, 0.02)) == pytest.approx(miss_rate(rates, 25))
    assert miss_rate(rates[:30], 70, Alike(40, 0.02)) == 0


@pytest.mark.parametrize("requests", [300, 800, 3000])
def test_how_many_adapters_have_not_been_seen_is_foretold_from_those_that_came_once(
    requests: int,
) -> None:
    rng = random.Random(requests)
    counts = Counter(rng.choices(range(500), k=requests))
    found = unseen(counts.values())
    assert found.adapters == pytest.approx(500 - len(counts), abs=50)
    assert found.requests / requests == pytest.approx((500 - len(counts)) / 500, abs=0.07)
    assert unseen([2, 3]).requests == 0 and unseen([1, 1]).requests == 2


def test_places_fill_up_to_their_number_and_what_fits_is_never_missed() -> None:
    rates = zipf(50, 1.0)
    time_s = characteristic_time_s(rates, 20)
    assert sum(1 - math.exp(-rate * time_s) for rate in rates) == pytest.approx(20)
    assert miss_rate(rates, 50) == 0 and miss_rate(rates, 0) == 1 and miss_rate([], 5) == 0
    missed = [miss_rate(rates, places) for places in range(51)]
    assert missed == sorted(missed, reverse=True)


@pytest.mark.parametrize(
    ("servers", "offered", "probability"),
    [(1, 0.5, 0.5), (2, 1.0, 1 / 3), (10, 8.0, 0.40918), (5, 4.0, 0.55411), (4, 4.0, 1.0)],
)
def test_erlang_c_is_as_in_the_tables(servers: int, offered: float, probability: float) -> None:
    assert wait_probability(servers, offered) == pytest.approx(probability, abs=1e-4)


def test_so_many_servers_that_nobody_waits_are_not_counted_one_by_one() -> None:
    assert wait_probability(10**9, 50.0) == 0.0


def test_waits_are_as_much_shorter_as_service_times_vary_less() -> None:
    # M/M/1 at half load: P(wait > t) = 0.5 exp(-0.5 t)
    exponential, alike = wait_of(1, 0.5, 1.0, 1.0), wait_of(1, 0.5, 1.0, 0.0)
    assert exponential is not None and alike is not None
    assert exponential.longer_than(3.0) == pytest.approx(0.5 * math.exp(-1.5))
    assert alike.mean_s == pytest.approx(exponential.mean_s / 2)  # Pollaczek and Khinchine
    assert wait_of(1, 2.0, 1.0, 1.0) is None and wait_of(1, 0.0, 1.0, 1.0) == Wait()


def times(*seconds: float) -> Times:
    found = Times()
    for second in seconds:
        found.add(second)
    return found


def test_times_keep_their_mean_and_their_variation_and_add_up() -> None:
    rng = random.Random(2)
    drawn = [rng.expovariate(5.0) for _ in range(4000)]
    found = times(*drawn[:1000]).plus(times(*drawn[1000:])).plus(Times())
    assert found.count == 4000 and found.mean_s() == pytest.approx(sum(drawn) / 4000)
    assert found.variation == pytest.approx(1.0, abs=0.1)
    assert times(2.0, 2.0).variation == 0 and Times().points(0.3) == [(0.3, 1.0)]
    assert sum(s * share for s, share in found.points()) == pytest.approx(found.mean_s())


@pytest.mark.parametrize("cold", [0.0, 0.005, 0.3])
@pytest.mark.parametrize("wait", [Wait(), Wait(0.02, 0.4), Wait(0.6, 0.05)])
def test_a_quantile_of_the_sum_is_the_one_that_trying_finds(cold: float, wait: Wait) -> None:
    rng = random.Random(3)
    warm = [rng.lognormvariate(-3.5, 0.5) for _ in range(20_000)]
    load = [rng.uniform(0.1, 0.2) for _ in range(20_000)]
    tried = sorted(
        w
        + (extra if rng.random() < cold else 0.0)
        + (rng.expovariate(1 / wait.mean_s) if rng.random() < wait.probability else 0.0)
        for w, extra in zip(warm, load, strict=True)
    )
    found = quantile_s(0.99, times(*warm).points(), times(*load).points(), cold, wait)
    assert found == pytest.approx(tried[19_800], rel=0.1)


@pytest.mark.parametrize("first", [1, 2, 17, 64, 65])
def test_the_least_number_is_found(first: int) -> None:
    assert least(lambda n: n >= first, 64) == (first if first <= 64 else None)
