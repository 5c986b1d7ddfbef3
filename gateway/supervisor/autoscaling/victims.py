"""Pure. Which workers leave when there are too many, and where their adapters go.

Those that do not serve yet leave first: nobody uses them. Of the others the one whose leaving costs
least: it is the only holder of the fewest adapters in use, then it has the fewest streams, then the
fewest adapters in use, then it is the youngest. Ray takes the youngest and loads nothing elsewhere
first, so the only holder of an adapter can be killed (ray issue 41135).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gateway.supervisor.autoscaling.reports import HeldAdapter, Move, WorkerLoad


@dataclass(frozen=True, slots=True)
class Present:
    """A worker that may be told to leave. `load` is None until it serves; `age` orders workers by
    their start, the oldest lowest.
    """

    name: str
    age: int
    load: WorkerLoad | None = None


def choose_victims(present: Sequence[Present], count: int) -> list[str]:
    """`count` workers, the first to leave first. Chosen one after the other: with the first gone,
    another may be the only holder of an adapter.
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


def sole_adapters(victim: str, serving: Mapping[str, WorkerLoad]) -> list[HeldAdapter]:
    """Adapters in use that no worker but this one has."""
    mine = serving.get(victim)
    elsewhere = {
        adapter for name, load in serving.items() if name != victim for adapter in load.in_use
    }
    return [a for a in mine.in_use if a not in elsewhere] if mine is not None else []


def moves(adapters: Sequence[HeldAdapter], stayers: Mapping[str, WorkerLoad]) -> list[Move]:
    """Each adapter to the worker with the most slots that nobody uses. Without a free one the
    adapter stays where it is until its requests end.
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
        found.append(Move(adapter, name))
    return found


def _cost(worker: Present, holders: Counter[HeldAdapter]) -> tuple[int, int, int, int, int]:
    load = worker.load
    if load is None:
        return (0, 0, 0, 0, -worker.age)
    sole = sum(holders[adapter] == 1 for adapter in load.in_use)
    return (1, sole, load.requests, len(load.in_use), -worker.age)
