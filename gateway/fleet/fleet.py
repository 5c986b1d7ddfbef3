"""Pure. The fleet table. It alone owns membership, leases, load, residency (a hint) and
reservations.

The load of a worker is what it reports of other gateways, plus this gateway's own reservations on
it:

    load(w) = max(0, running + waiting - yours) of its last heartbeat + |reservations(w)| of now

The second term is exact at every moment, so a burst between two heartbeats spreads over workers.
The first term is as old as the last heartbeat.

The count of prompt tokens that wait for prefill needs an acknowledgement. A heartbeat names the
last request that it counts (`acked`). Requests sent after that one are added:

    backlog(w) = max(0, waiting_tokens - prefill_rate x age of the heartbeat)
                 + prompt tokens of reservations with a stream id above `acked`

A worker holds an adapter if its last heartbeat says so (an adapter that loads counts as loading).
It also holds an adapter for which this gateway has a reservation there: the worker loads it, or
soon will. Slots count the distinct adapters in flight. These are the adapters of this gateway's
reservations, and those that the last heartbeat shows in flight beyond them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, KeysView, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import msgspec

from gateway.fleet.disk_index import DiskIndex
from gateway.fleet.pool import NOWHERE, Pool
from gateway.fleet.worker_view import WorkerView
from shared.adapters.identity import AdapterKey, AdapterRef, key_of
from shared.link.messages import Heartbeat, StreamId, WorkerId, WorkerState

__all__ = [
    "AdapterKey",
    "Changed",
    "Fleet",
    "FleetEvent",
    "Joined",
    "Lost",
    "Pool",
    "WorkerView",
    "key_of",
]


@dataclass(frozen=True, slots=True)
class Joined:
    """The first heartbeat of a life of a worker. A life is one process; its epoch names it."""

    worker: WorkerId


@dataclass(frozen=True, slots=True)
class Changed:
    """The worker's state has changed."""

    worker: WorkerId
    before: WorkerState
    now: WorkerState
    reason: str


@dataclass(frozen=True, slots=True)
class Lost:
    """The life of the worker is over. `streams` are this gateway's requests that it had; each is
    returned exactly once.
    """

    worker: WorkerId
    epoch: int
    streams: tuple[StreamId, ...]
    reason: str


FleetEvent: TypeAlias = Joined | Changed | Lost


JOINING_LEASE_S = 30.0
"""The least lease of a worker whose engine still boots: imports may hold its interpreter for
seconds. It has no requests yet.
"""
MOST_ENDED = 10_000
"""Lives that are remembered after their end. A late heartbeat is seconds old, and a worker does not
restart that often in seconds.
"""


