"""Pure. Chooses which adapters other workers should load before a worker leaves, and which worker
loads each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gateway.fleet.worker_view import WorkerView
from shared.adapters.identity import AdapterRef, key_of


@dataclass(frozen=True, slots=True)
class Handover:
    """Load the adapter on this worker. The worker that has it now is about to leave."""

    adapter: AdapterRef
    worker: WorkerView


def handovers(leaving: WorkerView, others: Sequence[WorkerView]) -> list[Handover]:
    """A new place for each adapter in use that no other worker holds, the busiest first.

    It goes to the worker with the most free slots. Slots count as free, too, if their adapter is
    idle and not in steady use. Adapters for which no slot is left are not handed over; their next
    request loads them.
    """
    room = {w.id: w.free_slots + len(w.idle.keys() - w.steady) for w in others}
    found = []
    for state in sorted(leaving.heartbeat.adapters, key=lambda s: (-s.in_flight, s.name)):
        key = key_of(state)
        if key not in leaving.loaded or not (state.in_flight or state.steady):
            continue
        adapter = AdapterRef(leaving.heartbeat.base, state.name, state.digest)
        if any(w.holds(adapter) for w in others):
            continue
        best = max(others, key=lambda w: room[w.id], default=None)
        if best is None or room[best.id] <= 0:
            break
        room[best.id] -= 1
        found.append(Handover(adapter, best))
    return found
