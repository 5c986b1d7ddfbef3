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
    `silent`: it may stand still or be cut off, and live.
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
MOST_ENDED = 10_000
"""Lives that are remembered after their end. A late heartbeat is seconds old, and a worker does not
restart that often in seconds.
"""

FAILED_STARTS = 2
"""In a row, after which a worker is not waited for. One may be an accident. `serve` says the same
of the workers that it has started (FAILED_STARTS_LIMIT).
"""


@dataclass(frozen=True, slots=True)
class FailedStarts:
    """`count` lives of one worker in a row that have ended before they served."""

    base: str
    count: int
    reason: str
    at: float


SUCCESSOR_S = 600.0
"""After this time a worker of the same name is another one. The slowest restart, of a large model
on a GPU, takes a few minutes.
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
        # Lives that are over, so that a late heartbeat does not revive them. True: the worker has
        # said so itself.
        self._ended: dict[tuple[WorkerId, int], bool] = {}
        self._pools: dict[str, Pool] = {}
        self._failed_starts: dict[WorkerId, FailedStarts] = {}
        # of workers that are gone: base model, adapters in slots, how long that matters
        self._last_held: dict[WorkerId, tuple[str, tuple[AdapterKey, ...], float]] = {}
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
        elif self._is_over(heartbeat.worker, heartbeat.epoch):
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
            self._over(worker.id, worker.heartbeat.epoch, reported=False)
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
            self._failed_starts.pop(worker.id, None)
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
        """Why no worker of the base model can start, whoever started it: each one that is known has
        failed FAILED_STARTS times in a row. None: one may.
        """
        tried = {
            worker: failed
            for worker, failed in self._failed_starts.items()
            if failed.base == base and now - failed.at < SUCCESSOR_S
        }
        new = [w for w in self._workers.values() if w.heartbeat.base == base and w.id not in tried]
        if not tried or new or any(f.count < FAILED_STARTS for f in tried.values()):
            return None
        return max(tried.values(), key=lambda f: f.at).reason

    def predecessor(self, worker: WorkerView, now: float) -> list[AdapterRef]:
        """What the life of the worker before this one had in its slots, the most wanted first.
        Empty where there was none, or too long ago.
        """
        base, keys, until = self._last_held.get(worker.id, ("", (), 0.0))
        return [AdapterRef(base, *k) for k in keys if base == worker.heartbeat.base and now < until]

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
        self._over(worker_id, epoch, reported=True)
        worker = self._workers.get(worker_id)
        if worker is None or worker.heartbeat.epoch != epoch:
            return None
        return self._remove(worker, reason or "stopped", killed=killed)

    def cached(self, worker: WorkerView, adapter: AdapterRef) -> None:
        """The worker says that the adapter's files are on its host's disk."""
        self._disk_index.put(worker.heartbeat.host, adapter.base, [key_of(adapter)])

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
            self._remove(w, f"no heartbeat for {self._lease_of(w.heartbeat):g} s", silent=True)
            for w in silent
        ]

    def unreachable(self, worker_id: WorkerId, epoch: int) -> WorkerLost | None:
        """The link says that this life of the worker is gone. The worker may come back with its
        next attach.
        """
        worker = self._workers.get(worker_id)
        return (
            self._remove(worker, "connection lost", silent=True)
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

    def _is_over(self, worker_id: WorkerId, epoch: int) -> bool:
        """Whether this life has ended. A life that another one replaced may come back after its
        successor has gone: then two processes had the same name.
        """
        reported = self._ended.get((worker_id, epoch))
        return reported is not None and (reported or worker_id in self._workers)

    def _over(self, worker_id: WorkerId, epoch: int, *, reported: bool) -> None:
        self._ended[worker_id, epoch] = reported
        if len(self._ended) > MOST_ENDED:
            del self._ended[next(iter(self._ended))]

    def _note_failed_start(self, worker: WorkerView, reason: str) -> None:
        before = self._failed_starts.pop(worker.id, None)
        count = 1 if before is None else before.count + 1
        self._failed_starts[worker.id] = FailedStarts(
            worker.heartbeat.base, count, reason, worker.heartbeat_at
        )
        if len(self._failed_starts) > MOST_ENDED:
            del self._failed_starts[next(iter(self._failed_starts))]

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
            self._note_failed_start(worker, heartbeat.reason or f"a worker was lost: {reason}")
        if worker.loaded:
            held = (worker.heartbeat.base, worker.most_wanted(), worker.heartbeat_at + SUCCESSOR_S)
            self._last_held[worker.id] = held
            if len(self._last_held) > MOST_ENDED:
                del self._last_held[next(iter(self._last_held))]
        worker.forget_reservations()
        return WorkerLost(worker.id, worker.heartbeat.epoch, streams, reason, silent=silent)


def _changes(before: Heartbeat, now: Heartbeat) -> list[FleetEvent]:
    """What two heartbeats of one life of a worker tell of its state."""
    if now.state is not before.state:
        return [WorkerChanged(now.worker, before.state, now.state, now.reason)]
    if bool(now.suspect) != bool(before.suspect):
        why = now.suspect or "no longer suspect"
        return [WorkerChanged(now.worker, now.state, now.state, why)]
    return []
