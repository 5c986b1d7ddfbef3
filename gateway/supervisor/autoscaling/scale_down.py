"""Pure. Chooses the workers that leave when there are too many, and where their adapters go.

Workers that do not serve yet leave first, since nobody uses them. Among the others, the worker
leaves that costs least: it is the only holder of the fewest adapters in use. Ties go to the fewest
streams, then to the fewest adapters in use, then to the youngest worker. Ray takes the youngest and
loads nothing elsewhere first, so it may kill the only holder of an adapter (ray issue 41135).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

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
            adapter for worker in left if worker.load for adapter in _held_by(worker.load)
        )
        victim = min(left, key=lambda worker: _cost(worker, holders))
        left.remove(victim)
        chosen.append(victim.name)
    return chosen


def adapters_to_move(
    leaving: Iterable[WorkerLoad], stayers: Mapping[str, WorkerLoad]
) -> list[HeldAdapter]:
    """The adapters in use on workers that leave that no worker that stays has in a slot, the
    busiest of each worker first. Two that leave at once may be the only holders of the same one.
    """
    elsewhere = {adapter for load in stayers.values() for adapter in _held_by(load)}
    by_rank = zip_longest(*(load.in_use for load in leaving))
    in_use = dict.fromkeys(adapter for rank in by_rank for adapter in rank if adapter is not None)
    return [adapter for adapter in in_use if adapter not in elsewhere]


def handovers(
    adapters: Sequence[HeldAdapter], stayers: Mapping[str, WorkerLoad]
) -> list[AdapterHandover]:
    """Gives each adapter to the worker with the most unused slots. The last ones, for which no slot
    is free, stay where they are until their requests have ended.
    """
    free = {name: max(0, load.slots - len(load.in_use)) for name, load in stayers.items()}
    found = []
    # by name: another order of the same adapters gives none of them another place
    for adapter in sorted(adapters[: sum(free.values())], key=lambda a: (a.name, a.digest)):
        name = max(sorted(free), key=lambda n: free[n])
        free[name] -= 1
        found.append(AdapterHandover(adapter, name))
    return found


def _held_by(load: WorkerLoad) -> tuple[HeldAdapter, ...]:
    return load.in_use + load.idle


def _cost(
    worker: ScaleDownCandidate, holders: Counter[HeldAdapter]
) -> tuple[int, int, int, int, int]:
    load = worker.load
    if load is None:
        return (0, 0, 0, 0, -worker.age)
    sole = sum(holders[adapter] == 1 for adapter in load.in_use)
    return (1, sole, load.requests, len(load.in_use), -worker.age)
