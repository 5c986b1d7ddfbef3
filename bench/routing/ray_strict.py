"""Pure. Ray Serve's multiplexed routing as Ray 2.60 does it.

`Ray` in gateway/routing/ray.py does what Ray's documentation promises. docs/ROUTING.md has the rows
M1 to M6 of Ray's candidate table, and the weaknesses W1 to W12.
"""

from __future__ import annotations

import random
from collections.abc import Sequence, Set
from dataclasses import dataclass

from gateway.fleet.fleet import Fleet, WorkerView
from gateway.fleet.pool import Pool
from gateway.routing.policy import (
    NONE_EXCLUDED,
    Blocked,
    Choice,
    ChoiceReason,
    Decision,
    Defer,
    RoutingRequest,
    StatelessPolicy,
    tier_of,
)
from gateway.routing.ray import LLM_MAX_ONGOING, with_fewest_adapters
from shared.adapters.identity import AdapterKey, key_of
from shared.link.messages import Tier, WorkerId

MATCHING_S = 1.0
"""RAY_SERVE_MULTIPLEXED_MODEL_ID_MATCHING_TIMEOUT_S; the window is drawn anew in every round,
between one and two of it.
"""
BACKOFF_S, BACKOFF_FACTOR, MAX_BACKOFF_S = 0.025, 2.0, 0.5
"""RAY_SERVE_ROUTER_RETRY_*: before the third round of a request and each later one; the second
follows the first at once.
"""
TASKS_PER_REPLICA, MAX_TASKS = 2, 50
"""Requests that Ray's router looks for a replica for at the same time; the others wait behind them,
whatever their adapter (W4).
"""
MAX_FALLBACKS = 10_000
"""Ray never prunes its set of adapters that have fallen back (W12); ours forgets the oldest."""


@dataclass(slots=True)
class _Search:
    """One request's way through Ray's rounds."""

    began: float
    rounds: int = 0
    next_at: float = 0.0
    tried_first: bool = False
    tried_fewest: bool = False


class RayStrict(StatelessPolicy):
    """Ray 2.60 with the LLM defaults, weaknesses W1 to W4 included; for comparison. Rounds advance
    with `now`.
    """

    name = "ray-strict"

    def __init__(self, max_ongoing_requests: int = LLM_MAX_ONGOING) -> None:
        self._limit = max_ongoing_requests
        self._searches: dict[RoutingRequest, _Search] = {}
        self._fallbacks: dict[AdapterKey, None] = {}

    def choose(
        self,
        request: RoutingRequest,
        fleet: Fleet,
        now: float,
        rng: random.Random,
        excluded: Set[WorkerId] = NONE_EXCLUDED,
    ) -> Decision:
        pool = fleet.pool(request.base)
        if not pool.workers:
            return Defer(Blocked.ROOM)
        search = self._searches.get(request)
        if search is None:
            if len(self._searches) >= min(MAX_TASKS, TASKS_PER_REPLICA * len(pool.workers)):
                return Defer(Blocked.TURN, now + BACKOFF_S)
            search = self._searches[request] = _Search(now, next_at=now)
        while search.next_at <= now:
            candidates = self._candidates(request, search, pool, now, rng)
            search.rounds += 1
            search.next_at = now + backoff_s(search.rounds)
            drawn = (
                rng.sample(candidates, 2)
                if len(candidates) > 2
                else rng.sample(candidates, len(candidates))
            )
            free = [w for w in drawn if w.load < self._limit and w.accepts(excluded)]
            if free:
                worker = min(free, key=lambda w: w.load)
                return Choice(
                    worker, self._reason(request, worker), tier_of(worker, request.adapter)
                )
        return Defer(Blocked.TURN, search.next_at)

    def sent(self, request: RoutingRequest, choice: Choice, now: float) -> None:
        self._searches.pop(request, None)

    def left(self, request: RoutingRequest, now: float) -> None:
        self._searches.pop(request, None)

    def _candidates(
        self, request: RoutingRequest, search: _Search, pool: Pool, now: float, rng: random.Random
    ) -> Sequence[WorkerView]:
        if request.adapter is None:
            return pool.workers
        key = key_of(request.adapter)
        if now - search.began >= rng.uniform(MATCHING_S, 2 * MATCHING_S):
            if search.tried_fewest:
                return pool.workers  # M6
            search.tried_fewest = True
            return with_fewest_adapters(pool.workers)  # M5
        if search.tried_first:
            self._fall_back(key)
            return with_fewest_adapters(pool.workers)  # M4
        search.tried_first = True
        holders = [w for w in pool.workers if announced(w, key)]
        if holders:
            self._fallbacks.pop(key, None)
            return holders  # M1
        if key in self._fallbacks:
            return ()  # M3
        self._fall_back(key)
        return with_fewest_adapters(pool.workers)  # M2

    def _fall_back(self, key: AdapterKey) -> None:
        self._fallbacks[key] = None
        if len(self._fallbacks) > MAX_FALLBACKS:
            del self._fallbacks[next(iter(self._fallbacks))]

    @staticmethod
    def _reason(request: RoutingRequest, worker: WorkerView) -> ChoiceReason:
        if request.adapter is None:
            return ChoiceReason.BASE
        return (
            ChoiceReason.RESIDENT
            if announced(worker, key_of(request.adapter))
            else ChoiceReason.COLD
        )


def backoff_s(rounds: int) -> float:
    """Between round number `rounds` and the next: 0, 25, 50, 100, 200, 400, 500, 500, ... ms."""
    return 0.0 if rounds < 2 else min(BACKOFF_S * BACKOFF_FACTOR ** (rounds - 2), MAX_BACKOFF_S)


def announced(worker: WorkerView, key: AdapterKey) -> bool:
    """As Ray's replicas tell it: loaded or loading, as of the last broadcast. Reservations are not
    in it (W2).
    """
    state = worker.held.get(key)
    return state is not None and (state.loading or state.tier is Tier.GPU)
