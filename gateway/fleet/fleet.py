"""Pure. The fleet table. It alone owns membership, leases, load, residency (a hint) and
reservations.

The load of a worker is what it reports of other gateways, plus this gateway's own reservations on
it:

    load(w) = max(0, running + waiting - yours) of its last heartbeat + |reservations(w)| of now

The second term is exact at every moment, so a burst between two heartbeats spreads over workers.
The first term is as old as the last heartbeat.

A heartbeat names the last request of this gateway that it counts (`acked`). The prompts of later
ones wait for their prefill, as far as the gateway knows:

    backlog(w) = prompt tokens of reservations with a stream id above `acked`

A worker holds an adapter if its last heartbeat says so (an adapter that loads counts as loading).
It also holds an adapter for which this gateway has a reservation there: the worker loads it, or
soon will. Slots count the distinct adapters in flight. These are the adapters of this gateway's
reservations, and those that the last heartbeat shows in flight beyond them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, KeysView, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import msgspec

from gateway.fleet.disk_index import DiskIndex
from gateway.fleet.past_lives import PastLives
from gateway.fleet.pool import NOWHERE, Pool
from gateway.fleet.worker_view import WorkerView
from shared.adapters.identity import AdapterKey, AdapterRef, key_of
from shared.link.messages import (
    Heartbeat,
    StreamId,
    WorkerId,
    WorkerState,
    worker_and_epoch_of,
)

__all__ = [
    "AdapterKey",
    "Fleet",
    "FleetEvent",
    "Pool",
    "WorkerChanged",
    "WorkerJoined",
    "WorkerLost",
    "WorkerView",
    "key_of",
]


@dataclass(frozen=True, slots=True)
class WorkerJoined:
    """The first heartbeat of a life of a worker. A life is one process; its epoch names it."""

    worker: WorkerId


@dataclass(frozen=True, slots=True)
class WorkerChanged:
    """The worker's state has changed."""

    worker: WorkerId
    before: WorkerState
    now: WorkerState
    reason: str


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """The life of the worker is over. `streams` are this gateway's requests that it had; each is
    returned exactly once. `killed`: by a signal from outside, so none of them was the cause.
    `silent`: its connection stands, so it may stand still or be cut off, and live.
    """

    worker: WorkerId
    epoch: int
    streams: tuple[StreamId, ...]
    reason: str
    killed: bool = False
    silent: bool = False


FleetEvent: TypeAlias = WorkerJoined | WorkerChanged | WorkerLost


JOINING_LEASE_S = 30.0
"""The least lease of a worker whose engine still boots: imports may hold its interpreter for
seconds. It has no requests yet.
"""


