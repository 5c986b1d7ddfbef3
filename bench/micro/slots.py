"""Shell. `python -m bench.micro.slots`: what the slot table costs per request."""

from __future__ import annotations

from collections.abc import Callable

from bench.micro.timing import show
from shared.adapters import AdapterRef
from worker.slots import Evict, SlotTable

SIZES = (16, 256)


def main() -> None:
    calls: dict[str, tuple[Callable[[], object], int, str]] = {}
    for size in SIZES:
        table, refs = _full(size)
        calls[f"hit: acquire and release, {size} slots"] = (_hit(table, refs[size // 2]), 1, "request")
        calls[f"miss: find the victim, swap, {size} slots"] = (_miss(_full(size)[0]), 1, "load")
        busy, refs = _full(size)
        for ref in refs[:-1]:
            busy.acquire(ref)
        calls[f"room with one idle slot, {size} slots"] = (busy.room, 1, "load")
    show("Slots", calls)


def _full(size: int) -> tuple[SlotTable, list[AdapterRef]]:
    table = SlotTable(size)
    refs = [AdapterRef("base", f"adapter-{number}", "0" * 64) for number in range(size)]
    for ref in refs:
        table.occupy(ref)
    return table, refs


def _hit(table: SlotTable, ref: AdapterRef) -> Callable[[], None]:
    def call() -> None:
        table.acquire(ref)
        table.release(ref)

    return call


def _miss(table: SlotTable) -> Callable[[], None]:
    def call() -> None:
        room = table.room()
        assert isinstance(room, Evict)
        table.vacate(room.victim)
        table.occupy(room.victim)

    return call


if __name__ == "__main__":
    main()
