"""Pure. Moves adapters away from a worker that stays far busier than the others, one at a time.

Homes are drawn by hash and demand is not. So one worker of eight may have half as many requests
again as the mean while another has half of the mean. The bounded load sends new copies elsewhere.
But an adapter that is always in flight never needs a new copy, so it stays where it came first.

While slots abound, a worker above the bound therefore gives an adapter up. The next request loads
it on a worker with less load, which brings both closer to the mean. The first worker gets no more
requests for it until its running ones have ended.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from gateway.fleet.pool import Pool
from gateway.fleet.worker_view import WorkerView
from gateway.routing.demand import BOUND, SHRINK_AFTER_S
from shared.adapters.identity import AdapterKey
from shared.link.messages import WorkerId

FLOOR = 32
"""Sequences that a worker may always run, whatever the mean. Below this, a step with half as many
takes nearly as long.
"""
LEAST_SHARE = 0.05
"""Least share of a worker's requests that makes an adapter worth a move."""
REST_S = 1.0
"""Time between two moves that concern one worker, so that the second sees the effect of the first.
"""
SETTLE_S = SHRINK_AFTER_S
"""An adapter stays this long after a move, or after its home set has grown. A flash crowd that has
just come is spread by copies instead.
"""
CLOSED_S = 10.0
"""How long an adapter gets no new requests on the worker that it left. It is long enough for
requests of an 8B model to end there.
"""
MAX_SETTLING = 10_000

T = TypeVar("T")


class Rebalancer:
    """The moves of one base model. Bounded: one entry per move and per growth of a home set in the
    last SETTLE_S, and one per worker that moved an adapter.
    """

    def __init__(self) -> None:
        self._left: dict[tuple[WorkerId, AdapterKey], float] = {}  # until when
        self._resting: dict[WorkerId, float] = {}
        self._settling: dict[AdapterKey, float] = {}

    def left(self, worker: WorkerView, key: AdapterKey, now: float) -> bool:
        """Whether the adapter leaves the worker, or has just left it."""
        return bool(self._left) and self._left.get((worker.id, key), now) > now

    def due(self, worker: WorkerView, key: AdapterKey, pool: Pool, now: float) -> bool:
        """Whether the worker is far busier than the mean, and neither it nor the adapter was just
        part of a change.
        """
        if worker.usual_load <= FLOOR or worker.usual_load <= BOUND * pool.mean_load:
            return False
        return self._resting.get(worker.id, now) <= now and self._settling.get(key, now) <= now

    def lighter(
        self, worker: WorkerView, others: Iterable[WorkerView], key: AdapterKey
    ) -> list[WorkerView]:
        """Workers that would still not be busier than this one if the adapter's requests were there
        and not here. The caller checks whether they have a slot for it.
        """
        moved = worker.in_flight(key)
        if moved < LEAST_SHARE * worker.load:
            return []
        return [
            w
            for w in others
            if w is not worker and w.has_room and w.usual_load + moved <= worker.usual_load - moved
        ]

    def move(self, worker: WorkerView, to: WorkerView, key: AdapterKey, now: float) -> None:
        self._left, self._resting = _present(self._left, now), _present(self._resting, now)
        self._left.pop((to.id, key), None)
        self._left[worker.id, key] = now + CLOSED_S
        self._resting[worker.id] = self._resting[to.id] = now + REST_S
        self.settle(key, now)

    def settle(self, key: AdapterKey, now: float) -> None:
        """The adapter's home set has changed."""
        if len(self._settling) >= MAX_SETTLING:
            self._settling = _present(self._settling, now)
        if len(self._settling) >= MAX_SETTLING:
            del self._settling[next(iter(self._settling))]
        self._settling[key] = now + SETTLE_S


def _present(times: dict[T, float], now: float) -> dict[T, float]:
    return {key: until for key, until in times.items() if until > now}
