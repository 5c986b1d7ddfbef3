"""Pure. How long a request waits for a slot on a worker that has its adapter in host memory, before
another worker loads the adapter from disk.

A full worker with S slots frees one every service time / S. A load from disk takes its own time and
may stall all running requests on some other worker. So a request waits as long as a slot will
likely become free in a moment, for it and for the requests that came before it. The more slots are
open elsewhere, the less it waits. It never waits longer than the load elsewhere would cost, in
seconds of its own and of other requests.
"""

from __future__ import annotations

from collections.abc import Sequence

from gateway.fleet.worker_view import WorkerView
from gateway.routing.occupancy import Occupancy
from gateway.routing.policy import RoutingRequest
from shared.link.messages import WorkerId

LONGEST_WAIT_S = 0.25
"""The longest wait while slots are neither scarce nor many. It shrinks as more slots are open
elsewhere, and is zero beyond NO_WAIT_SPREADS, where the load costs less.
"""
SCARCE_WAIT_S = 2.0
"""The longest wait while slots are scarce. A load from disk then stalls a worker whose slots would
all be free sooner without it, and takes a place in its CPU tier. Ending the wait after 0.25 s
collapsed at 110 requests/s in the simulator (29% loads from disk, p99 TTFT 4.5 s against 0.6 s).
"""
SCARCE_SPREADS = 0.5
"""Slots are scarce below this number of open slots of the pool, in standard deviations of the
number of slots that misses occupy. (`default`, 10 seeds, p99 TTFT at 100 and 108 requests/s: 238
and 440 ms with 0.7, 221 and 431 with 1, 196 to 222 and 418 to 442 with 0.4 to 0.5. With 0.2, 16% of
all requests load from disk at 108 and its p99 is 464 ms.)
"""
FULL_SPREADS = 1.0
"""Up to this slack a request waits LONGEST_WAIT_S."""
NO_WAIT_SPREADS = 2.5
"""From this slack on a request does not wait. (p99 TTFT at 100 requests/s: 203 to 222 ms; with 5 it
is 247, and without an end 236.)
"""
SOON_S = 0.15
"""A request goes on waiting only while a slot is likely to come free within this time."""
LIKELY = 0.6
"""Slots that must be expected to become free within SOON_S, beyond those that earlier requests wait
for.
"""
JUDGE_AGAIN_S = 0.02
"""How long a prediction that a slot will become free is used: a step or two."""


class SlotWait:
    """The waiting requests of one base model."""

    def __init__(self, occupancy: Occupancy, longest_wait_s: float = LONGEST_WAIT_S) -> None:
        self._occupancy, self._longest_wait_s = occupancy, longest_wait_s
        self._at: dict[WorkerId, dict[RoutingRequest, None]] = {}  # requests that wait there
        # until when the prediction holds, and the workers that it relies on
        self._judged: dict[RoutingRequest, tuple[float, Sequence[WorkerId]]] = {}

    def __len__(self) -> int:
        return len(self._judged)

    def until(
        self,
        request: RoutingRequest,
        cached: Sequence[WorkerView],
        slack: float,
        elsewhere_s: float,
        now: float,
    ) -> float:
        """When to ask again; `now` or earlier if the request should wait no longer.

        `cached` are full workers that have the adapter in host memory. `slack` is the number of
        open slots elsewhere, in spreads (see SCARCE_SPREADS). `elsewhere_s` is what a load there
        would cost.
        """
        scarce = slack < SCARCE_SPREADS
        share = min(1.0, (NO_WAIT_SPREADS - slack) / (NO_WAIT_SPREADS - FULL_SPREADS))
        due = request.arrived + min(
            elsewhere_s, SCARCE_WAIT_S if scarce else self._longest_wait_s * share
        )
        if now >= due:
            self.forget(request)  # a request that has given up delays no other
            return now
        if scarce:
            return due
        soon_s = min(SOON_S, elsewhere_s)
        judged = self._judged.get(request)
        if judged is None or judged[0] <= now:
            if not any(self._likely(request, w, soon_s, now) for w in cached):
                self.forget(request)
                return now
            self._judge(request, [w.id for w in cached], now + JUDGE_AGAIN_S)
        return min(due, now + soon_s)

    def forget(self, request: RoutingRequest) -> None:
        """The request was sent or has left. Idempotent."""
        judged = self._judged.pop(request, None)
        for worker in judged[1] if judged is not None else ():
            there = self._at[worker]
            del there[request]
            if not there:
                del self._at[worker]

    def _likely(
        self, request: RoutingRequest, worker: WorkerView, soon_s: float, now: float
    ) -> bool:
        freed = self._occupancy.freed(worker, soon_s, now)
        if freed is None:
            return True
        ahead = sum(1 for other in self._at.get(worker.id, ()) if other.arrived < request.arrived)
        return freed - ahead >= LIKELY

    def _judge(self, request: RoutingRequest, workers: Sequence[WorkerId], until: float) -> None:
        self.forget(request)
        self._judged[request] = (until, workers)
        for worker in workers:
            self._at.setdefault(worker, {})[request] = None
