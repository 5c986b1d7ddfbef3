"""Pure. Since when each adapter's requests are on which worker, and how likely a slot there comes
free soon.

How long requests stay is not known beforehand, so it is read off those that ended lately: of the
stays that lasted at least as long as this one has, the share that ended within the next moments.
That needs no shape of the distribution: with answers of equal length it tells nearly to the step
who ends next, with lengths that say nothing it comes to the mean rate.
"""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections import deque

from gateway.fleet.worker_view import Key, WorkerView
from gateway.routing.policy import RoutingRequest
from shared.link.messages import WorkerId

RECENT = 256
"""Stays that the chances are read off."""
LEAST = 32
"""Stays below which nothing is known."""


class Occupancy:
    """Of one base model's requests, as this gateway has sent them. Times and durations in
    seconds.
    """

    def __init__(self) -> None:
        self._of: dict[RoutingRequest, tuple[WorkerId, Key]] = {}
        self._on: dict[WorkerId, dict[Key, dict[RoutingRequest, float]]] = {}  # when each was sent
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []  # the same, shortest first

    def __len__(self) -> int:
        return len(self._of)

    def begin(self, request: RoutingRequest, worker: WorkerId, key: Key, now: float) -> None:
        """It was sent there; if it was sent before, it is no longer where it was."""
        self._leave(request)
        self._of[request] = (worker, key)
        self._on.setdefault(worker, {}).setdefault(key, {})[request] = now

    def end(self, request: RoutingRequest, lasted_s: float | None = None) -> None:
        """It is over, after so long if it was served to its end. A no-op for what was never
        sent.
        """
        self._leave(request)
        if lasted_s is not None:
            self._recent.append(lasted_s)
            insort(self._sorted, lasted_s)
            if len(self._recent) > RECENT:
                del self._sorted[bisect_right(self._sorted, self._recent.popleft()) - 1]

    def freed(self, worker: WorkerView, within_s: float, now: float) -> float | None:
        """How many adapters, on average, have none of their present requests left on the worker
        after so long. None: too little is known.
        """
        lasted = self._sorted
        if len(lasted) < LEAST:
            return None
        median_s = lasted[len(lasted) // 2] or within_s
        # of other gateways' requests only their number is known
        others = min(1.0, within_s / median_s)
        own = self._on.get(worker.id, {})
        total = 0.0
        for key, requests in own.items():
            chance = 1.0
            for sent in requests.values():
                age_s = now - sent
                longer = len(lasted) - bisect_right(lasted, age_s)
                ended = bisect_right(lasted, age_s + within_s) - len(lasted) + longer
                chance *= (ended + 0.5) / (longer + 1.0)  # beyond the longest of them: even
            if key in worker.others_busy:
                chance *= others
            total += chance
        return total + others * sum(key not in own for key in worker.others_busy)

    def newest(self, worker: WorkerId, key: Key) -> float:
        """When this gateway sent the last of the adapter's requests that are there; minus infinity
        if there is none.
        """
        there = self._on.get(worker, {}).get(key)
        return next(reversed(there.values())) if there else -math.inf

    def _leave(self, request: RoutingRequest) -> None:
        there = self._of.pop(request, None)
        if there is None:
            return
        worker, key = there
        keys = self._on[worker]
        requests = keys[key]
        del requests[request]
        if not requests:
            del keys[key]
            if not keys:
                del self._on[worker]
