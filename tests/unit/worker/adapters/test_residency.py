"""Residency: by example, and as a machine with an engine and a store that answer in any order."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shared.adapters.identity import AdapterRef
from shared.link.messages import Tier
from worker.adapters import residency as module
from worker.adapters.failures import FAILED_FOR_S, MAX_FAILED
from worker.adapters.residency import (
    SLOT_WAIT_S,
    CommandDone,
    Failure,
    Fetch,
    Instruction,
    Reject,
    Residency,
    ResidencyStage,
    Start,
)
from worker.engine.base import Loaded, Swap

A, B, C, D, E = ABCDE = [AdapterRef("tiny", name, "d") for name in "abcde"]


def on_disk(adapter: AdapterRef) -> Loaded:
    return Loaded(adapter, ord(adapter.name[0]), Path("/nowhere"), 8, 1000)


def resident(residency: Residency, request: int, adapter: AdapterRef, now: float = 0.0) -> None:
    """Brings the adapter into a slot for a request that keeps running."""
    assert residency.want(request, adapter, now) == [Fetch(adapter)]
    assert residency.fetched(on_disk(adapter), Tier.REMOTE, now) == [Swap((on_disk(adapter),))]
    assert residency.swapped({}, now) == [Start(request, on_disk(adapter), Tier.REMOTE)]


def in_line(residency: Residency, request: int, adapter: AdapterRef, now: float = 0.0) -> None:
    assert residency.want(request, adapter, now) == [Fetch(adapter)]
    assert residency.fetched(on_disk(adapter), Tier.REMOTE, now) == []


def stage(residency: Residency, adapter: AdapterRef) -> ResidencyStage | None:
    entry = residency._entries.get(adapter)
    return entry.stage if entry else None


# ---- the plain way -------------------------------------------------------------------------------


def test_a_request_waits_for_fetch_and_load_and_the_next_one_starts_at_once() -> None:
    residency = Residency(1)
    resident(residency, 1, A)
    assert residency.want(2, A, 0.0) == [Start(2, on_disk(A), Tier.GPU)]
    assert residency.waiting == 0


def test_requests_that_come_while_the_adapter_is_on_its_way_share_one_fetch_and_one_load() -> None:
    residency = Residency(1)
    assert residency.want(1, A, 0.0) == [Fetch(A)]
    assert residency.want(2, A, 0.0) == []
    assert residency.fetched(on_disk(A), Tier.DISK, 0.0) == [Swap((on_disk(A),))]
    assert residency.want(3, A, 0.0) == []
    assert residency.waiting == 3
    assert residency.swapped({}, 0.0) == [Start(r, on_disk(A), Tier.DISK) for r in (1, 2, 3)]


def test_the_wait_for_a_slot_is_told_apart_from_the_load() -> None:
    residency = Residency(1)
    resident(residency, 1, A)
    assert residency.want(2, B, 1.0) == [Fetch(B)]
    assert residency.fetched(on_disk(B), Tier.REMOTE, 3.0) == []  # A is in use
    assert residency.want(3, B, 4.0) == []
    assert residency.finish(1, 5.0) == [Swap((on_disk(B),), (), (on_disk(A),))]
    assert residency.want(4, B, 5.5) == []
    started = residency.swapped({}, 6.0)
    waits = {s.request: s.slot_wait_s for s in started if isinstance(s, Start)}
    assert waits == {2: 2.0, 3: 1.0, 4: 0.0}


def test_who_waits_for_the_swap_of_another_adapter_waits_for_no_slot() -> None:
    residency = Residency(2)
    assert residency.want(1, A, 0.0) == [Fetch(A)]
    assert residency.fetched(on_disk(A), Tier.REMOTE, 0.0) == [Swap((on_disk(A),))]
    in_line(residency, 2, B)
    _, swap = residency.swapped({}, 3.0)
    assert swap == Swap((on_disk(B),))
    (started,) = residency.swapped({}, 4.0)
    assert isinstance(started, Start) and started.slot_wait_s == 0.0


def test_fetches_run_side_by_side_and_what_comes_during_a_swap_enters_together_with_the_next() -> (
    None
):
    residency = Residency(3)
    assert [residency.want(i, ref, 0.0) for i, ref in enumerate((A, B, C))] == [
        [Fetch(A)],
        [Fetch(B)],
        [Fetch(C)],
    ]
    assert residency.fetched(on_disk(B), Tier.REMOTE, 0.0) == [Swap((on_disk(B),))]
    assert residency.fetched(on_disk(C), Tier.REMOTE, 0.0) == []
    assert residency.fetched(on_disk(A), Tier.REMOTE, 0.0) == []
    assert residency.swapped({}, 0.0) == [
        Start(1, on_disk(B), Tier.REMOTE),
        Swap((on_disk(C), on_disk(A))),
    ]
    assert residency.swapped({}, 0.0) == [
        Start(2, on_disk(C), Tier.REMOTE),
        Start(0, on_disk(A), Tier.REMOTE),
    ]


def test_an_adapter_on_its_way_in_is_no_victim_of_the_same_swap() -> None:
    residency = Residency(2)
    resident(residency, 1, A)
    resident(residency, 2, B)
    in_line(residency, 3, C)
    in_line(residency, 4, D)
    assert residency.finish(1, 0.0) == [Swap((on_disk(C),), (), (on_disk(A),))]
    residency.swapped({}, 0.0)
    assert residency.finish(2, 0.0) == [Swap((on_disk(D),), (), (on_disk(B),))]


def test_slots_that_become_free_during_a_swap_are_given_by_the_next_one() -> None:
    residency = Residency(3, 9)
    for number, ref in enumerate((A, B, C)):
        resident(residency, number, ref)
    in_line(residency, 3, D)
    in_line(residency, 4, E)
    assert residency.finish(0, 0.0) == [Swap((on_disk(D),), (on_disk(A),))]
    assert (
        residency.want(5, A, 0.0) == []
        and residency.finish(1, 0.0) == []
        and residency.finish(2, 0.0) == []
    )
    both = Swap((on_disk(E), on_disk(A)), (on_disk(B), on_disk(C)))
    assert residency.swapped({}, 0.0) == [Start(3, on_disk(D), Tier.REMOTE), both]


def test_the_idle_adapter_that_was_used_longest_ago_makes_room_and_is_named() -> None:
    residency = Residency(2)
    resident(residency, 1, A)
    resident(residency, 2, B)
    residency.finish(1, 0.0)
    residency.finish(2, 0.0)
    residency.want(3, A, 0.0)
    residency.finish(3, 0.0)
    assert residency.want(4, C, 0.0) == [Fetch(C)]
    assert residency.fetched(on_disk(C), Tier.REMOTE, 0.0) == [
        Swap((on_disk(C),), (), (on_disk(B),))
    ]


def test_with_lru_the_least_recently_used_makes_room_however_often_it_was_used() -> None:
    for lru, victim in ((False, B), (True, A)):
        residency = Residency(2, 4, lru=lru)
        for number, ref in enumerate((A, B)):
            resident(residency, number, ref)
            residency.finish(number, 0.0)
        for number in range(2, 30):
            residency.want(number, A, 1.0)
            residency.finish(number, 1.0)
        residency.want(30, B, 2.0)
        residency.finish(30, 2.0)
        residency.want(31, C, 3.0)
        assert residency.fetched(on_disk(C), Tier.REMOTE, 3.0) == [
            Swap((on_disk(C),), (on_disk(victim),))
        ]


def test_loads_and_evictions_are_counted_by_tier_and_reason() -> None:
    residency = Residency(1, 2)
    resident(residency, 1, A)
    residency.finish(1, 0.0)
    residency.want(2, B, 0.0)
    residency.fetched(on_disk(B), Tier.DISK, 0.0)
    residency.swapped({}, 0.0)
    residency.finish(2, 0.0)
    residency.want(3, A, 0.0)
    residency.swapped({}, 0.0)
    residency.finish(3, 0.0)
    assert residency.loads == {"remote": 1, "disk": 1, "cpu": 1}
    residency.evict(4, A, 0.0)
    residency.swapped({}, 0.0)
    residency.evict(5, B, 0.0)
    assert residency.evictions == {"gpu:slot_needed": 2, "gpu:asked": 1, "cpu:asked": 1}


def test_an_adapter_in_steady_use_stays_though_it_was_used_longest_ago_and_heartbeats_say_so() -> (
    None
):
    residency = Residency(2)
    resident(residency, 1, A)
    residency.finish(1, 0.0)
    for n in range(30):
        residency.want(100 + n, A, n / 5)
        residency.finish(100 + n, n / 5)
    resident(residency, 2, B, 6.0)
    residency.finish(2, 6.0)
    assert [(s.name, s.steady) for s in residency.states(6.0, 1.0)] == [("a", True), ("b", False)]
    residency.want(3, C, 6.0)
    assert residency.fetched(on_disk(C), Tier.DISK, 6.0) == [Swap((on_disk(C),), (), (on_disk(B),))]


def full_with_one_in_steady_use(slots: int = 4) -> Residency:
    """A is idle for the moment. B, C, ... run the requests 2, 3, ..."""
    residency = Residency(slots)
    resident(residency, 1, A)
    residency.finish(1, 0.0)
    for n in range(30):
        residency.want(100 + n, A, 0.0)
        residency.finish(100 + n, 0.0)
    for n in range(1, slots):
        resident(residency, n + 1, ABCDE[n])
    return residency


def test_the_idle_moment_of_an_adapter_in_steady_use_is_not_given_to_the_line() -> None:
    residency = full_with_one_in_steady_use()
    in_line(residency, 9, E)
    assert residency.tick(SLOT_WAIT_S) == [] and stage(residency, B) is ResidencyStage.CLOSING
    assert residency.finish(2, 1.5) == [Swap((on_disk(E),), (), (on_disk(B),))]


def test_nor_is_its_slot_closed_however_long_the_line_is() -> None:
    residency = full_with_one_in_steady_use()
    residency.want(1000, A, 0.0)
    for n in range(8):
        in_line(residency, 10 + n, AdapterRef("tiny", f"late{n}", "d"))
    residency.tick(SLOT_WAIT_S)
    assert [stage(residency, a) for a in (A, B, C, D)] == [
        ResidencyStage.RESIDENT,
        ResidencyStage.CLOSING,
        ResidencyStage.CLOSING,
        ResidencyStage.CLOSING,
    ]


def test_it_is_given_to_a_hotter_one() -> None:
    residency = full_with_one_in_steady_use()
    for n in range(40):
        residency.want(200 + n, E, 0.0)
    assert residency.fetched(on_disk(E), Tier.DISK, 0.0) == [Swap((on_disk(E),), (), (on_disk(A),))]


def test_it_is_given_to_the_line_once_the_steady_use_is_over() -> None:
    residency = full_with_one_in_steady_use()
    in_line(residency, 9, E)
    assert residency.tick(30.0) == [Swap((on_disk(E),), (), (on_disk(A),))]


def test_one_is_kept_however_few_slots_there_are_if_another_is_left() -> None:
    residency = full_with_one_in_steady_use(2)
    residency.want(9, E, 0.0)
    assert residency.fetched(on_disk(E), Tier.DISK, 0.0) == []


def test_pinned_slots_are_not_among_those_that_are_left_to_others() -> None:
    residency = full_with_one_in_steady_use(2)
    residency.pin(B, 0.0)
    residency.want(9, E, 0.0)
    assert residency.fetched(on_disk(E), Tier.DISK, 0.0) == [Swap((on_disk(E),), (), (on_disk(A),))]


def test_of_adapters_in_steady_use_the_coldest_makes_room() -> None:
    residency = Residency(2)
    for number, adapter, times in ((1, A, 60), (2, B, 30)):
        resident(residency, number, adapter)
        residency.finish(number, 0.0)
        for n in range(times):
            residency.want(100 * number + n, adapter, 0.0)
            residency.finish(100 * number + n, 0.0)
    residency.want(3, C, 0.0)
    assert residency.fetched(on_disk(C), Tier.DISK, 0.0) == [Swap((on_disk(C),), (), (on_disk(B),))]


def test_an_adapter_that_is_asked_for_no_more_is_soon_in_steady_use_no_longer() -> None:
    residency = Residency(2)
    resident(residency, 1, A)
    for n in range(300):
        residency.want(100 + n, A, n / 10)
        residency.finish(100 + n, n / 10)
    residency.finish(1, 30.0)
    assert residency.states(30.0, 1.0)[0].steady
    assert not residency.states(60.0, 1.0)[0].steady
    resident(residency, 2, B, 600.0)
    residency.finish(2, 600.0)
    residency.want(3, C, 600.0)
    assert residency.fetched(on_disk(C), Tier.DISK, 600.0) == [
        Swap((on_disk(C),), (), (on_disk(A),))
    ]


def test_the_one_that_was_asked_for_least_makes_room_whenever_it_was_used_last() -> None:
    residency = Residency(2)
    resident(residency, 1, A)
    for n in range(3):
        residency.want(10 + n, A, 0.0)
        residency.finish(10 + n, 0.0)
    residency.finish(1, 0.0)
    resident(residency, 2, B, 5.0)  # later, and once
    residency.finish(2, 5.0)
    residency.want(3, C, 6.0)
    assert residency.fetched(on_disk(C), Tier.DISK, 6.0) == [Swap((on_disk(C),), (), (on_disk(B),))]


def test_an_adapter_with_a_running_request_is_not_evicted_and_its_end_makes_room() -> None:
    residency = Residency(1)
    resident(residency, 1, A)
    in_line(residency, 2, B)
    assert residency.finish(1, 0.0) == [Swap((on_disk(B),), (), (on_disk(A),))]


def test_a_request_that_leaves_the_line_takes_its_adapter_with_it() -> None:
    residency = Residency(1)
    resident(residency, 1, A)
    in_line(residency, 2, B)
    in_line(residency, 3, C)
    assert residency.finish(2, 0.0) == []
    assert stage(residency, B) is ResidencyStage.WARM
    assert residency.finish(1, 0.0) == [Swap((on_disk(C),), (), (on_disk(B), on_disk(A)))]


def test_a_request_that_leaves_during_the_fetch_leaves_it_warm() -> None:
    residency = Residency(1)
    residency.want(1, A, 0.0)
    assert residency.finish(1, 0.0) == []
    assert residency.fetched(on_disk(A), Tier.REMOTE, 0.0) == []
    assert stage(residency, A) is ResidencyStage.WARM and residency.want(2, A, 0.0) == [
        Swap((on_disk(A),))
    ]


def test_what_nobody_came_for_does_not_outgrow_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WARM_BYTES", 2000)
    residency = Residency(1, 9)
    for number, ref in enumerate((A, B, C)):
        residency.want(number, ref, 0.0)
        residency.finish(number, 0.0)
    assert (
        residency.fetched(on_disk(A), Tier.REMOTE, 0.0)
        == residency.fetched(on_disk(B), Tier.REMOTE, 0.0)
        == []
    )
    assert residency.fetched(on_disk(C), Tier.REMOTE, 0.0) == [Swap((), (), (on_disk(A),))]
    assert residency.want(4, A, 0.0) == [], "it is on its way out"
    assert residency.swapped({}, 0.0) == [Fetch(A)]


def test_a_request_that_leaves_during_the_load_is_not_started() -> None:
    residency = Residency(1)
    residency.want(1, A, 0.0)
    residency.fetched(on_disk(A), Tier.REMOTE, 0.0)
    assert residency.finish(1, 0.0) == []
    assert residency.swapped({}, 0.0) == []
    assert stage(residency, A) is ResidencyStage.RESIDENT


def test_an_end_that_is_told_twice_counts_once() -> None:
    residency = Residency(1)
    resident(residency, 1, A)
    residency.want(2, A, 0.0)
    residency.finish(1, 0.0)
    assert residency.finish(1, 0.0) == [] and residency.finish(99, 0.0) == []
    assert residency.slots.uses(A) == 1


def test_requests_for_a_victim_wait_in_line_behind_those_who_were_there_before() -> None:
    residency = Residency(1)
    resident(residency, 1, A)
    in_line(residency, 2, B)
    in_line(residency, 3, C)
    residency.finish(1, 0.0)
    assert residency.want(4, A, 0.0) == []
    assert residency.swapped({}, 0.0) == [Fetch(A), Start(2, on_disk(B), Tier.REMOTE)]
    assert residency.fetched(on_disk(A), Tier.DISK, 0.0) == []
    assert residency.finish(2, 0.0) == [Swap((on_disk(C),), (), (on_disk(B),))]
    residency.swapped({}, 0.0)
    assert residency.finish(3, 0.0) == [Swap((on_disk(A),), (), (on_disk(C),))]
    assert residency.swapped({}, 0.0) == [Start(4, on_disk(A), Tier.DISK)]


# ---- failures ------------------------------------------------------------------------------------


def test_a_failed_fetch_is_told_to_all_who_wait_and_not_tried_again_before_its_time() -> None:
    residency = Residency(1)
    residency.want(1, A, 0.0)
    residency.want(2, A, 0.0)
    told = residency.failed(A, Failure("store_unavailable", "down", True), 10.0)
    assert told == [Reject(r, "store_unavailable", "down", True) for r in (1, 2)]
    almost = 10.0 + FAILED_FOR_S - 0.001
    assert residency.want(3, A, almost) == [Reject(3, "store_unavailable", "down", True)]
    assert residency.want(4, A, 10.0 + FAILED_FOR_S) == [Fetch(A)]
    assert residency.waiting == 1


def test_a_failed_load_gives_its_slot_to_the_next_in_line() -> None:
    residency = Residency(1)
    residency.want(1, A, 0.0)
    residency.fetched(on_disk(A), Tier.REMOTE, 0.0)
    in_line(residency, 2, B)
    assert residency.swapped({A: Failure("invalid_adapter", "rank", False)}, 0.0) == [
        Reject(1, "invalid_adapter", "rank", False),
        Swap((on_disk(B),)),
    ]


def test_a_failed_load_after_an_eviction_leaves_a_free_slot() -> None:
    residency = Residency(1)
    resident(residency, 1, A)
    residency.finish(1, 0.0)
    residency.want(2, B, 0.0)
    assert residency.fetched(on_disk(B), Tier.REMOTE, 0.0) == [
        Swap((on_disk(B),), (), (on_disk(A),))
    ]
    assert residency.swapped({B: Failure("invalid_adapter", "rank", False)}, 0.0) == [
        Reject(2, "invalid_adapter", "rank", False)
    ]
    assert len(residency.slots) == 0
    assert residency.want(3, A, 0.0) == [Fetch(A)]
    assert residency.fetched(on_disk(A), Tier.DISK, 0.0) == [Swap((on_disk(A),))]


def test_a_failure_of_one_version_is_none_of_another() -> None:
    residency = Residency(1)
    residency.want(1, A, 0.0)
    residency.failed(A, Failure("invalid_adapter", "rank", False), 0.0)
    newer = AdapterRef("tiny", "a", "d2")
    assert residency.want(2, newer, 0.0) == [Fetch(newer)]


def test_the_memory_of_failures_is_bounded_and_forgets_the_oldest() -> None:
    residency = Residency(1)
    refs = [AdapterRef("tiny", f"x{i}", "d") for i in range(MAX_FAILED + 1)]
    for i, ref in enumerate(refs):
        residency.want(i, ref, 0.0)
        residency.failed(ref, Failure("invalid_adapter", "rank", False), 0.0)
    assert len(residency._failed) == MAX_FAILED
    assert residency.want(-1, refs[0], 0.0) == [Fetch(refs[0])]
    assert isinstance(residency.want(-2, refs[1], 0.0)[0], Reject)


# ---- how long an adapter waits for a slot -------------------------------------------------------


def starving(now: float = 0.0) -> Residency:
    """One slot, in use by request 1. Request 2 for B has waited since `now`."""
    residency = Residency(1)
    resident(residency, 1, A)
    in_line(residency, 2, B, now)
    return residency


def test_the_wait_for_a_slot_ends_exactly_when_it_says() -> None:
    residency = starving()
    residency.tick(SLOT_WAIT_S - 0.001)
    assert stage(residency, A) is ResidencyStage.RESIDENT
    residency.tick(SLOT_WAIT_S)
    assert stage(residency, A) is ResidencyStage.CLOSING


def test_a_closing_adapter_lets_nobody_new_in_and_goes_with_its_last_request() -> None:
    residency = starving()
    residency.want(3, A, 0.0)
    residency.tick(SLOT_WAIT_S)
    assert residency.want(4, A, SLOT_WAIT_S) == []
    assert residency.finish(1, 3.0) == []
    assert residency.finish(3, 3.0) == [Swap((on_disk(B),), (), (on_disk(A),))]
    assert residency.swapped({}, 3.0) == [Fetch(A), Start(2, on_disk(B), Tier.REMOTE)]
    assert residency.fetched(on_disk(A), Tier.DISK, 3.0) == []
    assert residency.finish(2, 3.0) == [Swap((on_disk(A),), (), (on_disk(B),))]


def test_a_closing_adapter_reopens_and_its_waiters_start_when_the_line_empties() -> None:
    residency = starving()
    residency.tick(SLOT_WAIT_S)
    assert residency.want(3, A, 2.0) == []
    assert residency.finish(2, 2.0) == [Start(3, on_disk(A), Tier.GPU)]
    assert stage(residency, A) is ResidencyStage.RESIDENT
    assert residency.want(4, A, 2.0) == [Start(4, on_disk(A), Tier.GPU)]


def test_a_closing_adapter_reopens_when_another_slot_served_the_line() -> None:
    residency = Residency(2)
    resident(residency, 1, A)
    resident(residency, 2, B)
    in_line(residency, 3, C)
    residency.tick(SLOT_WAIT_S)
    assert stage(residency, A) is ResidencyStage.CLOSING
    assert residency.want(4, A, 2.0) == []
    assert residency.finish(2, 2.0) == [
        Start(4, on_disk(A), Tier.GPU),
        Swap((on_disk(C),), (), (on_disk(B),)),
    ]
    assert residency.swapped({}, 2.0) == [Start(3, on_disk(C), Tier.REMOTE)]


def test_no_more_slots_close_than_adapters_wait_too_long_the_longest_unasked_first() -> None:
    residency = Residency(2)
    resident(residency, 1, A)
    resident(residency, 2, B)
    residency.want(3, A, 0.0)
    in_line(residency, 4, C)
    in_line(residency, 5, D, 0.75)
    for now in (1.0, 1.7):
        residency.tick(now)
    assert (stage(residency, A), stage(residency, B)) == (
        ResidencyStage.RESIDENT,
        ResidencyStage.CLOSING,
    )
    residency.tick(1.75)
    assert stage(residency, A) is ResidencyStage.CLOSING
    assert residency.finish(5, 3.0) == []
    assert sum(stage(residency, a) is ResidencyStage.CLOSING for a in (A, B)) == 1, (
        "one more closes than wait"
    )


def test_of_two_in_line_the_older_goes_first_unless_enough_requests_wait_for_the_other() -> None:
    for company, first in ((1, C), (8, D)):
        residency = Residency(1)
        resident(residency, 1, A)
        in_line(residency, 2, C)
        in_line(residency, 3, D, 0.3)
        for number in range(4, 3 + company):
            residency.want(number, D, 0.3)
        swaps = residency.finish(1, 1.0)
        assert [s.enter for s in swaps if isinstance(s, Swap)] == [(on_disk(first),)]


def test_a_request_for_a_closed_adapter_keeps_its_age_in_line() -> None:
    residency = Residency(2, 9)
    resident(residency, 1, A)
    resident(residency, 2, B)
    in_line(residency, 3, C)
    in_line(residency, 4, D)
    residency.tick(SLOT_WAIT_S)
    residency.want(5, A, 1.0)
    residency.finish(1, 2.0)
    residency.swapped({}, 2.0)
    in_line(residency, 6, E, 1.5)
    assert residency.finish(2, 3.0) == [Swap((on_disk(D),), (on_disk(B),))]
    residency.swapped({}, 3.0)
    assert residency.finish(4, 4.0) == [Swap((on_disk(A),), (on_disk(D),))]


def test_a_pinned_adapter_never_closes() -> None:
    residency = starving()
    residency.slots.pin(A)
    residency.tick(100.0)
    assert stage(residency, A) is ResidencyStage.RESIDENT


def test_nothing_closes_while_nobody_waits_for_a_slot() -> None:
    residency = Residency(1)
    resident(residency, 1, A)
    residency.want(2, B, 0.0)  # not fetched yet
    residency.tick(100.0)
    assert stage(residency, A) is ResidencyStage.RESIDENT


# ---- what operators ask for ----------------------------------------------------------------------


def test_what_is_only_to_be_cached_is_fetched_and_takes_no_slot() -> None:
    residency = Residency(1)
    assert residency.cache(-1, A, 0.0) == [Fetch(A)]
    assert residency.cache(-2, A, 0.0) == []
    assert [(s.tier, s.loading, s.in_flight) for s in residency.states(0.0, 1.0)] == [
        (Tier.REMOTE, False, 0)
    ]
    assert residency.cached(A, 0.0) == [CommandDone(-1), CommandDone(-2)]
    assert len(residency.slots) == 0 and A not in residency.adapters()


def test_a_request_that_comes_while_its_adapter_is_being_cached_shares_the_fetch() -> None:
    residency = Residency(1)
    residency.cache(-1, A, 0.0)
    assert residency.want(2, A, 0.0) == []
    assert residency.cached(A, 0.0) == [CommandDone(-1)]
    assert residency.cache(-3, A, 0.0) == []
    assert residency.fetched(on_disk(A), Tier.REMOTE, 0.0) == [CommandDone(-3), Swap((on_disk(A),))]


def test_what_is_in_the_engine_is_cached_already_and_what_failed_is_refused() -> None:
    residency = Residency(1)
    resident(residency, 1, A)
    assert residency.cache(-1, A, 0.0) == [CommandDone(-1)]
    residency.cache(-2, B, 0.0)
    assert residency.failed(B, Failure("invalid_adapter", "no", False), 0.0) == [
        Reject(-2, "invalid_adapter", "no", False)
    ]
    assert residency.cache(-3, B, 0.0) == [Reject(-3, "invalid_adapter", "no", False)]


def test_an_idle_adapter_that_is_evicted_leaves_at_once_and_its_slot_goes_to_the_line() -> None:
    residency = Residency(1, 4)
    resident(residency, 1, A)
    residency.finish(1, 0.0)
    assert residency.evict(-1, A, 0.0) == [Swap((), (), (on_disk(A),))]
    assert len(residency.slots) == 0
    assert residency.states(0.0, 1.0) == ()
    assert residency.swapped({}, 0.0) == [CommandDone(-1)]
    assert stage(residency, A) is None


def test_an_adapter_in_host_memory_that_is_evicted_leaves_it() -> None:
    residency = Residency(1, 4)
    resident(residency, 1, A)
    residency.finish(1, 0.0)
    residency.want(2, B, 0.0)
    residency.fetched(on_disk(B), Tier.REMOTE, 0.0)
    residency.swapped({}, 0.0)
    assert stage(residency, A) is ResidencyStage.WARM
    assert residency.evict(-1, A, 0.0) == [Swap((), (), (on_disk(A),))]
    assert residency.swapped({}, 0.0) == [CommandDone(-1)]
    assert {s.name for s in residency.states(0.0, 1.0)} == {"b"}


def test_an_adapter_that_was_evicted_from_host_memory_is_not_asked_to_leave_it_again() -> None:
    residency = Residency(1, 2)
    for number, ref in enumerate((A, B), 1):
        residency.want(number, ref, 0.0)
        residency.fetched(on_disk(ref), Tier.REMOTE, 0.0)
        residency.swapped({}, 0.0)
        residency.finish(number, 0.0)
    residency.evict(-1, A, 0.0)
    residency.swapped({}, 0.0)
    for number, ref, drop in ((3, C, ()), (4, D, (on_disk(B),))):
        residency.want(number, ref, 0.0)
        [swap] = residency.fetched(on_disk(ref), Tier.REMOTE, 0.0)
        assert isinstance(swap, Swap) and swap.unload == drop
        residency.swapped({}, 0.0)
        residency.finish(number, 0.0)


def test_an_evicted_adapter_serves_who_comes_and_leaves_with_its_last_request() -> None:
    residency = Residency(1)
    resident(residency, 1, A)
    assert residency.evict(-1, A, 0.0) == []
    assert residency.want(2, A, 0.0) == [Start(2, on_disk(A), Tier.GPU)]
    assert residency.finish(1, 0.0) == []
    assert residency.finish(2, 0.0) == [Swap((), (), (on_disk(A),))]
    assert residency.want(3, A, 0.0) == []
    assert residency.swapped({}, 0.0) == [CommandDone(-1), Fetch(A)]


def test_an_absent_adapter_is_evicted_already_and_a_coming_one_once_nobody_uses_it() -> None:
    residency = Residency(1)
    assert residency.evict(-1, A, 0.0) == [CommandDone(-1)]
    residency.want(1, A, 0.0)
    assert residency.evict(-2, A, 0.0) == []
    assert residency.failed(A, Failure("store_unavailable", "down", True), 0.0) == [
        Reject(1, "store_unavailable", "down", True),
        CommandDone(-2),
    ]


def test_a_pinned_adapter_makes_no_room_and_an_evicted_one_is_pinned_no_longer() -> None:
    residency = Residency(2)
    resident(residency, 1, A)
    residency.slots.pin(A)
    residency.finish(1, 0.0)
    resident(residency, 2, B)
    residency.finish(2, 0.0)
    residency.want(3, C, 0.0)
    assert residency.fetched(on_disk(C), Tier.DISK, 0.0) == [Swap((on_disk(C),), (), (on_disk(B),))]
    assert residency.evict(-1, A, 0.0) == [] and not residency.slots.pinned(A)
    assert residency.swapped({}, 0.0) == [
        Start(3, on_disk(C), Tier.DISK),
        Swap((), (), (on_disk(A),)),
    ]
    assert residency.swapped({}, 0.0) == [CommandDone(-1)]


def test_an_idle_adapter_that_is_pinned_no_longer_makes_room_at_once_for_those_in_line() -> None:
    newer = AdapterRef("tiny", "a", "d2")
    for unpin in (lambda r: r.unpin(A, 1.0), lambda r: r.pin(newer, 1.0)):
        residency = Residency(3, 9)
        for number, ref in enumerate((A, B, newer)):
            resident(residency, number, ref)
        residency.slots.pin(A)
        residency.finish(0, 0.0)
        in_line(residency, 3, C)
        assert unpin(residency) == [Swap((on_disk(C),), (on_disk(A),))]


def test_what_is_evicted_leaves_in_the_same_swap_in_which_its_slot_is_given() -> None:
    residency = Residency(2, 9)
    resident(residency, 1, A)
    resident(residency, 2, B)
    in_line(residency, 3, C)
    assert residency.evict(-1, A, 0.0) == []
    assert residency.finish(1, 0.0) == [Swap((on_disk(C),), (), (on_disk(A),))]
    assert residency.swapped({}, 0.0) == [CommandDone(-1), Start(3, on_disk(C), Tier.REMOTE)]


def test_an_evicted_adapter_that_was_closing_is_counted_as_closing_no_longer() -> None:
    residency = starving()
    residency.tick(SLOT_WAIT_S)
    residency.evict(-1, A, 2.0)
    assert residency.finish(1, 2.0) == [Swap((on_disk(B),), (), (on_disk(A),))]
    assert not residency._closing


# ---- heartbeats ----------------------------------------------------------------------------------


def test_what_a_heartbeat_says_of_each_stage() -> None:
    residency = Residency(1)
    resident(residency, 1, A)
    residency.want(2, A, 0.0)
    in_line(residency, 3, B, 1.0)
    residency.want(4, C, 1.0)
    states = {s.name: s for s in residency.states(1.5, load_s=2.0)}
    assert (states["a"].tier, states["a"].loading, states["a"].in_flight, states["a"].eta_s) == (
        Tier.GPU,
        False,
        2,
        0.0,
    )
    assert (states["b"].tier, states["b"].loading, states["b"].in_flight, states["b"].eta_s) == (
        Tier.CPU,
        True,
        1,
        1.5,
    )
    assert (states["c"].tier, states["c"].loading, states["c"].rank) == (Tier.REMOTE, True, 0)
    residency.finish(1, 2.0)
    residency.finish(2, 2.0)
    assert {s.name for s in residency.states(2.0, 2.0)} == {"b", "c"}, (
        "a victim on its way out is not offered to gateways"
    )


def test_a_victim_stays_in_host_memory_while_there_is_a_place_and_the_coldest_goes_first() -> None:
    residency = Residency(1, 2)
    resident(residency, 1, A)
    residency.finish(1, 0.0)
    assert residency.want(2, B, 0.0) == [Fetch(B)]
    assert residency.fetched(on_disk(B), Tier.REMOTE, 0.0) == [Swap((on_disk(B),), (on_disk(A),))]
    residency.swapped({}, 0.0)
    assert {s.name: s.tier for s in residency.states(0.0, 1.0)} == {"a": Tier.CPU, "b": Tier.GPU}
    residency.finish(2, 0.0)
    residency.want(3, C, 0.0)
    assert residency.fetched(on_disk(C), Tier.REMOTE, 0.0) == [
        Swap((on_disk(C),), (on_disk(B),), (on_disk(A),))
    ]


def test_one_request_for_another_does_not_cost_an_often_used_adapter_its_place_in_host_memory() -> (
    None
):
    residency = Residency(1, 3)
    for request, adapter in enumerate((A, A, A, B, C, D)):
        now = float(request)
        residency.want(request, adapter, now)
        dropped = (
            residency.fetched(on_disk(adapter), Tier.REMOTE, now)
            if request == 0 or adapter != A
            else []
        )
        residency.swapped({}, now) if request == 0 or adapter != A else None
        residency.finish(request, now)
    assert dropped == [Swap((on_disk(D),), (on_disk(C),), (on_disk(B),))], (
        "B was used later than A, but only once"
    )


def test_a_warm_adapter_is_loaded_again_without_a_fetch() -> None:
    residency = Residency(1, 2)
    resident(residency, 1, A)
    residency.finish(1, 0.0)
    residency.want(2, B, 0.0)
    residency.fetched(on_disk(B), Tier.REMOTE, 0.0)
    residency.swapped({}, 0.0)
    residency.finish(2, 0.0)
    assert residency.want(3, A, 0.0) == [Swap((on_disk(A),), (on_disk(B),))]
    assert residency.swapped({}, 0.0) == [Start(3, on_disk(A), Tier.CPU)]


# ---- anything, in any order ----------------------------------------------------------------------

REFS = [A, B, C, D, E]


class ResidencyMachine(RuleBasedStateMachine):
    """Drives Residency as the agent does. Its engine and its store answer in any order, fail, and
    are cancelled at any time.

    `engine` is what a real engine would hold. It fails the test if it gets more adapters than
    slots, or loses one that is in use.
    """

    @initialize(slots=st.integers(1, 3), more=st.integers(0, 3))
    def start(self, slots: int, more: int) -> None:
        self.size, self.places = slots, slots + more
        self.residency = Residency(slots, slots + more)
        self.warm: set[AdapterRef] = set()
        self.now = 0.0
        self.count = 0
        self.wants: dict[int, AdapterRef] = {}
        self.running: dict[int, AdapterRef] = {}
        self.told: dict[int, str] = {}
        self.fetching: list[AdapterRef] = []
        self.swap: Swap | None = None
        self.engine: set[AdapterRef] = set()
        # what vLLM counts as in its host memory: in a slot, or has been in one
        self.registered: set[AdapterRef] = set()
        self.failed_at: dict[AdapterRef, float] = {}
        self.commands: dict[int, str] = {}

    def perform(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Fetch(adapter):
                    assert (
                        adapter not in self.fetching
                        and adapter not in self.engine
                        and adapter not in self.warm
                    )
                    assert self.now >= self.failed_at.get(adapter, -100.0) + FAILED_FOR_S, (
                        "tried again too early"
                    )
                    self.fetching.append(adapter)
                case Swap(enter, demote, unload):
                    assert self.swap is None, "two swaps at once"
                    self.swap = instruction
                    gone = {a.ref for a in demote + unload}
                    assert not gone & set(self.running.values()), "out of its slot while in use"
                    assert not any(self.residency.slots.pinned(a) for a in gone), (
                        "evicted though pinned"
                    )
                    assert all(a.ref in self.engine for a in demote) and all(
                        a.ref in self.engine | self.warm for a in unload
                    )
                    assert len({a.ref for a in enter + demote + unload}) == len(
                        enter + demote + unload
                    )
                    assert all(a.ref in self.warm for a in enter)
                    self.warm = (self.warm | {a.ref for a in demote}) - {
                        a.ref for a in enter + unload
                    }
                    self.engine -= gone
                    self.registered = (self.registered - {a.ref for a in unload}) | {
                        a.ref for a in enter
                    }
                    assert len(self.registered) <= self.places, (
                        "more than vLLM has room for: it would refuse a good adapter"
                    )
                    assert len(self.engine) + len(enter) <= self.size
                case Start(request, adapter, _):
                    assert self.wants.pop(request) == adapter.ref
                    assert adapter.ref in self.engine
                    self.tell(request, "start")
                    self.running[request] = adapter.ref
                    if request in self.commands:
                        if self.commands.pop(request) == "pin" and self.residency.slots.may_pin(
                            adapter.ref
                        ):
                            self.perform(self.residency.pin(adapter.ref, self.now))
                        del self.running[request]
                        self.perform(self.residency.finish(request, self.now))
                case CommandDone(request):
                    del self.wants[request]
                    asked = self.commands.pop(request)
                    assert asked in ("cache", "evict")
                    self.tell(request, asked)
                case Reject(request):
                    adapter_wanted = self.wants.pop(request)
                    asked = self.commands.pop(request, "")
                    assert (
                        asked == "evict" or self.now < self.failed_at[adapter_wanted] + FAILED_FOR_S
                    )
                    self.tell(request, "reject")
                    # The agent forgets the job and tells residency once more.
                    self.perform(self.residency.finish(request, self.now))

    def tell(self, request: int, what: str) -> None:
        assert request not in self.told, (
            f"request {request} was told {self.told[request]} and then {what}"
        )
        self.told[request] = what

    @rule(adapters=st.lists(st.sampled_from(REFS), min_size=1, max_size=4))
    def requests_come(self, adapters: list[AdapterRef]) -> None:
        for adapter in adapters:
            self.a_request_comes(adapter)

    @rule()
    def all_fetches_end_well(self) -> None:
        while self.fetching:
            adapter = self.fetching.pop(0)
            self.arrive(adapter, Tier.REMOTE)

    def arrive(self, adapter: AdapterRef, came_from: Tier) -> None:
        self.warm.add(adapter)
        self.perform(self.residency.fetched(on_disk(adapter), came_from, self.now))

    def a_request_comes(self, adapter: AdapterRef) -> None:
        self.count += 1
        self.wants[self.count] = adapter
        self.perform(self.residency.want(self.count, adapter, self.now))

    @rule(
        adapter=st.sampled_from(REFS),
        what=st.sampled_from(["load", "pin", "cache", "evict", "unpin"]),
    )
    def an_operator_asks(self, adapter: AdapterRef, what: str) -> None:
        if what in ("unpin", "evict"):  # the later word holds
            self.commands |= {
                r: "load"
                for r, asked in self.commands.items()
                if asked == "pin" and self.wants[r] == adapter
            }
        if what == "unpin":
            return self.perform(self.residency.unpin(adapter, self.now))
        self.count += 1
        self.wants[self.count], self.commands[self.count] = adapter, what
        ask = {"cache": self.residency.cache, "evict": self.residency.evict}.get(
            what, self.residency.want
        )
        self.perform(ask(self.count, adapter, self.now))
        return None

    @precondition(lambda self: self.fetching)
    @rule(data=st.data())
    def the_files_of_a_fetch_are_there(self, data: st.DataObject) -> None:
        adapter = data.draw(st.sampled_from(self.fetching))
        self.perform(self.residency.cached(adapter, self.now))
        if adapter not in self.residency.adapters():
            self.fetching.remove(adapter)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def a_running_request_ends(self, data: st.DataObject) -> None:
        self.end(data.draw(st.sampled_from(sorted(self.running))))

    @precondition(lambda self: self.wants.keys() - self.commands.keys())
    @rule(data=st.data())
    def a_waiting_request_is_cancelled(self, data: st.DataObject) -> None:
        self.end(data.draw(st.sampled_from(sorted(self.wants.keys() - self.commands.keys()))))

    def end(self, request: int) -> None:
        if self.running.pop(request, None) is None:
            del self.wants[request]
            self.tell(request, "cancelled")
        self.perform(self.residency.finish(request, self.now))

    @precondition(lambda self: self.fetching)
    @rule(
        data=st.data(),
        ok=st.sampled_from([True, True, False]),
        came_from=st.sampled_from([Tier.DISK, Tier.REMOTE]),
    )
    def a_fetch_ends(self, data: st.DataObject, ok: bool, came_from: Tier) -> None:
        adapter = data.draw(st.sampled_from(self.fetching))
        self.fetching.remove(adapter)
        if ok:
            self.arrive(adapter, came_from)
        else:
            self.fail(adapter)

    @precondition(lambda self: self.swap is not None)
    @rule(fails=st.sets(st.sampled_from(REFS), max_size=2))
    def the_swap_ends(self, fails: set[AdapterRef]) -> None:
        assert self.swap is not None
        entered, self.swap = {a.ref for a in self.swap.enter}, None
        failures = {a: Failure("invalid_adapter", "no", False) for a in fails & entered}
        self.engine |= entered - fails
        self.registered -= entered & fails
        for ref in failures:
            self.failed_at[ref] = self.now
        self.perform(self.residency.swapped(failures, self.now))

    def fail(self, adapter: AdapterRef) -> None:
        self.failed_at[adapter] = self.now
        self.perform(
            self.residency.failed(adapter, Failure("invalid_adapter", "no", False), self.now)
        )

    @rule(seconds=st.sampled_from([0.0, 0.7, SLOT_WAIT_S, FAILED_FOR_S]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.perform(self.residency.tick(self.now))

    @invariant()
    def slots_are_never_overcommitted_and_nobody_waits_for_a_free_one(self) -> None:
        if not hasattr(self, "residency"):
            return
        residency = self.residency
        coming = {a.ref for a in self.swap.enter} if self.swap else set()
        assert len(self.engine | coming) <= self.size
        assert len(residency.slots) <= self.size
        pinned = {a for a in REFS if residency.slots.pinned(a)}
        assert pinned <= self.engine and len(pinned) < self.size + (not pinned)
        others = {r for r, what in self.commands.items() if what in ("cache", "evict")}
        assert residency.waiting == len(self.wants) - len(others)
        assert {r: residency._users[r] for r in residency._users} == self.running
        for adapter in REFS:
            assert residency.slots.uses(adapter) == list(self.running.values()).count(adapter)
            assert adapter in self.engine or adapter not in self.running.values()
        if self.swap is None:
            idle = [a for a in self.engine if a not in self.running.values() and a not in pinned]
            in_line_ = [a for a in REFS if stage(residency, a) is ResidencyStage.CACHED]
            assert not in_line_ or (len(self.engine) == self.size and not idle), (
                "somebody waits for a slot that could be given"
            )
        for request, ref in self.wants.items():
            if request in others:
                continue
            assert stage(residency, ref) is not ResidencyStage.RESIDENT, (
                "a request waits for an adapter that is there"
            )
            assert ref in self.fetching or stage(residency, ref) in (
                ResidencyStage.CACHED,
                ResidencyStage.LOADING,
                ResidencyStage.CLOSING,
                ResidencyStage.UNLOADING,
            )
        closing = [a for a in REFS if stage(residency, a) is ResidencyStage.CLOSING]
        assert len(closing) <= len(residency._line) or self.swap is not None
        assert set(closing) == set(residency._closing)
        on_the_way = len(self.swap.enter + self.swap.unload) if self.swap else 0
        known = (
            len(self.engine) + len(self.warm) + len(self.wants) + len(self.fetching) + on_the_way
        )
        assert len(residency._entries) <= known, "an entry was left behind"
        anew = [
            residency._state(a, e, self.now, 1.0)
            for a, e in residency._entries.items()
            if e.stage is not ResidencyStage.UNLOADING
        ]
        assert list(residency.states(self.now, 1.0)) == anew, (
            "what a heartbeat says of a warm adapter is out of date"
        )

    def settle(self) -> None:
        """The store and the engine answer everything that is open, without a failure."""
        for _ in range(100):
            if self.fetching:
                adapter = self.fetching.pop(0)
                self.arrive(adapter, Tier.DISK)
            elif self.swap is not None:
                self.the_swap_ends(set())
            else:
                return
        raise AssertionError("it never settles")

    def teardown(self) -> None:
        if not hasattr(self, "residency"):
            return
        self.settle()
        self.everybody_gets_a_slot_in_the_end()
        while self.running:
            self.end(min(self.running))
            self.settle()
        assert not self.wants and self.residency.waiting == 0
        assert sorted(self.told) == list(range(1, self.count + 1)), "somebody was never told"
        assert not [
            a
            for a in REFS
            if stage(self.residency, a) not in (None, ResidencyStage.RESIDENT, ResidencyStage.WARM)
        ], "something hangs"

    def everybody_gets_a_slot_in_the_end(self) -> None:
        """Requests for resident adapters never stop coming, running ones end, and time passes.
        Everybody who waits now is served.
        """
        patient = {r for r in self.wants if self.commands.get(r) != "evict"}
        for _ in range(4 * len(REFS)):
            if not patient & self.wants.keys():
                return
            self.now += SLOT_WAIT_S
            running = sorted(self.running)
            for adapter in sorted(self.engine, key=str):
                self.a_request_comes(adapter)
            self.perform(self.residency.tick(self.now))
            for request in running:
                self.end(request)
                self.settle()
        raise AssertionError(f"requests {patient & self.wants.keys()} starve")


TestResidencyMachine = ResidencyMachine.TestCase
TestResidencyMachine.settings = settings(max_examples=150)  # three slots and a line take some luck


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_a_busy_adapter_cannot_starve_the_others(slots: int) -> None:
    """Every slot always has a running request, and new ones keep coming for resident adapters. A
    cold adapter is served within twice SLOT_WAIT_S.
    """
    residency = Residency(slots)
    busy = [AdapterRef("tiny", f"busy{i}", "d") for i in range(slots)]
    for i, ref in enumerate(busy):
        residency.want(i, ref, 0.0)
        residency.fetched(Loaded(ref, i, Path("/nowhere"), 8, 0), Tier.DISK, 0.0)
        residency.swapped({}, 0.0)
    running = dict(enumerate(busy))
    in_line(residency, 1000, C, 0.0)
    number, now = slots, 0.0
    while now < 2 * SLOT_WAIT_S:
        now += 0.25
        instructions = residency.tick(now)
        for ref in busy:  # one more comes before the oldest ends: never idle by itself
            number += 1
            for instruction in residency.want(number, ref, now):
                assert isinstance(instruction, Start)
                running[number] = ref
        for ref in busy:
            oldest = next((r for r, a in running.items() if a == ref), None)
            if oldest is not None:
                del running[oldest]
                instructions += residency.finish(oldest, now)
        if any(isinstance(i, Swap) and C in [a.ref for a in i.enter] for i in instructions):
            return
    raise AssertionError("the cold adapter never got a slot")
