"""Pure. Adapters leave a worker that stays far busier than the others, one at a time.

Homes are drawn by hash and demand is not, so one worker of eight may run half as much again as the
mean while another runs half of it. The bounded load sends a new copy elsewhere, but an adapter that
is always in flight never needs one: it stays where it came first. So while slots abound, a worker
above the bound gives an adapter up: the next request loads it on a lighter worker, which brings
both closer together, and the first worker gets no more requests for it until its own have ended.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from gateway.fleet.pool import Pool
from gateway.fleet.worker_view import Key, WorkerView
from gateway.routing.demand import BOUND, SHRINK_AFTER_S
from shared.link.messages import WorkerId

FLOOR = 32
"""Sequences that a worker may run, whatever the mean: below, a step takes nearly as long for half
as many.
"""
LEAST_SHARE = 0.05
"""Of a worker's requests, for an adapter to be worth its move."""
REST_S = 1.0
"""Between two moves that concern one worker, so that the second knows of the first."""
SETTLE_S = SHRINK_AFTER_S
"""An adapter stays this long after a move, or after its home set has grown: a crowd that has just
come is spread by copies.
"""
CLOSED_S = 10.0
"""How long an adapter gets nothing new where it left: long enough for the requests of an 8B model
to end there.
"""
MAX_SETTLING = 10_000

T = TypeVar("T")


class Rebalancer:
    """Of one base model's workers. Bounded: an entry per move and growth of the last SETTLE_S, and
    one per worker that moved something.
    """

    def __init__(self) -> None:
        self._left: dict[tuple[WorkerId, Key], float] = {}  # until when
        self._resting: dict[WorkerId, float] = {}
        self._settling: dict[Key, float] = {}

    def left(self, worker: WorkerView, key: Key, now: float) -> bool:
        """The adapter leaves the worker, or has just done so."""
        return bool(self._left) and self._left.get((worker.id, key), now) > now

    def due(self, worker: WorkerView, key: Key, pool: Pool, now: float) -> bool:
        """The worker is far busier than the mean, and neither it nor the adapter has just been part
        of a change.
        """
        if worker.usual_load <= FLOOR or worker.usual_load <= BOUND * pool.mean_load:
            return False
        return self._resting.get(worker.id, now) <= now and self._settling.get(key, now) <= now

    def lighter(
        self, worker: WorkerView, others: Iterable[WorkerView], key: Key
    ) -> list[WorkerView]:
        """Those that would still not be busier than the worker, with the adapter's requests there
        instead of here. Whether they have a slot for it is the caller's question.
        """
        moved = worker.in_flight(key)
        if moved < LEAST_SHARE * worker.load:
            return []
        return [
            w
            for w in others
            if w is not worker and w.has_room and w.usual_load + moved <= worker.usual_load - moved
        ]

    def move(self, worker: WorkerView, to: WorkerView, key: Key, now: float) -> None:
        self._left, self._resting = _present(self._left, now), _present(self._resting, now)
        self._left.pop((to.id, key), None)
        self._left[worker.id, key] = now + CLOSED_S
        self._resting[worker.id] = self._resting[to.id] = now + REST_S
        self.settle(key, now)

    def settle(self, key: Key, now: float) -> None:
        """The adapter's home set changes."""
        if len(self._settling) >= MAX_SETTLING:
            self._settling = _present(self._settling, now)
        if len(self._settling) >= MAX_SETTLING:
            del self._settling[next(iter(self._settling))]
        self._settling[key] = now + SETTLE_S


def _present(times: dict[T, float], now: float) -> dict[T, float]:
    return {key: until for key, until in times.items() if until > now}
