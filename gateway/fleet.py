"""Pure. The fleet table: the only owner of membership, leases, load, residency (a hint) and reservations.

Load of a worker = what it reports of other gateways + this gateway's own open reservations on it:

    load(w) = (running + waiting - yours)  as of its last beat  +  |reservations(w)|  as of now

The second term is exact at every moment, so a burst between two heartbeats spreads; the first is as old as the last beat. An adapter counts as
held by a worker if the last beat says so (loading counts, but as loading) or if this gateway has an open reservation for it there: the worker
is then loading it, or about to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from shared.adapters import AdapterRef
from shared.wire import AdapterState, Heartbeat, StreamId, Tier, WorkerId, WorkerState


@dataclass(slots=True)
class Worker:
    """One worker as this gateway sees it. Written by Fleet alone; policies read it."""

    beat: Heartbeat
    lease_until: float
    attached_epoch: int = -1
    held: dict[tuple[str, str], AdapterState] = field(default_factory=dict)
    reserved: dict[StreamId, AdapterRef | None] = field(default_factory=dict)
    reserved_adapters: dict[AdapterRef, int] = field(default_factory=dict)

    @property
    def id(self) -> WorkerId:
        return self.beat.worker

    @property
    def load(self) -> int:
        """Requests on this worker, waiting ones included, from all gateways."""
        return max(0, self.beat.running + self.beat.waiting - self.beat.yours) + len(self.reserved)

    @property
    def has_room(self) -> bool:
        return self.load < self.beat.capacity

    @property
    def routable(self) -> bool:
        return self.beat.state is WorkerState.SERVING and self.attached_epoch == self.beat.epoch

    def tier(self, adapter: AdapterRef) -> Tier:
        """Where the adapter's weights are on this worker, as far as known; GPU only once it is loaded."""
        state = self.held.get((adapter.name, adapter.digest))
        return state.tier if state else Tier.REMOTE

    def holds(self, adapter: AdapterRef) -> bool:
        """In a GPU slot, on the way to one, or reserved for by this gateway."""
        if adapter in self.reserved_adapters:
            return True
        state = self.held.get((adapter.name, adapter.digest))
        return state is not None and (state.tier is Tier.GPU or state.loading)


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
    """The worker's life is over; `streams` are the requests it had of this gateway, returned exactly once."""

    worker: WorkerId
    epoch: int
    streams: tuple[StreamId, ...]
    reason: str


FleetEvent: TypeAlias = Joined | Changed | Lost


class Fleet:
    """Every known worker. Times are seconds of one monotonic clock, given by the caller."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._workers: dict[WorkerId, Worker] = {}
        self._by_stream: dict[StreamId, Worker] = {}
        self._ended: dict[WorkerId, int] = {}  # last epoch seen of workers that left, so that a late beat does not revive them

    def __len__(self) -> int:
        return len(self._workers)

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._workers.values())

    def get(self, worker: WorkerId) -> Worker | None:
        return self._workers.get(worker)

    def routable(self, base: str) -> list[Worker]:
        return [w for w in self._workers.values() if w.beat.base == base and w.routable]

    def beat(self, beat: Heartbeat, now: float) -> list[FleetEvent]:
        """Takes a heartbeat. An older sequence or epoch is ignored; a newer epoch replaces everything known of the worker."""
        worker = self._workers.get(beat.worker)
        if beat.epoch <= self._ended.get(beat.worker, -1) or (worker and (beat.epoch, beat.seq) <= (worker.beat.epoch, worker.beat.seq)):
            return []
        events: list[FleetEvent] = []
        if worker and beat.epoch > worker.beat.epoch:
            events.append(self._remove(worker, "restarted"))
            worker = None
        if beat.state is WorkerState.STOPPED:
            if worker:
                events.append(self._remove(worker, beat.reason or "stopped"))
            self._ended[beat.worker] = beat.epoch
            return events
        if worker is None:
            worker = self._workers[beat.worker] = Worker(beat, now + self._lease_s)
            events.append(Joined(beat.worker))
        elif beat.state is not worker.beat.state:
            events.append(Changed(beat.worker, worker.beat.state, beat.state, beat.reason))
        worker.beat = beat
        worker.lease_until = now + self._lease_s
        worker.held = {(a.name, a.digest): a for a in beat.adapters}
        return events

    def attach(self, worker_id: WorkerId, epoch: int) -> None:
        """The worker's data socket is connected: requests can be sent to it."""
        worker = self._workers.get(worker_id)
        if worker and worker.beat.epoch == epoch:
            worker.attached_epoch = epoch

    def expire(self, now: float) -> list[Lost]:
        """Removes workers whose lease has run out."""
        silent = [w for w in self._workers.values() if w.lease_until <= now]
        return [self._remove(w, f"no heartbeat for {self._lease_s:g} s") for w in silent]

    def unreachable(self, worker_id: WorkerId, epoch: int) -> Lost | None:
        """The link says that this life of the worker is gone. It may come back with its next attach."""
        worker = self._workers.get(worker_id)
        return self._remove(worker, "connection lost") if worker and worker.beat.epoch == epoch else None

    def reserve(self, worker: Worker, stream: StreamId, adapter: AdapterRef | None) -> None:
        """Must happen in the same synchronous step as the choice."""
        assert worker.has_room and stream not in self._by_stream
        worker.reserved[stream] = adapter
        self._by_stream[stream] = worker
        if adapter is not None:
            worker.reserved_adapters[adapter] = worker.reserved_adapters.get(adapter, 0) + 1

    def release(self, stream: StreamId) -> None:
        """Idempotent: the stream of a lost worker was released with it."""
        worker = self._by_stream.pop(stream, None)
        if worker is None:
            return
        adapter = worker.reserved.pop(stream)
        if adapter is not None:
            left = worker.reserved_adapters[adapter] - 1
            if left:
                worker.reserved_adapters[adapter] = left
            else:
                del worker.reserved_adapters[adapter]

    def _remove(self, worker: Worker, reason: str) -> Lost:
        del self._workers[worker.id]
        streams = tuple(worker.reserved)
        for stream in streams:
            del self._by_stream[stream]
        worker.reserved.clear()
        worker.reserved_adapters.clear()
        return Lost(worker.id, worker.beat.epoch, streams, reason)
