"""Pure. Divides one machine's GPUs among the workers of several models.

Every model first gets its min_replicas, in the order of the file. The rest goes one worker at a
time to the model with the smallest share of what it wants. Among equals it goes to a model with
requests, then to one that already has the worker, then to the first in the file. So a model at zero
that is asked for gets the GPU of a worker that nobody asks for, whatever delay keeps that one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GpuDemand:
    """What one model wants, in workers. `gpus` is the number that each of its workers takes (0:
    none). `least` is its min_replicas, and `present` the workers that it has now. `idle`: none of
    its requests runs or waits, nor did one within its look_back_period_s.
    """

    model: str
    gpus: int
    least: int
    wanted: int
    present: int = 0
    idle: bool = False


def share(demands: Sequence[GpuDemand], total: int) -> dict[str, int]:
    """Model -> the number of workers that it may have now, with `total` GPUs on the machine."""
    granted = {demand.model: 0 for demand in demands}
    free = total
    for demand in demands:
        wanted = min(demand.least, demand.wanted)
        count = wanted if not demand.gpus else min(wanted, free // demand.gpus)
        granted[demand.model] = count
        free -= count * demand.gpus
    while True:
        open_demands = [c for c in demands if granted[c.model] < c.wanted and c.gpus <= free]
        if not open_demands:
            return granted
        chosen = min(open_demands, key=lambda demand: _turn(demand, granted[demand.model]))
        granted[chosen.model] += 1
        free -= chosen.gpus


def _turn(demand: GpuDemand, has: int) -> tuple[float, bool, bool]:
    """The model with the lowest value gets the next worker. Among equals, `min` takes the first."""
    return (has / demand.wanted, demand.idle, has >= demand.present)


class GpuDevices:
    """The GPUs of this machine and the workers that own them. A worker owns its GPUs until its
    process has ended, so no two processes ever use the same one.
    """

    def __init__(self, ids: Sequence[str]) -> None:
        self._free = list(ids)
        self._order = {name: n for n, name in enumerate(ids)}
        self._owned: dict[str, tuple[str, ...]] = {}

    def __len__(self) -> int:
        return len(self._order)

    def take(self, owner: str, count: int) -> tuple[str, ...] | None:
        """`count` free devices for the owner, or None if fewer are free."""
        assert owner not in self._owned
        if count > len(self._free):
            return None
        mine, self._free = tuple(self._free[:count]), self._free[count:]
        self._owned[owner] = mine
        return mine

    def give_back(self, owner: str) -> None:
        """Frees the owner's devices. Without any, it does nothing."""
        self._free = sorted([*self._free, *self._owned.pop(owner, ())], key=self._order.__getitem__)
