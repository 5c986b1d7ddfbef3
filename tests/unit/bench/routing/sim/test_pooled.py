"""The bound with all slots as one pool."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.routing.report.figures import figures
from bench.routing.sim.clairvoyant import bound
from bench.routing.sim.pooled import SlotUse, pooled, starts_of
from bench.routing.sim.scenarios import SCENARIOS, CountedWindow, requests_of
from bench.routing.sim.timing import Timing
from bench.routing.sim.worker import WorkerFacts
from bench.routing.sim.world import World, simulate

FACTS, WINDOW = WorkerFacts("base"), CountedWindow(5.0, 20.0)

arrivals = st.lists(
    st.tuples(st.integers(0, 4), st.floats(0.0, 2.0), st.floats(0.1, 3.0)), max_size=30
)


def in_order(drawn: list[tuple[int, float, float]]) -> list[SlotUse]:
    now, slot_uses = 0.0, []
    for adapter, gap, lasts in drawn:
        now += gap
        slot_uses.append((adapter, now, lasts))
    return slot_uses


@given(arrivals, st.integers(1, 3))
def test_no_more_adapters_than_slots_and_nobody_waits_while_one_is_free_or_its_adapter_has_one(
    drawn: list[SlotUse], slots: int
) -> None:
    slot_uses = in_order(drawn)
    starts = starts_of(slot_uses, slots)
    for (adapter, at, _), start in zip(slot_uses, starts, strict=True):
        assert start >= at
        there = {
            a for (a, _, lasts), s in zip(slot_uses, starts, strict=True) if s <= start < s + lasts
        }
        assert adapter in there and len(there) <= slots
        if start > at:  # just before it got its slot all were taken, none of them by its adapter
            before = {
                a
                for (a, _, lasts), s in zip(slot_uses, starts, strict=True)
                if s < start <= s + lasts
            }
            assert len(before) == slots and adapter not in {
                a
                for (a, _, lasts), s in zip(slot_uses, starts, strict=True)
                if s <= at < s + lasts and s < start
            }


def test_requests_of_one_adapter_share_a_slot_and_others_wait_in_order_of_arrival() -> None:
    slot_uses = [(1, 0.0, 2.0), (1, 1.0, 2.0), (2, 1.5, 1.0), (3, 1.6, 1.0), (2, 1.7, 3.0)]
    assert starts_of(slot_uses, 1) == [0.0, 1.0, 3.0, 6.0, 3.0]


def test_one_pool_waits_more_than_the_bound_and_loads_less_than_the_run() -> None:
    requests = requests_of(SCENARIOS["default"], 100.0, 3, WINDOW)
    run = simulate(World("expected-ttft", 8, 1000, 3), requests)
    ours, pool = figures(run, WINDOW), figures(pooled(run, 8, FACTS), WINDOW)
    best = figures(bound(requests, 8, FACTS, Timing()), WINDOW)
    assert best.ttft_p99_s < pool.ttft_p99_s
    assert best.loads_per_request < pool.loads_per_request < ours.loads_per_request
    assert best.requests == pool.requests == ours.requests


def test_of_a_run_with_requests_that_were_not_served_nothing_is_said() -> None:
    run = simulate(
        World("expected-ttft", 1, 1000, 3), requests_of(SCENARIOS["default"], 3.0, 3, WINDOW)
    )
    run.outcomes[4] = dataclasses.replace(run.outcomes[4], failed="overloaded")
    with pytest.raises(ValueError, match="request 4 was not served"):
        pooled(run, 1, FACTS)
