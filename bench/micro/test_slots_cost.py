"""Shell. What the slot table costs per request and per load."""

from __future__ import annotations

import pytest

from bench.micro.conftest import PerUnit
from shared.adapters.identity import AdapterRef
from worker.adapters.slot_table import Evict, SlotTable

SIZES = (16, 256)


def _full(size: int) -> tuple[SlotTable, list[AdapterRef]]:
    table = SlotTable(size)
    refs = [AdapterRef("base", f"adapter-{number}", "0" * 64) for number in range(size)]
    for ref in refs:
        table.occupy(ref)
    return table, refs


@pytest.mark.parametrize("size", SIZES)
def test_hit_acquire_and_release(per_unit: PerUnit, size: int) -> None:
    table, refs = _full(size)
    ref = refs[size // 2]

    def call() -> None:
        table.acquire(ref)
        table.release(ref)

    per_unit(call, 1, "request")


@pytest.mark.parametrize("size", SIZES)
def test_miss_find_the_victim_and_swap(per_unit: PerUnit, size: int) -> None:
    table, _ = _full(size)

    def call() -> None:
        room = table.room()
        assert isinstance(room, Evict)
        table.vacate(room.victim)
        table.occupy(room.victim)

    per_unit(call, 1, "load")


@pytest.mark.parametrize("size", SIZES)
def test_room_with_one_idle_slot(per_unit: PerUnit, size: int) -> None:
    table, refs = _full(size)
    for ref in refs[:-1]:
        table.acquire(ref)
    per_unit(table.room, 1, "load")
