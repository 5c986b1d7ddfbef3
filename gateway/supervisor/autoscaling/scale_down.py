"""Pure. Chooses the workers that leave when there are too many, and where their adapters go.

Workers that do not serve yet leave first, since nobody uses them. Among the others, the worker
leaves that costs least: it is the only holder of the fewest adapters in use. Ties go to the fewest
streams, then to the fewest adapters in use, then to the youngest worker. Ray takes the youngest and
loads nothing elsewhere first, so it may kill the only holder of an adapter (ray issue 41135).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gateway.supervisor.autoscaling.reports import AdapterHandover, HeldAdapter, WorkerLoad


@dataclass(frozen=True, slots=True)
class ScaleDownCandidate:
    """A worker that may be told to leave. `load` is None until it serves. A higher `age` means that
    it was started later.
    """

    name: str
    age: int
    load: WorkerLoad | None = None


def choose_victims(present: Sequence[ScaleDownCandidate], count: int) -> list[str]:
    """The names of `count` workers that leave. They are chosen one after the other, since the
    choice of one may make another the only holder of an adapter.
    """
    left = list(present)
    chosen: list[str] = []
    while len(chosen) < count and left:
        holders = Counter(
            adapter for worker in left if worker.load for adapter in worker.load.in_use
        )
        victim = min(left, key=lambda worker: _cost(worker, holders))
        left.remove(victim)
        chosen.append(victim.name)
    return chosen


def adapters_held_only_by(victim: str, serving: Mapping[str, WorkerLoad]) -> list[HeldAdapter]:
    """The adapters in use on this worker that no other serving worker has."""
    mine = serving.get(victim)
    elsewhere = {
        adapter for name, load in serving.items() if name != victim for adapter in load.in_use
    }
    return [a for a in mine.in_use if a not in elsewhere] if mine is not None else []


def handovers(
    adapters: Sequence[HeldAdapter], stayers: Mapping[str, WorkerLoad]
) -> list[AdapterHandover]:
    """Gives each adapter to the worker with the most unused slots. An adapter for which no slot is
    free stays where it is until its requests have ended.
    """
    free = {name: load.slots - len(load.in_use) for name, load in stayers.items()}
    found = []
    for adapter in adapters:
        if not free:
            break
        name = max(sorted(free), key=lambda n: free[n])
        if free[name] <= 0:
            break
        free[name] -= 1
        found.append(AdapterHandover(adapter, name))
    return found


def _cost(
    worker: ScaleDownCandidate, holders: Counter[HeldAdapter]
) -> tuple[int, int, int, int, int]:
    load = worker.load
    if load is None:
        return (0, 0, 0, 0, -worker.age)
    sole = sum(holders[adapter] == 1 for adapter in load.in_use)
    return (1, sole, load.requests, len(load.in_use), -worker.age)
