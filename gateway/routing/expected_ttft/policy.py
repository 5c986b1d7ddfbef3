"""Pure. The default policy. It asks price.py for the price of each worker that may come into
question, and takes the cheapest.

Three kinds of workers come into question for an adapter:

- its holders: they have it in a slot, or on its way to one;
- workers that have it in host memory;
- its homes: the first workers of its rendezvous order. All gateways agree on them with nothing
  shared. Workers with an empty slot come first, then those with a slot that is not in use.

A second copy is loaded where that is cheaper, its load divided by the requests that will use it. So
an adapter spreads as its requests crowd its holders, and its copies go when they are not used.

If every slot is in use, a request joins the line of a worker, which has as many places as slots.
If the lines are full, it waits in the gateway.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence, Set
from itertools import islice

from gateway.fleet.fleet import Fleet
from gateway.fleet.pool import Pool
from gateway.fleet.rendezvous import Rendezvous
from gateway.fleet.worker_view import WorkerView
from gateway.routing.expected_ttft.price import Learned, mean_chance, price
from gateway.routing.policy import (
    NONE_EXCLUDED,
    Blocked,
    Candidate,
    Choice,
    ChoiceReason,
    CostBreakdown,
    Decision,
    Defer,
    RoutingRequest,
    StatelessPolicy,
    tier_of,
)
from shared.adapters.identity import AdapterKey, AdapterRef, key_of
from shared.link.messages import Tier, WorkerId

HOMES = 2
"""Two choices are far better than one, and three hardly better than two (Mitzenmacher, 2001)."""
MOST_PRICED = 16
"""At most this many workers are priced of any kind, however large the fleet is."""
WEIGHT = 0.05
"""Of the newest request in what is learned: a request twenty back counts a third of it."""
AFFINITY_S = 0.005
"""The most that a known prefix or session saves. It is less than a load: it breaks ties."""
MAX_AFFINITIES = 50_000

NOTHING = Learned()
NOBODY: dict[WorkerId, WorkerView] = {}


class ExpectedTTFT(StatelessPolicy):
    """See the module. Of each base model it learns how long requests take (see Learned), and of
    sessions and prompts where they were served last. Workers measure the rest.
    """

    name = "expected-ttft"

    def __init__(self) -> None:
        self._rendezvous: dict[str, Rendezvous] = {}
        self._learned: dict[str, Learned] = {}
        # (base, session or prefix) -> the worker that had it last, the longest unused first
        self._last: dict[tuple[str, int | str], WorkerId] = {}

    def choose(
        self,
        request: RoutingRequest,
        fleet: Fleet,
        now: float,
        rng: random.Random,
        excluded: Set[WorkerId] = NONE_EXCLUDED,
    ) -> Decision:
        pool = fleet.pool(request.base)
        if not pool.room:
            return Defer(Blocked.ROOM)
        if request.adapter is None:
            return self._choose_base(request, pool, now, rng, excluded)
        key = key_of(request.adapter)
        holders = pool.holders.get(key, NOBODY)
        held = [w for w in holders.values() if w.accepts(excluded) and w.takes(key)]
        best = self._cheapest(request, key, held, now, only_copy=len(holders) == 1)
        if best is not None and _is_quiet(best[1], pool):
            return Choice(best[1], ChoiceReason.RESIDENT, best[1].tier_at(key), best[0])
        if pool.open:
            others = self._others(key, pool, holders, excluded)
            users = sum([w.in_flight(key) for w in holders.values()]) if best is not None else 0
            shared_by = 1.0 + users / (1 + len(holders))
            chance = None if best is None else mean_chance(_some(pool, rng))
            other = self._cheapest(request, key, others, now, shared_by, chance=chance)
            # whoever joins a copy that is on its way waits for it; the next ones do not
            if other is not None and (
                best is None or other[0].total_s < best[0].total_s - best[0].load_s
            ):
                reason = ChoiceReason.SPILL if holders else ChoiceReason.COLD
                return Choice(other[1], reason, other[1].tier_at(key), other[0])
        if best is not None:
            return Choice(best[1], ChoiceReason.RESIDENT, best[1].tier_at(key), best[0])
        return Defer(_blocked(pool, excluded))

    def _choose_base(
        self,
        request: RoutingRequest,
        pool: Pool,
        now: float,
        rng: random.Random,
        excluded: Set[WorkerId],
    ) -> Decision:
        able = [w for w in _some(pool, rng) if w.accepts(excluded)] or (
            [w for w in pool.workers if w.accepts(excluded)]
        )
        best = self._cheapest(request, None, able, now)
        if best is None:
            return Defer(Blocked.ROOM)
        return Choice(best[1], ChoiceReason.BASE, cost=best[0])

    def _others(
        self,
        key: AdapterKey,
        pool: Pool,
        holders: dict[WorkerId, WorkerView],
        excluded: Set[WorkerId],
    ) -> list[WorkerView]:
        """The workers with a place for the adapter that would have to load it: those that have it
        in host memory, and its homes. Where the adapter is loaded, a place for a request becomes
        free long before a slot does. So no second copy waits in a line.
        """
        loaded = any(key in w.loaded and w.id not in excluded for w in holders.values())

        def able(workers: Iterable[WorkerView], most: int = MOST_PRICED) -> list[WorkerView]:
            found = (w for w in workers if w.open_slots > 0 and w.id not in holders)
            if loaded:
                found = (w for w in found if w.has_open_slot)
            return list(islice((w for w in found if w.accepts(excluded)), most))

        homes = able(self._order(key, pool))
        stashed = able(pool.stashes.get(key, NOBODY).values())
        if not holders and pool.empty:
            # nobody has to leave a slot for a cold adapter while another slot is empty
            empty = [w for w in homes if w.has_empty_slot] or able(pool.empty.values())
            if empty:
                homes, stashed = empty, [w for w in stashed if w.has_empty_slot]
        # nobody stands in line where another of these workers has a slot to give
        homes = [w for w in homes if w.has_open_slot] or homes
        found = homes[:HOMES] or able(pool.open.values())
        return found + [w for w in stashed if w not in found and w.tier_at(key) is Tier.CPU]

    def _cheapest(
        self,
        request: RoutingRequest,
        key: AdapterKey | None,
        workers: Iterable[WorkerView],
        now: float,
        shared_by: float = 1.0,
        only_copy: bool = False,
        chance: float | None = None,
    ) -> tuple[CostBreakdown, WorkerView] | None:
        best: tuple[CostBreakdown, WorkerView] | None = None
        learned, near = self._learned.get(request.base, NOTHING), self._near(request)
        for w in workers:
            prefix_s = AFFINITY_S if w.id in near else 0.0
            cost = price(request, key, w, learned, now, shared_by, prefix_s, only_copy, chance)
            if best is None or cost.total_s < best[0].total_s:
                best = cost, w
        return best

    def _near(self, request: RoutingRequest) -> tuple[WorkerId | None, WorkerId | None]:
        """Where the beginning of the prompt is likely in the cache: its session, or the prefix
        itself.
        """
        base, last = request.base, self._last
        return last.get((base, request.session)), last.get((base, request.prefix))

    def _order(self, key: AdapterKey, pool: Pool) -> list[WorkerView]:
        base = pool.workers[0].heartbeat.base
        if base not in self._rendezvous:
            self._rendezvous[base] = Rendezvous()
        return self._rendezvous[base].order(key, pool)

    # ---- what it hears, and what it is asked -----------------------------------------------------

    def sent(self, request: RoutingRequest, choice: Choice, now: float) -> None:
        last = self._last
        for mark in (request.session, request.prefix):
            if mark:
                last.pop((request.base, mark), None)
                last[request.base, mark] = choice.worker.id
        while len(last) > MAX_AFFINITIES:
            del last[next(iter(last))]

    def finished(
        self,
        request: RoutingRequest,
        choice: Choice,
        service_s: float,
        first_token_s: float,
        now: float,
    ) -> None:
        before = self._learned.get(request.base, NOTHING)
        outside_s = before.outside_s
        if first_token_s and choice.cost is not None:
            outside_s = _towards_median(outside_s, choice.cost.ttft_s, first_token_s)
        service_s = before.service_s + WEIGHT * (service_s - before.service_s)
        self._learned[request.base] = Learned(service_s, outside_s)

    def warm_set(self, worker: WorkerView, fleet: Fleet, now: float) -> list[AdapterRef]:
        """The adapters in steady use that have the worker as their first home. They fill at most
        half of its slots.
        """
        base = worker.heartbeat.base
        pool, rendezvous = fleet.pool(base), self._rendezvous.setdefault(base, Rendezvous())
        steady = {key: w.in_flight(key) for w in pool.workers for key in w.steady}
        hottest = sorted(steady, key=lambda key: (-steady[key], key))
        own = (key for key in hottest if rendezvous.is_home(worker, key, pool, 1))
        return [AdapterRef(base, *key) for key in islice(own, worker.heartbeat.slots // 2)]

    def explain(self, request: RoutingRequest, fleet: Fleet, now: float) -> list[Candidate]:
        key = None if request.adapter is None else key_of(request.adapter)
        learned, near = self._learned.get(request.base, NOTHING), self._near(request)
        pool, found = fleet.pool(request.base), []
        holders = NOBODY if key is None else pool.holders.get(key, NOBODY)
        only_copy, chance = len(holders) == 1, mean_chance(pool.workers) if holders else None
        for w in pool.workers:
            note = "" if w.has_room else "no room"
            if not note and key is not None and not w.takes(key):
                note = "no slot"
            prefix_s = AFFINITY_S if w.id in near else 0.0
            others = None if w.id in holders else chance
            cost = price(request, key, w, learned, now, 1.0, prefix_s, only_copy, others)
            found.append(Candidate(w, tier_of(w, request.adapter), not note, note, cost))
        return sorted(found, key=lambda c: (not c.eligible, c.cost.total_s))


def _towards_median(outside_s: float, expected_s: float, took_s: float) -> float:
    """A little more where the first token came later than expected, else a little less. So half of
    them come later in the end (Robbins and Monro, 1951): a mean would follow the few that took
    long. It stays above a small share of them, so that it can grow again.
    """
    least_s = WEIGHT * min(took_s, expected_s)
    if not outside_s:
        return max(least_s, took_s - expected_s)
    return max(least_s, outside_s * (1 + WEIGHT if took_s > expected_s else 1 - WEIGHT))


def _is_quiet(worker: WorkerView, pool: Pool) -> bool:
    """Whether it has no more requests than the mean. Nobody else is priced then: that changes no
    time to a first token, and a decision takes 8 us of a core instead of 62 (16 workers).
    """
    return worker.load * len(pool.workers) <= pool.load


def _some(pool: Pool, rng: random.Random) -> Sequence[WorkerView]:
    workers = pool.workers
    return workers if len(workers) <= MOST_PRICED else rng.sample(workers, MOST_PRICED)


def _blocked(pool: Pool, excluded: Set[WorkerId]) -> Blocked:
    return Blocked.SLOT if any(w.accepts(excluded) for w in pool.workers) else Blocked.ROOM
