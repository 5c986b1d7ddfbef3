from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.fleet.fleet import Fleet
from gateway.fleet.rendezvous import ORDER_LENGTH, Rendezvous
from gateway.routing.demand import RATE_WINDOW_S, SHRINK_AFTER_S, DemandRates, HomeSets
from shared.link.messages import Heartbeat, WorkerState


def pool_of(names: list[str]) -> Fleet:
    fleet = Fleet(10.0)
    for name in names:
        fleet.beat(Heartbeat(name, 1, 1, "tiny", WorkerState.SERVING, 8, 4), 0.0)
        fleet.attach(name, 1)
    return fleet


def orders(names: list[str], adapters: int) -> list[list[str]]:
    pool, rendezvous = pool_of(names).pool("tiny"), Rendezvous()
    return [[w.id for w in rendezvous.order((f"a{i}", "d"), pool)] for i in range(adapters)]


def test_gateways_that_saw_the_workers_in_another_order_agree() -> None:
    names = [f"w{i}" for i in range(9)]
    assert orders(names, 50) == orders(names[::-1], 50)


@pytest.mark.parametrize("workers", [8, 100])
def test_homes_are_spread_evenly(workers: int) -> None:
    homes = [order[0] for order in orders([f"w{i}" for i in range(workers)], workers * 50)]
    counts = [homes.count(f"w{i}") for i in range(workers)]
    assert min(counts) > 20 and max(counts) < 85


def test_a_worker_that_leaves_moves_only_its_own_adapters() -> None:
    names = [f"w{i}" for i in range(10)]
    before, after = orders(names, 200), orders(names[:-1], 200)
    for old, new in zip(before, after, strict=True):
        assert [w for w in old if w != "w9"] == new


def test_of_a_large_pool_the_first_of_the_order_are_the_true_first() -> None:
    fleet = pool_of([f"w{i}" for i in range(300)])
    pool, rendezvous = fleet.pool("tiny"), Rendezvous()
    for i in range(20):
        some = rendezvous.order((f"a{i}", "d"), pool)
        assert len(some) == ORDER_LENGTH and len({w.id for w in some}) == ORDER_LENGTH


def test_a_rate_is_what_steady_requests_make_it_and_fades() -> None:
    rates = DemandRates()
    for n in range(2000):
        rates.note(("a", "d"), n / 10)
    assert rates.per_s(("a", "d"), 200.0) == pytest.approx(10.0, rel=0.05)
    assert rates.per_s(("a", "d"), 200.0 + 5 * RATE_WINDOW_S) < 0.1
    assert rates.per_s(("b", "d"), 0.0) == 0.0


def test_rates_forget_the_adapter_longest_unseen_when_they_are_full() -> None:
    rates = DemandRates(size=2)
    for n, name in enumerate("abac"):
        rates.note((name, "d"), float(n))
    assert [rates.per_s((name, "d"), 3.0) > 0 for name in "abc"] == [True, False, True]
    assert {key for _, key in rates.hottest(5, 3.0)} == {("a", "d"), ("c", "d")}


def test_copies_grow_at_once_and_shrink_only_after_a_while_of_lower_demand() -> None:
    homes, key = HomeSets(), ("a", "d")
    assert homes.copies(key, 5.0, 16.0, 0.0) == 1
    assert homes.copies(key, 50.0, 16.0, 1.0) == 4
    assert homes.copies(key, 17.0, 16.0, 2.0) == 4
    assert homes.copies(key, 1.0, 16.0, 3.0) == 4
    # the most that was needed meanwhile
    assert homes.copies(key, 1.0, 16.0, 2.5 + SHRINK_AFTER_S) == 2
    assert homes.copies(key, 1.0, 16.0, 3.0 + 2 * SHRINK_AFTER_S) == 1


def test_demand_that_comes_back_in_time_keeps_its_copies() -> None:
    homes, key = HomeSets(), ("a", "d")
    homes.copies(key, 50.0, 16.0, 0.0)
    for n in range(1, 20):
        now = n * SHRINK_AFTER_S * 0.6
        assert homes.copies(key, 50.0 if n % 2 else 1.0, 16.0, now) == 4


@given(st.lists(st.tuples(st.floats(0, 500), st.floats(1, 64), st.floats(0, 40)), max_size=40))
def test_there_are_never_fewer_copies_than_the_demand_needs(
    steps: list[tuple[float, float, float]],
) -> None:
    homes, now = HomeSets(), 0.0
    for demand, bound, pause in steps:
        now += pause
        assert homes.copies(("a", "d"), demand, bound, now) * bound >= demand * (1 - 1e-6)
