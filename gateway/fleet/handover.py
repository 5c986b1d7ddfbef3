"""Pure. Which adapters other workers should load before a worker leaves, and where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gateway.fleet.worker_view import WorkerView
from shared.adapters.identity import AdapterRef, key_of


@dataclass(frozen=True, slots=True)
class Handover:
    """Load the adapter on the worker: the one that has it is about to leave."""

    adapter: AdapterRef
    worker: WorkerView


def handovers(leaving: WorkerView, others: Sequence[WorkerView]) -> list[Handover]:
    """For each adapter in use that no other worker holds, the busiest first: the worker with the
    most slots that are free, or whose adapter is idle and not in steady use. Adapters beyond those
    slots are left out; their next request loads them.
    """
    room = {w.id: w.free_slots + len(w.idle.keys() - w.steady) for w in others}
    found = []
    for state in sorted(leaving.beat.adapters, key=lambda s: (-s.in_flight, s.name)):
        key = key_of(state)
        if key not in leaving.loaded or not (state.in_flight or state.steady):
            continue
        adapter = AdapterRef(leaving.beat.base, state.name, state.digest)
        if any(w.holds(adapter) for w in others):
            continue
        best = max(others, key=lambda w: room[w.id], default=None)
        if best is None or room[best.id] <= 0:
            break
        room[best.id] -= 1
        found.append(Handover(adapter, best))
    return found
