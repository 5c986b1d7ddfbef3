"""Pure. The routable workers of one base model, with indexes and sums that are kept up to date, so
that a routing decision need not scan all workers.

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
    goes; `changes` grows with any change.

    `room` is the number of workers that take another request. `open` holds those of them that have
    an open slot. `holders` are, per adapter, the workers where it is in a slot or on its way to
    one. `stashes` are the workers that have it in a lower tier (CPU memory or disk).
    """

    workers: list[WorkerView] = field(default_factory=list)
    holders: dict[AdapterKey, dict[WorkerId, WorkerView]] = field(default_factory=dict)
    stashes: dict[AdapterKey, dict[WorkerId, WorkerView]] = field(default_factory=dict)
    version: int = 0
    load: int = 0
    open_slots: int = 0
    room: int = 0
    open: dict[WorkerId, WorkerView] = field(default_factory=dict)
    changes: int = 0
    _indexed: dict[WorkerId, tuple[set[AdapterKey], set[AdapterKey]]] = field(default_factory=dict)

    @property
    def mean_load(self) -> float:
        return self.load / len(self.workers) if self.workers else 0.0

    def settle(self, worker: WorkerView) -> None:
        """Brings sums and indexes up to date after any change of the worker."""
        self.changes += 1
        if not worker.routable:
            self.remove(worker)
            return
        before = worker.counted
        if before is None:
            self.workers.append(worker)
            self.version += 1
            self._settle_company()
            before = NOTHING
        load = worker.load
        room = load < worker.beat.capacity
        slots = worker.open_slots if room else 0
        if slots < 0:
            slots = 0
        self.load += load - before[0]
        self.open_slots += slots - before[1]
        self.room += room - before[2]
        if slots != before[1] or worker.counted is None:
            if slots:
                self.open[worker.id] = worker
            else:
                self.open.pop(worker.id, None)
        worker.counted = (load, slots, room)
        self._index(worker)

    def remove(self, worker: WorkerView) -> None:
        """Takes the worker out of sums and indexes. Idempotent."""
        if worker.counted is None:
            return
        self.changes += 1
        load, slots, room = worker.counted
        worker.counted = None
        self.load -= load
        self.open_slots -= slots
        self.room -= room
        self.open.pop(worker.id, None)
        self.workers.remove(worker)
        self.version += 1
        worker.alone = False
        self._settle_company()
        slotted, lower = self._indexed.pop(worker.id)
        for key in slotted:
            _drop(self.holders, key, worker.id)
        for key in lower:
            _drop(self.stashes, key, worker.id)

    def _settle_company(self) -> None:
        """A worker came or went. A worker that is alone queues requests itself; where there are
        several, the gateway queues them.
        """
        alone = len(self.workers) == 1
        for worker in self.workers[:2]:  # a third changes nothing for the first two
            if worker.alone is not alone:
                worker.alone = alone
                if worker.counted is not None:
                    self.settle(worker)

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