class Fleet:
    """Every known worker. Times are seconds of one monotonic clock, given by the caller.

    `most` bounds, per base model, the requests that a worker is given at once, whatever capacity it
    reports. A worker whose event loop is held for `hang_s` is lost, although its process lives.
    """

    def __init__(
        self,
        lease_s: float,
        most: Mapping[str, int] | None = None,
        *,
        silent_s: float = math.inf,
        hang_s: float = math.inf,
    ) -> None:
        self._lease_s, self._silent_s, self._hang_s = lease_s, silent_s, hang_s
        self._most = dict(most or {})
        self._workers: dict[WorkerId, WorkerView] = {}
        self._by_stream: dict[StreamId, WorkerView] = {}
        self._past = PastLives()
        self._pools: dict[str, Pool] = {}
        self._disk_index = DiskIndex()

    def configure(self, most: Mapping[str, int]) -> None:
        """Holds from each worker's next heartbeat on."""
        self._most = dict(most)

    def __len__(self) -> int:
        return len(self._workers)

    def __iter__(self) -> Iterator[WorkerView]:
        return iter(self._workers.values())

    def get(self, worker: WorkerId) -> WorkerView | None:
        return self._workers.get(worker)

    def lives(self, peers: Iterable[bytes]) -> list[WorkerView]:
        """Those of these lives of workers that are not over."""
        found = ((peer, self._workers.get(worker_and_epoch_of(peer)[0])) for peer in peers)
        return [worker for peer, worker in found if worker is not None and worker.peer == peer]

    def pool(self, base: str) -> Pool:
        """The routable workers of a base model, with their indexes and sums. Read only."""
        return self._pools.get(base, NOWHERE)

    def routable(self, base: str) -> Sequence[WorkerView]:
        return self.pool(base).workers

    def own_requests(self) -> dict[str, int]:
        """This gateway's requests on the workers of each base model."""
        counts: dict[str, int] = {}
        for worker in self._workers.values():
            counts[worker.heartbeat.base] = counts.get(worker.heartbeat.base, 0) + len(
                worker.reserved
            )
        return counts

    def heartbeat(self, heartbeat: Heartbeat, now: float) -> list[FleetEvent]:
        """Takes a heartbeat. It is ignored if it is older than the last one of the same life, or if
        its life is over. A new life replaces everything known of the worker.
        """
        worker = self._workers.get(heartbeat.worker)
        if worker is not None and heartbeat.epoch == worker.heartbeat.epoch:
            if heartbeat.seq <= worker.heartbeat.seq:
                return []
        elif self._past.is_over(
            heartbeat.worker, heartbeat.epoch, replaced=heartbeat.worker in self._workers
        ):
            return []
        most = self._most.get(heartbeat.base)
        if most is not None and most < heartbeat.capacity:
            # Applied here once, so that a decision compares two numbers only.
            heartbeat = msgspec.structs.replace(heartbeat, capacity=most)
        if (
            worker
            and heartbeat.epoch == worker.heartbeat.epoch
            and heartbeat.state < worker.heartbeat.state
        ):
            # The heartbeat was sent before the worker refused a request: see `leaves`.
            heartbeat = msgspec.structs.replace(heartbeat, state=worker.heartbeat.state)
        if heartbeat.state is WorkerState.STOPPED:
            lost = self.ended(heartbeat.worker, heartbeat.epoch, heartbeat.reason)
            return [lost] if lost is not None else []
        events: list[FleetEvent] = []
        if worker and heartbeat.epoch != worker.heartbeat.epoch:
            self._past.end(worker.id, worker.heartbeat.epoch, reported=False)
            events.append(self._remove(worker, "restarted"))
            worker = None
        if worker is None:
            worker = self._workers[heartbeat.worker] = WorkerView(
                heartbeat, now + self._lease_of(heartbeat), now, disk_index=self._disk_index
            )
            events.append(WorkerJoined(heartbeat.worker))
        else:
            events += _changes(worker.heartbeat, heartbeat)
            if heartbeat.base != worker.heartbeat.base:
                self._pools[worker.heartbeat.base].remove(worker)
            worker.lease_until = now + self._lease_of(heartbeat)
            worker.silent = False
            worker.update(heartbeat, now)
        if heartbeat.state is WorkerState.SERVING:
            worker.served = True
            self._past.serves(worker.id)
        self._pool_of(worker).settle(worker)
        return events

    def attach(self, worker_id: WorkerId, epoch: int) -> None:
        """The worker's data socket is connected, so requests can be sent to it."""
        worker = self._workers.get(worker_id)
        if worker and worker.heartbeat.epoch == epoch:
            worker.attached_epoch = epoch
            self._pool_of(worker).settle(worker)

    def to_warm_up(self, worker: WorkerView) -> bool:
        """True at the first call after this life of the worker can load adapters."""
        if worker.warmed_up or not (worker.routable or worker.warming):
            return False
        worker.warmed_up = True
        return True

    def cannot_start(self, base: str, now: float) -> str | None:
        """Why no worker of the base model can start, whoever started it. None: one may."""
        present = [w.id for w in self._workers.values() if w.heartbeat.base == base]
        return self._past.cannot_start(base, present, now)

    def predecessor(self, worker: WorkerView, now: float) -> list[AdapterRef]:
        """What the life of the worker before this one had in its slots, the most wanted first.
        Empty where there was none, or too long ago.
        """
        return self._past.last_held(worker.id, worker.heartbeat.base, now)

    def heard(self, worker_id: WorkerId, epoch: int, now: float) -> None:
        """This life of the worker has sent something over its data connection; that renews its
        lease.
        """
        worker = self._workers.get(worker_id)
        if worker is not None and worker.heartbeat.epoch == epoch:
            worker.lease_until = now + self._lease_of(worker.heartbeat)

    def loop_held(self, worker_id: WorkerId, epoch: int, held_s: float, now: float) -> None:
        """This life of the worker lives, but its event loop has not turned for `held_s`. That
        renews its lease for so long as a request may hold a loop. It gets no new requests: its
        heartbeats are overdue.
        """
        if held_s < self._hang_s:
            self.heard(worker_id, epoch, now)

    def link(self, worker_id: WorkerId, epoch: int, carries: bool) -> WorkerView | None:
        """Says whether the worker's data connection carries messages. Returns the worker if that
        has changed.
        """
        worker = self._workers.get(worker_id)
        if worker is None or worker.heartbeat.epoch != epoch or worker.carries is carries:
            return None
        worker.carries = carries
        self._pool_of(worker).settle(worker)
        return worker

    def ended(
        self, worker_id: WorkerId, epoch: int, reason: str, *, killed: bool = False
    ) -> WorkerLost | None:
        """This life of the worker is over: it has said its last word, or its host knows that the
        process is gone. Whatever still arrives from it is ignored. `killed` from outside, it has
        not failed.
        """
        self._past.end(worker_id, epoch, reported=True)
        worker = self._workers.get(worker_id)
        if worker is None or worker.heartbeat.epoch != epoch:
            return None
        return self._remove(worker, reason or "stopped", killed=killed)

    def cached(self, worker: WorkerView, adapter: AdapterRef) -> None:
        """The worker says that the adapter's files are on its host's disk."""
        self._disk_index.put(worker.heartbeat.host, adapter.base, [key_of(adapter)])

    def on_disk(self, base: str, key: AdapterKey) -> list[str]:
        """The hosts of the base model's workers that have the files on disk, as far as known."""
        hosts = {w.heartbeat.host for w in self._workers.values() if w.heartbeat.base == base}
        return sorted(host for host in hosts if self._disk_index.has(host, base, key))

    def leaves(self, worker_id: WorkerId, epoch: int, reason: str) -> WorkerChanged | None:
        """This life of the worker has refused a request because it takes no more. A heartbeat that
        was on its way cannot change that.
        """
        worker = self._workers.get(worker_id)
        if (
            worker is None
            or worker.heartbeat.epoch != epoch
            or worker.heartbeat.state >= WorkerState.DRAINING
        ):
            return None
        before = worker.heartbeat.state
        worker.heartbeat = msgspec.structs.replace(
            worker.heartbeat, state=WorkerState.DRAINING, reason=reason
        )
        self._pool_of(worker).settle(worker)
        return WorkerChanged(worker_id, before, WorkerState.DRAINING, reason)

    def suspects(self, worker_id: WorkerId, epoch: int, reason: str) -> WorkerChanged | None:
        """This life of the worker has refused a request because its engine makes no progress. A
        later heartbeat may say that it does again.
        """
        worker = self._workers.get(worker_id)
        if worker is None or worker.heartbeat.epoch != epoch or worker.heartbeat.suspect:
            return None
        worker.heartbeat = msgspec.structs.replace(worker.heartbeat, suspect=reason)
        self._pool_of(worker).settle(worker)
        return WorkerChanged(worker_id, worker.heartbeat.state, worker.heartbeat.state, reason)

    def expire(self, now: float) -> list[WorkerLost]:
        """Removes workers whose lease has run out. Other workers whose heartbeats are overdue get
        no new requests until one comes.
        """
        for worker in self._workers.values():
            if not worker.silent and now - worker.heartbeat_at > self._silent_s:
                worker.silent = True
                self._pool_of(worker).settle(worker)
        silent = [w for w in self._workers.values() if w.lease_until <= now]
        return [
            self._remove(
                w, f"no heartbeat for {self._lease_of(w.heartbeat):g} s", silent=w.connected
            )
            for w in silent
        ]

    def connected(self, worker: WorkerView, connected: bool) -> None:
        """Whether the worker's control connection stands. A process that is over has none."""
        worker.connected = connected

    def unreachable(self, worker_id: WorkerId, epoch: int) -> WorkerLost | None:
        """The link says that this life of the worker is gone. The worker may come back with its
        next attach.
        """
        worker = self._workers.get(worker_id)
        return (
            self._remove(worker, "connection lost")
            if worker and worker.heartbeat.epoch == epoch
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
        self._pools[worker.heartbeat.base].recount(worker, adapter=adapter is not None)

    def release(self, stream: StreamId) -> None:
        """Ends the reservation. Idempotent: the streams of a lost worker are released with the
        worker.
        """
        worker = self._by_stream.pop(stream, None)
        if worker is not None:
            adapter = worker.give_back(stream)
            self._pools[worker.heartbeat.base].recount(worker, adapter=adapter is not None)

    @property
    def reserved(self) -> KeysView[StreamId]:
        """The streams that have a reservation."""
        return self._by_stream.keys()

    def _lease_of(self, heartbeat: Heartbeat) -> float:
        joining = heartbeat.state is WorkerState.JOINING
        return max(self._lease_s, JOINING_LEASE_S) if joining else self._lease_s

    def _pool_of(self, worker: WorkerView) -> Pool:
        pool = self._pools.get(worker.heartbeat.base)
        if pool is None:
            pool = self._pools[worker.heartbeat.base] = Pool()
        return pool

    def _remove(
        self, worker: WorkerView, reason: str, *, killed: bool = False, silent: bool = False
    ) -> WorkerLost:
        del self._workers[worker.id]
        self._pool_of(worker).remove(worker)
        streams = tuple(worker.reserved)
        for stream in streams:
            del self._by_stream[stream]
        heartbeat = worker.heartbeat
        unserved = heartbeat.failed or heartbeat.state is WorkerState.JOINING
        if unserved and not worker.served and not killed:
            why = heartbeat.reason or f"a worker was lost: {reason}"
            self._past.failed_to_start(worker.id, heartbeat.base, why, worker.heartbeat_at)
        if worker.loaded:
            held = worker.most_wanted()
            self._past.held(worker.id, heartbeat.base, held, worker.heartbeat_at)
        worker.forget_reservations()
        return WorkerLost(worker.id, heartbeat.epoch, streams, reason, killed, silent)


def _changes(before: Heartbeat, now: Heartbeat) -> list[FleetEvent]:
    """What two heartbeats of one life of a worker tell of its state."""
    if now.state is not before.state:
        return [WorkerChanged(now.worker, before.state, now.state, now.reason)]
    if bool(now.suspect) != bool(before.suspect):
        why = now.suspect or "no longer suspect"
        return [WorkerChanged(now.worker, now.state, now.state, why)]
    return []
