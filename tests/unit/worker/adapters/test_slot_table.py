"""The slot table, by example and against a plain list."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shared.adapters.identity import AdapterRef
from worker.adapters.slot_table import Evict, Free, Full, SlotTable

A, B, C, D = (AdapterRef("tiny", name, "d") for name in "abcd")


def table(size: int, *adapters: AdapterRef) -> SlotTable:
    slots = SlotTable(size)
    for adapter in adapters:
        slots.occupy(adapter)
    return slots


def test_a_slot_is_free_until_all_are_taken() -> None:
    slots = table(2, A)
    assert slots.room() == Free() and len(slots) == 1 and A in slots
    slots.occupy(B)
    assert slots.room() == Evict(A)


def test_a_table_without_slots_has_no_room() -> None:
    assert SlotTable(0).room() == Full()


def test_the_least_recently_used_idle_adapter_makes_room() -> None:
    slots = table(3, A, B, C)
    for adapter in (C, A, B):
        slots.acquire(adapter)
        slots.release(adapter)
    assert slots.room() == Evict(C)
    slots.acquire(C)
    assert slots.room() == Evict(A)


def test_the_coldest_idle_adapter_makes_room_and_of_equals_the_least_recently_used() -> None:
    slots = table(3, A, B, C)
    assert slots.room((), {A: 2.0, B: 1.0, C: 1.0}.__getitem__) == Evict(B)
    slots.acquire(B)
    assert slots.room((), {A: 2.0, B: 1.0, C: 1.0}.__getitem__) == Evict(C)
    slots.pin(C)
    assert slots.room((), {A: 2.0, B: 1.0, C: 1.0}.__getitem__) == Evict(A)


def test_an_end_of_a_request_is_no_use() -> None:
    slots = table(2, A, B)
    slots.acquire(A)
    slots.acquire(B)
    slots.release(B)
    slots.release(A)
    assert slots.room() == Evict(A)


def test_adapters_in_flight_or_pinned_never_make_room() -> None:
    slots = table(2, A, B)
    slots.acquire(A)
    slots.pin(B)
    assert slots.room() == Full()
    slots.unpin(B)
    assert slots.room() == Evict(B)
    slots.pin(B)
    slots.release(A)
    assert slots.room() == Evict(A)


def test_an_adapter_stays_until_its_last_request_ends() -> None:
    slots = table(1, A)
    slots.acquire(A)
    slots.acquire(A)
    slots.release(A)
    assert slots.room() == Full() and slots.uses(A) == 1
    with pytest.raises(AssertionError):
        slots.vacate(A)
    slots.release(A)
    slots.vacate(A)
    assert slots.room() == Free() and slots.uses(A) == 0 and A not in slots


def test_an_adapter_takes_one_slot_and_no_more_slots_than_there_are() -> None:
    slots = table(2, A)
    with pytest.raises(AssertionError):
        slots.occupy(A)
    slots.occupy(B)
    with pytest.raises(AssertionError):
        slots.occupy(C)


def test_a_release_without_a_use_is_a_bug() -> None:
    slots = table(1, A)
    with pytest.raises(AssertionError):
        slots.release(A)


def test_the_slot_to_close_is_the_one_longest_without_a_new_request_and_never_a_pinned_one() -> (
    None
):
    slots = table(3, A, B, C)
    assert slots.oldest_in_use() is None
    for adapter in (B, A, C):
        slots.acquire(adapter)
    assert slots.oldest_in_use() == B
    slots.acquire(B)
    assert slots.oldest_in_use() == A
    slots.pin(A)
    assert slots.oldest_in_use() == C
    assert slots.pinned(A) and not slots.pinned(C)


class SlotMachine(RuleBasedStateMachine):
    """Compares the table with a list in order of last use."""

    @initialize(size=st.integers(0, 3))
    def start(self, size: int) -> None:
        self.slots = SlotTable(size)
        self.size = size
        self.order: list[AdapterRef] = []
        self.uses: dict[AdapterRef, int] = {}
        self.pins: set[AdapterRef] = set()

    @rule(adapter=st.sampled_from([A, B, C, D]))
    def wants(self, adapter: AdapterRef) -> None:
        """As the owner does it: make room, occupy, use."""
        if adapter not in self.slots:
            match self.slots.room():
                case Full():
                    return
                case Evict(victim):
                    self.slots.vacate(victim)
                    self.order.remove(victim)
                    assert self.uses.pop(victim) == 0 and victim not in self.pins
                case Free():
                    pass
            self.slots.occupy(adapter)
            self.uses[adapter] = 0
        else:
            self.order.remove(adapter)
        self.slots.acquire(adapter)
        self.order.append(adapter)
        self.uses[adapter] += 1

    @precondition(lambda self: any(self.uses.values()))
    @rule(data=st.data())
    def ends(self, data: st.DataObject) -> None:
        adapter = data.draw(st.sampled_from([a for a, n in self.uses.items() if n]))
        self.slots.release(adapter)
        self.uses[adapter] -= 1

    @rule(adapter=st.sampled_from([A, B, C, D]), on=st.booleans())
    def pins_and_unpins(self, adapter: AdapterRef, on: bool) -> None:
        (self.slots.pin if on else self.slots.unpin)(adapter)
        (self.pins.add if on else self.pins.discard)(adapter)

    @invariant()
    def the_room_is_what_the_list_says(self) -> None:
        if not hasattr(self, "slots"):
            return
        assert len(self.slots) == len(self.order) <= self.size
        idle = [a for a in self.order if not self.uses[a] and a not in self.pins]
        busy = [a for a in self.order if self.uses[a] and a not in self.pins]
        expected = Free() if len(self.order) < self.size else Evict(idle[0]) if idle else Full()
        assert self.slots.room() == expected
        assert self.slots.oldest_in_use() == (busy[0] if busy else None)
        assert all(self.slots.uses(a) == self.uses.get(a, 0) for a in (A, B, C, D))


TestSlotMachine = SlotMachine.TestCase


def test_one_slot_always_stays_for_what_is_not_pinned() -> None:
    table = SlotTable(3)
    a, b, c = (AdapterRef("tiny", name, "d") for name in "abc")
    table.pin(a)
    table.pin(b)
    assert not table.may_pin(c)
    assert table.may_pin(a), "pinned already"
    table.unpin(a)
    assert table.may_pin(c)
    assert not SlotTable(1).may_pin(a)


def test_a_newer_version_takes_over_the_pin_of_its_name() -> None:
    table = SlotTable(2)
    old, new = AdapterRef("tiny", "a", "d1"), AdapterRef("tiny", "a", "d2")
    table.pin(old)
    assert table.may_pin(new)
    table.pin(new)
    assert table.pinned(new) and not table.pinned(old)
