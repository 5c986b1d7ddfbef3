"""Pure. The routable workers of one base model, with indexes and sums that are always up to date.
So a routing decision need not scan all workers.

A decision looks at the holders of one adapter and at a few workers of its rendezvous order. The
sums tell what it must know of all others.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from gateway.fleet.worker_view import WorkerView
from shared.adapters.identity import AdapterKey
from shared.link.messages import WorkerId

NOTHING = (0, 0, False)


@dataclass(slots=True, eq=False)
class Pool:
    """Only Fleet changes a pool, by `settle` and `remove`. `version` grows when a worker comes or
    goes.

    `room` is the number of workers that take another request. `open` holds those of them that have
    an open slot, or a place in their line. `empty` holds the workers with a slot that nobody has to
    leave first. `holders` are, per adapter, the workers where it is in a slot or on its way to
    one. `stashes` are the workers that have it in a lower tier (CPU memory or disk).
    """

    workers: list[WorkerView] = field(default_factory=list)
    holders: dict[AdapterKey, dict[WorkerId, WorkerView]] = field(default_factory=dict)
    stashes: dict[AdapterKey, dict[WorkerId, WorkerView]] = field(default_factory=dict)
    version: int = 0
    load: int = 0
    room: int = 0
    open: dict[WorkerId, WorkerView] = field(default_factory=dict)
    empty: dict[WorkerId, WorkerView] = field(default_factory=dict)
    _indexed: dict[WorkerId, tuple[set[AdapterKey], set[AdapterKey]]] = field(default_factory=dict)

    def settle(self, worker: WorkerView) -> None:
        """Brings sums and indexes up to date after any change of the worker."""
        if not worker.routable:
            self.remove(worker)
            return
        if worker.counted is None:
            self.workers.append(worker)
            self.version += 1
        self._count(worker, worker.counted or NOTHING)
        self._index(worker)

    def recount(self, worker: WorkerView, *, adapter: bool) -> None:
        """Like `settle`, after a reservation on the worker has begun or ended. `adapter`: it is one
        for an adapter.
        """
        before = worker.counted
        if before is None:
            return
        load = worker.load
        if adapter or (load < worker.heartbeat.capacity) is not before[2]:
            self._count(worker, before)
            self._index(worker)
        else:  # it takes no slot
            self.load += load - before[0]
            worker.counted = (load, before[1], before[2])

    def _count(self, worker: WorkerView, before: tuple[int, int, bool]) -> None:
        load = worker.load
        room = load < worker.heartbeat.capacity
        slots = worker.open_slots if room else 0
        if slots < 0:
            slots = 0
        self.load += load - before[0]
        self.room += room - before[2]
        if slots != before[1] or worker.counted is None:
            if slots:
                self.open[worker.id] = worker
            else:
                self.open.pop(worker.id, None)
        if not worker.has_empty_slot:
            self.empty.pop(worker.id, None)
        elif worker.id not in self.empty:
            self.empty[worker.id] = worker
        worker.counted = (load, slots, room)

    def remove(self, worker: WorkerView) -> None:
        """Takes the worker out of sums and indexes. Idempotent."""
        if worker.counted is None:
            return
        load, _, room = worker.counted
        worker.counted = None
        self.load -= load
        self.room -= room
        self.open.pop(worker.id, None)
        self.empty.pop(worker.id, None)
        self.workers.remove(worker)
        self.version += 1
        slotted, lower = self._indexed.pop(worker.id)
        for key in slotted:
            _drop(self.holders, key, worker.id)
        for key in lower:
            _drop(self.stashes, key, worker.id)

    def _index(self, worker: WorkerView) -> None:
        """Brings the indexes up to date. Sets are compared by identity first: between two
        heartbeats only `coming` changes, by one adapter.
        """
        slotted = worker.loaded | worker.coming if worker.coming else worker.loaded
        before = self._indexed.get(worker.id)
        if before is not None and before[0] is slotted and before[1] is worker.lower:
            return
        old_slotted, old_lower = before or (set(), set())
        if slotted is worker.loaded or slotted != old_slotted:
            for key in slotted - old_slotted:
                self.holders.setdefault(key, {})[worker.id] = worker
            for key in old_slotted - slotted:
                _drop(self.holders, key, worker.id)
        if worker.lower is not old_lower:
            for key in worker.lower - old_lower:
                self.stashes.setdefault(key, {})[worker.id] = worker
            for key in old_lower - worker.lower:
                _drop(self.stashes, key, worker.id)
        self._indexed[worker.id] = (slotted, worker.lower)


def _drop(
    index: dict[AdapterKey, dict[WorkerId, WorkerView]], key: AdapterKey, worker: WorkerId
) -> None:
    there = index[key]
    del there[worker]
    if not there:
        del index[key]


NOWHERE = Pool()
"""The pool of a base model that no worker serves. It is never changed."""
