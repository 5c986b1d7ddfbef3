"""Pure. How long a request waits for a slot on the worker that has its adapter cached, before
another worker loads it from disk.

A full worker with S slots frees one every service time / S; a load from disk takes its time and may
stall everybody on some other worker. So a request waits as long as a slot there is likely to come
free in a moment, for it and for those that came before it, and the less the more slots are open
elsewhere; never longer than what the load elsewhere would cost, in seconds, its own and other
people's.
"""

from __future__ import annotations

from collections.abc import Sequence

from gateway.fleet.worker_view import WorkerView
from gateway.routing.occupancy import Occupancy
from gateway.routing.policy import RoutingRequest
from shared.link.messages import WorkerId

LONGEST_WAIT_S = 0.25
"""The longest wait while slots are neither scarce nor many; less the more slots are open elsewhere,
and none beyond NO_WAIT_SPREADS: the load then costs less.
"""
SCARCE_WAIT_S = 2.0
"""The same while slots are scarce: a load from disk then stalls a worker whose slots would all be
free sooner without it, and costs its CPU tier an adapter of its own. Letting go after 0.25 s
collapsed at 110 requests/s in the simulator (29% loads from disk, p99 TTFT 4.5 s against 0.6 s).
"""
SCARCE_SPREADS = 0.5
"""Open slots of the pool, in standard deviations of the number that misses keep, below which slots
are scarce. (`default`, 10 seeds, p99 TTFT at 100 and 108 requests/s: 238 and 440 ms with 0.7, 221
and 431 with 1, 196 to 222 and 418 to 442 with 0.4 to 0.5; with 0.2 16% of all requests load from
disk at 108 and its p99 is 464 ms.)
"""
FULL_SPREADS = 1.0
"""Up to here a request waits LONGEST_WAIT_S."""
NO_WAIT_SPREADS = 2.5
"""From here on it does not wait at all. (p99 TTFT at 100 requests/s 203 to 222 ms, with 5 247, and
without an end 236.)
"""
SOON_S = 0.15
"""A request goes on waiting only while a slot is likely to come free within this time."""
LIKELY = 0.6
"""Slots that must be expected to come free within SOON_S, beyond those that earlier ones wait
for.
"""
JUDGE_AGAIN_S = 0.02
"""How long the judgement that a slot will come free holds: a step or two."""


class SlotWait:
    """Of one base model's requests."""

    def __init__(self, occupancy: Occupancy, longest_wait_s: float = LONGEST_WAIT_S) -> None:
        self._occupancy, self._longest_wait_s = occupancy, longest_wait_s
        self._at: dict[WorkerId, dict[RoutingRequest, None]] = {}  # who waits for a slot there
        # until when the judgement holds, and the workers that it counts on
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
        """When to ask again; `now` or before if it should wait no longer.

        `cached`: full workers that have its adapter in host memory; `slack`: open slots elsewhere,
        in spreads (see SCARCE_SPREADS); `elsewhere_s`: what a load there would cost.
        """
        scarce = slack < SCARCE_SPREADS
        share = min(1.0, (NO_WAIT_SPREADS - slack) / (NO_WAIT_SPREADS - FULL_SPREADS))
        due = request.arrived + min(
            elsewhere_s, SCARCE_WAIT_S if scarce else self._longest_wait_s * share
        )
        if now >= due:
            self.forget(request)  # who has given up is ahead of nobody
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
        """It was sent or has left. Idempotent."""
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
