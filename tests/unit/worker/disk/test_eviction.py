"""Pure. What leaves the disk first."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from worker.disk.eviction import EvictionCandidate, UseFrequency, bytes_to_free, leaving, used

MIB = 1 << 20
sizes = st.integers(0, 10**12)


def first_to_go(**heats: tuple[UseFrequency, int]) -> str:
    return leaving(
        [EvictionCandidate(key, size, heat.priority) for key, (heat, size) in heats.items()]
    )[0].key


def used_times(times: int, cost_s: float, size_bytes: int, clock: float = 0.0) -> UseFrequency:
    heat = UseFrequency(cost_s=cost_s)
    for _ in range(times):
        heat = used(heat, size_bytes, clock)
    return heat


def test_of_two_equal_adapters_the_one_used_less_goes_first() -> None:
    assert (
        first_to_go(rare=(used_times(1, 1.0, MIB), MIB), often=(used_times(9, 1.0, MIB), MIB))
        == "rare"
    )


def test_of_two_adapters_used_alike_the_one_that_comes_back_quicker_goes_first() -> None:
    assert (
        first_to_go(slow=(used_times(3, 5.0, MIB), MIB), quick=(used_times(3, 0.1, MIB), MIB))
        == "quick"
    )


def test_one_large_adapter_goes_before_many_small_ones_that_cost_the_same() -> None:
    assert (
        first_to_go(
            small=(used_times(2, 1.0, MIB), MIB), large=(used_times(2, 1.0, 100 * MIB), 100 * MIB)
        )
        == "large"
    )


def test_what_was_popular_long_ago_goes_before_what_is_used_now() -> None:
    old = used_times(50, 1.0, MIB)
    clock = old.priority * 1.01  # evictions since then have raised it
    assert first_to_go(old=(old, MIB), new=(used_times(1, 1.0, MIB, clock), MIB)) == "old"


def test_a_priority_that_is_no_number_ranks_lowest_instead_of_confusing_the_order() -> None:
    order = leaving(
        [
            EvictionCandidate("a", 1, 2.0),
            EvictionCandidate("b", 1, math.nan),
            EvictionCandidate("c", 1, math.inf),
            EvictionCandidate("d", 1, 1.0),
        ]
    )
    assert [c.key for c in order] == ["b", "c", "d", "a"]


def test_without_a_budget_only_the_disk_counts() -> None:
    assert (
        bytes_to_free(10**12, 10, budget_bytes=0, free_bytes=100, keep_free_bytes=50).must_bytes
        == 0
    )
    assert bytes_to_free(0, 60, budget_bytes=0, free_bytes=100, keep_free_bytes=50).must_bytes == 10


def test_a_newcomer_that_just_fits_evicts_nobody() -> None:
    assert (
        bytes_to_free(900, 100, budget_bytes=1000, free_bytes=10**6, keep_free_bytes=0).aim_bytes
        == 0
    )
    assert (
        bytes_to_free(901, 100, budget_bytes=1000, free_bytes=10**6, keep_free_bytes=0).must_bytes
        == 1
    )


@given(sizes, sizes, sizes, sizes, sizes)
def test_after_freeing_what_must_go_the_newcomer_fits_both_bounds(
    used_bytes: int, incoming: int, budget: int, free: int, keep: int
) -> None:
    must = bytes_to_free(used_bytes, incoming, budget, free, keep).must_bytes
    assert not budget or used_bytes + incoming - must <= budget
    assert free + must - incoming >= keep


@given(st.lists(st.tuples(sizes, st.floats(0, 100)), min_size=1, max_size=20), st.floats(0, 1e6))
def test_every_use_raises_the_priority_and_never_below_the_clock(
    uses: list[tuple[int, float]], clock: float
) -> None:
    for size, cost_s in uses:
        once = used(UseFrequency(cost_s=cost_s), size, clock)
        twice = used(once, size, clock)
        assert clock <= once.priority <= twice.priority
