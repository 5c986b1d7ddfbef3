"""Pure. Which adapter's requests have been on which worker since when, and how likely a slot there
becomes free soon.

How long a request will stay is not known beforehand, so it is read off requests that ended lately.
Of those that lasted at least as long as this one has, some share ended within the next moments;
that share is the chance. This assumes no shape of the distribution. With answers of equal length it
predicts nearly to the step which request ends next. With lengths that say nothing it gives the mean
rate.
"""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections import deque

from gateway.fleet.worker_view import WorkerView
from gateway.routing.policy import RoutingRequest
from shared.adapters.identity import AdapterKey
from shared.link.messages import WorkerId

RECENT = 256
"""Ended requests that the chances are computed from."""
LEAST = 32
"""With fewer ended requests, nothing is predicted."""


class Occupancy:
    """The requests of one base model that this gateway has sent. Times and durations are in
    seconds.
    """

    def __init__(self) -> None:
        self._of: dict[RoutingRequest, tuple[WorkerId, AdapterKey]] = {}
        self._on: dict[
            WorkerId, dict[AdapterKey, dict[RoutingRequest, float]]
        ] = {}  # when each was sent
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []  # the same, shortest first

    def __len__(self) -> int:
        return len(self._of)

    def begin(self, request: RoutingRequest, worker: WorkerId, key: AdapterKey, now: float) -> None:
        """The request was sent to the worker. If it was sent before, it has left that worker."""
        self._leave(request)
        self._of[request] = (worker, key)
        self._on.setdefault(worker, {}).setdefault(key, {})[request] = now

    def end(self, request: RoutingRequest, lasted_s: float | None = None) -> None:
        """The request is over; `lasted_s` is its duration if it was served to its end. Does nothing
        for a request that was never sent.
        """
        self._leave(request)
        if lasted_s is not None:
            self._recent.append(lasted_s)
            insort(self._sorted, lasted_s)
            if len(self._recent) > RECENT:
                del self._sorted[bisect_right(self._sorted, self._recent.popleft()) - 1]

    def freed(self, worker: WorkerView, within_s: float, now: float) -> float | None:
        """How many adapters, on average, will have none of their present requests left on the
        worker after `within_s`. None: too little is known.
        """
        lasted = self._sorted
        if len(lasted) < LEAST:
            return None
        median_s = lasted[len(lasted) // 2] or within_s
        # Of other gateways' requests only the number is known.
        others = min(1.0, within_s / median_s)
        own = self._on.get(worker.id, {})
        total = 0.0
        for key, requests in own.items():
            chance = 1.0
            for sent in requests.values():
                age_s = now - sent
                longer = len(lasted) - bisect_right(lasted, age_s)
                ended = bisect_right(lasted, age_s + within_s) - len(lasted) + longer
                # For a request that has outlasted all of them the chance is one half.
                chance *= (ended + 0.5) / (longer + 1.0)
            if key in worker.others_busy:
                chance *= others
            total += chance
        return total + others * sum(key not in own for key in worker.others_busy)

    def newest(self, worker: WorkerId, key: AdapterKey) -> float:
        """When this gateway sent the last of the adapter's requests that are on the worker; minus
        infinity if there is none.
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
