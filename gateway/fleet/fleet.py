"""Pure. The fleet table: the only owner of membership, leases, load, residency (a hint) and
reservations.

Load of a worker = what it reports of other gateways + this gateway's own open reservations on it:

    load(w) = max(0, running + waiting - yours)  as of its last beat  +  |reservations(w)|  as of
    now

The second term is exact at every moment, so a burst between two heartbeats spreads; the first is as
old as the last beat. Prompt tokens that wait for their prefill need the acknowledgement: what was
sent after the request that the beat has seen (`acked`) is not in its count yet:

    backlog(w) = max(0, waiting_tokens - prefill_rate x age of the beat)  +  tokens of reservations
    with a higher stream id than `acked`

An adapter counts as held by a worker if the last beat says so (loading counts, but as loading) or
if this gateway has an open reservation for it there: the worker is then loading it, or about to.
Slots count the distinct adapters in flight: those of own reservations, and those that the last beat
shows in flight beyond them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, KeysView, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import msgspec

from gateway.fleet.disk_index import DiskIndex
from gateway.fleet.pool import NOWHERE, Pool
from gateway.fleet.worker_view import Key, WorkerView
from shared.adapters.identity import AdapterRef, key_of
from shared.link.messages import Heartbeat, StreamId, WorkerId, WorkerState

__all__ = [
    "Changed",
    "Fleet",
    "FleetEvent",
    "Joined",
    "Key",
    "Lost",
    "Pool",
    "WorkerView",
    "key_of",
]


@dataclass(frozen=True, slots=True)
class Joined:
    """First beat of a worker's life."""

    worker: WorkerId


@dataclass(frozen=True, slots=True)
class Changed:
    """The worker's state is another one than before."""

    worker: WorkerId
    before: WorkerState
    now: WorkerState
    reason: str


@dataclass(frozen=True, slots=True)
class Lost:
    """The worker's life is over; `streams` are the requests it had of this gateway, returned
    exactly once.
    """

    worker: WorkerId
    epoch: int
    streams: tuple[StreamId, ...]
    reason: str


FleetEvent: TypeAlias = Joined | Changed | Lost


JOINING_LEASE_S = 30.0
"""While its engine boots, imports may hold a worker's interpreter for seconds. It has no requests
then.
"""
MOST_ENDED = 10_000
"""Lives that are remembered after their end; beats are late by seconds, not by so many restarts."""


class Fleet:
    """Every known worker. Times are seconds of one monotonic clock, given by the caller.

    `most` are the requests that a worker of a base model is given at once, whatever capacity it
    tells of.
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
        # lives that are over, so that a late beat does not revive them; true: it has said so itself
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
        """Takes a heartbeat. An older one of the same life is ignored, and one of a life that is
        over; a life not seen before replaces everything known of the worker.
        """
        worker = self._workers.get(beat.worker)
        if worker is not None and beat.epoch == worker.beat.epoch:
            if beat.seq <= worker.beat.seq:
                return []
        elif self._is_over(beat.worker, beat.epoch):
            return []
        most = self._most.get(beat.base)
        if most is not None and most < beat.capacity:
            # here, so that a decision compares two numbers
            beat = msgspec.structs.replace(beat, capacity=most)
        if worker and beat.epoch == worker.beat.epoch and beat.state < worker.beat.state:
            # it left before this was heard: see `leaves`
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
        """The worker's data socket is connected: requests can be sent to it."""
        worker = self._workers.get(worker_id)
        if worker and worker.beat.epoch == epoch:
            worker.attached_epoch = epoch
            self._pool_of(worker).settle(worker)

    def first_time_routable(self, worker: WorkerView) -> bool:
        """True at the first call at which this life of the worker takes requests."""
        if worker.was_routable or not worker.routable:
            return False
        worker.was_routable = True
        return True

    def heard(self, worker_id: WorkerId, epoch: int, now: float) -> None:
        """Something came from this life of the worker by its data connection: it keeps its
        lease.
        """
        worker = self._workers.get(worker_id)
        if worker is not None and worker.beat.epoch == epoch:
            worker.lease_until = now + self._lease_of(worker.beat)

    def link(self, worker_id: WorkerId, epoch: int, carries: bool) -> WorkerView | None:
        """Whether the worker's data connection carries. Returns the worker if that has changed."""
        worker = self._workers.get(worker_id)
        if worker is None or worker.beat.epoch != epoch or worker.carries is carries:
            return None
        worker.carries = carries
        self._pool_of(worker).settle(worker)
        return worker

    def ended(self, worker_id: WorkerId, epoch: int, reason: str) -> Lost | None:
        """This life of the worker is over: it has said its last word, or its host knows that its
        process is gone. What may still arrive of it says nothing any more.
        """
        self._over(worker_id, epoch, said=True)
        worker = self._workers.get(worker_id)
        if worker is None or worker.beat.epoch != epoch:
            return None
        return self._remove(worker, reason or "stopped")

    def cached(self, worker: WorkerView, adapter: AdapterRef) -> None:
        """The worker says that its host's disk has the adapter's files."""
        self._disk_index.put(worker.beat.host, adapter.base, [key_of(adapter)])

    def leaves(self, worker_id: WorkerId, epoch: int, reason: str) -> Changed | None:
        """This life of the worker has refused a request because it takes no more: no beat that was
        on its way can say otherwise.
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
        """Removes workers whose lease has run out; the others get no new requests while their
        beats are overdue.
        """
        for worker in self._workers.values():
            if not worker.silent and now - worker.beat_at > self._silent_s:
                worker.silent = True
                self._pool_of(worker).settle(worker)
        silent = [w for w in self._workers.values() if w.lease_until <= now]
        return [self._remove(w, f"no heartbeat for {self._lease_of(w.beat):g} s") for w in silent]

    def unreachable(self, worker_id: WorkerId, epoch: int) -> Lost | None:
        """The link says that this life of the worker is gone. It may come back with its next
        attach.
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
        """Must happen in the same synchronous step as the choice."""
        assert worker.has_room and stream not in self._by_stream
        self._by_stream[stream] = worker
        worker.take(stream, adapter, prompt_tokens)
        self._pool_of(worker).settle(worker)

    def release(self, stream: StreamId) -> None:
        """Idempotent: the stream of a lost worker was released with it."""
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
        """A life that was replaced may come back once its successor has gone: then two processes
        had the same name.
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