class Fleet:
    """Every known worker. Times are seconds of one monotonic clock, given by the caller.

    `most` bounds, per base model, the requests that a worker is given at once, whatever capacity it
    reports.
    """

    def __init__(
        self,
        lease_s: float,
        most: Mapping[str, int] | None = None,
        *,
        silent_s: float = math.inf,
    ) -> None:
        self._lease_s, self._silent_s = lease_s, silent_s
        self._most = dict(most or {})
        self._workers: dict[WorkerId, WorkerView] = {}
        self._by_stream: dict[StreamId, WorkerView] = {}
        # Lives that are over, so that a late heartbeat does not revive them. True: the worker has
        # said so itself.
        self._ended: dict[tuple[WorkerId, int], bool] = {}
        self._pools: dict[str, Pool] = {}
        self._disk_index = DiskIndex()

    def __len__(self) -> int:
        return len(self._workers)

    def __iter__(self) -> Iterator[WorkerView]:
        return iter(self._workers.values())

    def get(self, worker: WorkerId) -> WorkerView | None:
        return self._workers.get(worker)

    def pool(self, base: str) -> Pool:
        """The routable workers of a base model, with their indexes and sums. Read only."""
        return self._pools.get(base, NOWHERE)

    def routable(self, base: str) -> Sequence[WorkerView]:
        return self.pool(base).workers

    def own_requests(self) -> dict[str, int]:
        """This gateway's requests on the workers of each base model."""
        counts: dict[str, int] = {}
        for worker in self._workers.values():
            counts[worker.beat.base] = counts.get(worker.beat.base, 0) + len(worker.reserved)
        return counts

    def beat(self, beat: Heartbeat, now: float) -> list[FleetEvent]:
        """Takes a heartbeat. It is ignored if it is older than the last one of the same life, or if
        its life is over. A new life replaces everything known of the worker.
        """
        worker = self._workers.get(beat.worker)
        if worker is not None and beat.epoch == worker.beat.epoch:
            if beat.seq <= worker.beat.seq:
                return []
        elif self._is_over(beat.worker, beat.epoch):
            return []
        most = self._most.get(beat.base)
        if most is not None and most < beat.capacity:
            # Applied here once, so that a decision compares two numbers only.
            beat = msgspec.structs.replace(beat, capacity=most)
        if worker and beat.epoch == worker.beat.epoch and beat.state < worker.beat.state:
            # The heartbeat was sent before the worker refused a request: see `leaves`.
            beat = msgspec.structs.replace(beat, state=worker.beat.state)
        events: list[FleetEvent] = []
        if beat.state is WorkerState.STOPPED:
            lost = self.ended(beat.worker, beat.epoch, beat.reason)
            return [lost] if lost is not None else []
        if worker and beat.epoch != worker.beat.epoch:
            self._over(worker.id, worker.beat.epoch, said=False)
            events.append(self._remove(worker, "restarted"))
            worker = None
        if worker is None:
            worker = self._workers[beat.worker] = WorkerView(
                beat, now + self._lease_of(beat), now, disk_index=self._disk_index
            )
            events.append(Joined(beat.worker))
        else:
            if beat.state is not worker.beat.state:
                events.append(Changed(beat.worker, worker.beat.state, beat.state, beat.reason))
            elif bool(beat.suspect) != bool(worker.beat.suspect):
                why = beat.suspect or "no longer suspect"
                events.append(Changed(beat.worker, beat.state, beat.state, why))
            if beat.base != worker.beat.base:
                self._pools[worker.beat.base].remove(worker)
            worker.lease_until = now + self._lease_of(beat)
            worker.silent = False
            worker.hear(beat, now)
        self._pool_of(worker).settle(worker)
        return events

    def attach(self, worker_id: WorkerId, epoch: int) -> None:
        """The worker's data socket is connected, so requests can be sent to it."""
        worker = self._workers.get(worker_id)
        if worker and worker.beat.epoch == epoch:
            worker.attached_epoch = epoch
            self._pool_of(worker).settle(worker)

    def first_time_routable(self, worker: WorkerView) -> bool:
        """True at the first call after this life of the worker began to take requests."""
        if worker.was_routable or not worker.routable:
            return False
        worker.was_routable = True
        return True

    def heard(self, worker_id: WorkerId, epoch: int, now: float) -> None:
        """This life of the worker has sent something over its data connection; that renews its
        lease.
        """
        worker = self._workers.get(worker_id)
        if worker is not None and worker.beat.epoch == epoch:
            worker.lease_until = now + self._lease_of(worker.beat)

    def link(self, worker_id: WorkerId, epoch: int, carries: bool) -> WorkerView | None:
        """Says whether the worker's data connection carries messages. Returns the worker if that
        has changed.
        """
        worker = self._workers.get(worker_id)
        if worker is None or worker.beat.epoch != epoch or worker.carries is carries:
            return None
        worker.carries = carries
        self._pool_of(worker).settle(worker)
        return worker

    def ended(self, worker_id: WorkerId, epoch: int, reason: str) -> Lost | None:
        """This life of the worker is over: it has said its last word, or its host knows that the
        process is gone. Whatever still arrives from it is ignored.
        """
        self._over(worker_id, epoch, said=True)
        worker = self._workers.get(worker_id)
        if worker is None or worker.beat.epoch != epoch:
            return None
        return self._remove(worker, reason or "stopped")

    def cached(self, worker: WorkerView, adapter: AdapterRef) -> None:
        """The worker says that the adapter's files are on its host's disk."""
        self._disk_index.put(worker.beat.host, adapter.base, [key_of(adapter)])

    def leaves(self, worker_id: WorkerId, epoch: int, reason: str) -> Changed | None:
        """This life of the worker has refused a request because it takes no more. A heartbeat that
        was on its way cannot change that.
        """
        worker = self._workers.get(worker_id)
        if (
            worker is None
            or worker.beat.epoch != epoch
            or worker.beat.state >= WorkerState.DRAINING
        ):
            return None
        before = worker.beat.state
        worker.beat = msgspec.structs.replace(
            worker.beat, state=WorkerState.DRAINING, reason=reason
        )
        self._pool_of(worker).settle(worker)
        return Changed(worker_id, before, WorkerState.DRAINING, reason)

    def suspects(self, worker_id: WorkerId, epoch: int, reason: str) -> Changed | None:
        """This life of the worker has refused a request because its engine makes no progress. A
        later beat may say that it does again.
        """
        worker = self._workers.get(worker_id)
        if worker is None or worker.beat.epoch != epoch or worker.beat.suspect:
            return None
        worker.beat = msgspec.structs.replace(worker.beat, suspect=reason)
        self._pool_of(worker).settle(worker)
        return Changed(worker_id, worker.beat.state, worker.beat.state, reason)

    def expire(self, now: float) -> list[Lost]:
        """Removes workers whose lease has run out. Other workers whose heartbeats are overdue get
        no new requests until one comes.
        """
        for worker in self._workers.values():
            if not worker.silent and now - worker.beat_at > self._silent_s:
                worker.silent = True
                self._pool_of(worker).settle(worker)
        silent = [w for w in self._workers.values() if w.lease_until <= now]
        return [self._remove(w, f"no heartbeat for {self._lease_of(w.beat):g} s") for w in silent]

    def unreachable(self, worker_id: WorkerId, epoch: int) -> Lost | None:
        """The link says that this life of the worker is gone. The worker may come back with its
        next attach.
        """
        worker = self._workers.get(worker_id)
        return (
            self._remove(worker, "connection lost")
            if worker and worker.beat.epoch == epoch
            else None
        )

    def reserve(
        self,
        worker: WorkerView,
        stream: StreamId,
        adapter: AdapterRef | None,
        prompt_tokens: int = 0,
    ) -> None:
        """Reserves a place for a request. This must happen in the same synchronous step as the
        choice.
        """
        assert worker.has_room and stream not in self._by_stream
        self._by_stream[stream] = worker
        worker.take(stream, adapter, prompt_tokens)
        self._pool_of(worker).settle(worker)

    def release(self, stream: StreamId) -> None:
        """Ends the reservation. Idempotent: the streams of a lost worker are released with the
        worker.
        """
        worker = self._by_stream.pop(stream, None)
        if worker is not None:
            worker.give_back(stream)
            self._pool_of(worker).settle(worker)

    @property
    def reserved(self) -> KeysView[StreamId]:
        """The streams that have a reservation."""
        return self._by_stream.keys()

    def _lease_of(self, beat: Heartbeat) -> float:
        joining = beat.state is WorkerState.JOINING
        return max(self._lease_s, JOINING_LEASE_S) if joining else self._lease_s

    def _is_over(self, worker_id: WorkerId, epoch: int) -> bool:
        """Whether this life has ended. A life that another one replaced may come back after its
        successor has gone: then two processes had the same name.
        """
        said = self._ended.get((worker_id, epoch))
        return said is not None and (said or worker_id in self._workers)

    def _over(self, worker_id: WorkerId, epoch: int, *, said: bool) -> None:
        self._ended[worker_id, epoch] = said
        if len(self._ended) > MOST_ENDED:
            del self._ended[next(iter(self._ended))]

    def _pool_of(self, worker: WorkerView) -> Pool:
        pool = self._pools.get(worker.beat.base)
        if pool is None:
            pool = self._pools[worker.beat.base] = Pool()
        return pool

    def _remove(self, worker: WorkerView, reason: str) -> Lost:
        del self._workers[worker.id]
        self._pool_of(worker).remove(worker)
        streams = tuple(worker.reserved)
        for stream in streams:
            del self._by_stream[stream]
        worker.forget_reservations()
        return Lost(worker.id, worker.beat.epoch, streams, reason)
