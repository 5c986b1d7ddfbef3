"""Pure. The default policy. It chooses the worker with the least expected time to first token
(TTFT), the loss of other requests included.

    queue wait + slot wait + load(tier, bytes) + stall x running sequences + eviction - prefix reuse
    (seconds)

The part of a load that runs inside the engine's loop stalls all running sequences, so it is charged
for each of them. A prefill delays them less: it is charged at a fiftieth. Four rules stand beside
the sum:

- Slots: an adapter that is not in flight on a worker goes there only if a slot can be had.
  Otherwise the request waits in the gateway, where the next free slot of any worker can take it.
  With few open slots, a copy in flight is preferred to a second copy.
- Homes: a cold adapter goes where its weights are cached, else to its home in rendezvous order,
  within the bounded load.
- Copies: another copy is loaded when the demand is worth one. Until then, and while a copy is on
  its way, requests join the copies that exist.
- Rebalancing: an adapter leaves a worker that stays far busier than the others.

docs/ROUTING.md explains all of it.
"""

from __future__ import annotations

import math
import random
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Set
from itertools import islice
from typing import TypeAlias

from gateway.fleet.fleet import Fleet
from gateway.fleet.pool import Pool
from gateway.fleet.rendezvous import Rendezvous
from gateway.fleet.worker_view import WorkerView
from gateway.routing import costs
from gateway.routing.demand import BOUND, FLOOR, DemandRates, HomeSets, copies_for
from gateway.routing.occupancy import Occupancy
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
)
from gateway.routing.rebalance import Rebalancer
from gateway.routing.slot_claims import SlotClaims
from gateway.routing.slot_wait import LONGEST_WAIT_S, SlotWait
from shared.adapters.identity import AdapterKey, AdapterRef, key_of
from shared.link.messages import Tier, WorkerId

HOME_CHOICES = 2
"""Workers of the rendezvous order that are priced for a cold adapter: its home and the next one, so
that an idle one can win over a busy one. Workers that are loading are passed over while others are
not: loads run one after the other, and each stops all sequences there. (p99 TTFT of `hot` at 223
requests/s 157 -> 145 ms; of all others in a flash crowd +22% -> +15%.)
"""
LOWER_TIER_CHOICES = 8
"""At most this many of the workers that have the adapter in a lower tier are priced."""
BASE_CHOICES = 16
"""At most this many workers are priced for a request of the base model. If there are more, they are
drawn at random.
"""
HORIZON_S = 10.0
"""How long the present demand is assumed to last, when a load is weighed against what it saves."""
PREFILL_DELAY_WEIGHT = 0.02
"""Weight of a running stream's delay by a prefill, against a wait for a first token. It is enough
to prefer the lighter of two workers whose queues tie. With 1, the worker that ran ten sequences
fewer got the next handful of prompts at once, and they queued for each other. p99 TTFT of `fits` at
309 requests/s was 119 ms with 1, 91 with 0.2 and 65 with this; of `hot` at 223 it was 155, 127 and
112; of others in a flash crowd +15%, +10%. A load's stall counts in full.
"""
VICTIMS = 4
"""The next victim of a worker is taken to be the coldest of its first idle adapters, this many."""
RARE_REQUESTS = 0.1
"""If fewer requests than this are expected within HORIZON_S, an idle adapter's slot is nobody's
loss.
"""
MISS_WINDOW_S = 10.0
"""Time constant of the rate at which adapters are not in a slot."""
SPREADS = 1.0
"""Slots are kept open for the misses: this many standard deviations of their number."""
ABUNDANT_SPREADS = 5.0
"""Slots are abundant from this many standard deviations on. It is more, because another copy or a
move takes somebody's slot for a while. With 2, moves cost the scenario `hot` a twentieth of its
capacity.
"""
EVEN_LOAD_SHARE = 0.5
"""Load of one copy of an adapter while slots abound, as a share of the mean load. An adapter that
gets half of all requests then sits on every worker. So other adapters' requests are not crowded
onto the workers without it. (A flash crowd to 50%: with a copy per 1.25 x the mean, 5 of 8 workers
had it, and the p99 of all others rose by 51%; with this, by 17%.) While slots are scarce the share
is BOUND: a copy takes a slot, and where all slots are in use that costs more.
"""
LEAST_SPREAD = 1e-3
"""Least spread, in slots: where nothing misses, any open slot is plenty."""
AFFINITY_S = 0.005
"""The most that a known prefix or session can save. It is less than a load from the CPU tier, so it
only breaks ties.
"""
MAX_AFFINITIES = 50_000


Holders: TypeAlias = Mapping[WorkerId, WorkerView]
NOBODY: Holders = {}
NOTHING = CostBreakdown()


class ExpectedTTFT:
    """See the module. Per base model the policy learns service times and miss rates, and per
    adapter request rates. Workers measure the rest.
    """

    name = "expected-ttft"

    def __init__(self, longest_wait_s: float = LONGEST_WAIT_S) -> None:
        self._longest_wait_s = longest_wait_s
        self._bases: dict[str, _Base] = {}
        # prefix or session -> worker
        self._last: OrderedDict[tuple[str, int | str], WorkerId] = OrderedDict()

    # ---- decisions -------------------------------------------------------------------------------

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
        base = self._base(request.base)
        if request.adapter is None:
            return self._choose_base(request, pool, now, rng, excluded)
        key = key_of(request.adapter)
        holders = pool.holders.get(key)
        bound = max(FLOOR, BOUND * pool.mean_load)
        if holders is None:
            return self._choose_cold(
                request, key, base, pool, bound, now, ChoiceReason.COLD, excluded
            )
        staying = [w for w in holders.values() if not base.rebalancer.left(w, key, now)]
        return self._choose_held(
            request, key, base, pool, staying or list(holders.values()), bound, now, excluded
        )

    def _choose_held(
        self,
        request: RoutingRequest,
        key: AdapterKey,
        base: _Base,
        pool: Pool,
        holders: list[WorkerView],
        bound: float,
        now: float,
        excluded: Set[WorkerId],
    ) -> Decision:
        """The cheapest holder. Or another worker, if the demand is worth one more copy, or if that
        worker is cheaper and the load there takes no adapter's only slot.
        """
        price = base.slot_price(pool, now)
        copies = len(holders)
        demand = max(
            sum([w.in_flight(key) for w in holders]) + 1.0,
            base.rates.per_s(key, now) * base.services.service_s,
        )
        wanted = base.homes.copies(
            key,
            demand,
            max(FLOOR, EVEN_LOAD_SHARE * pool.mean_load) if base.abundant(pool, now) else bound,
            now,
        )
        kept = (
            holders
            if price == 0.0
            else self._kept(key, holders, copies_for(demand, bound), bound, excluded)
        )
        best, least = self._cheapest(request, key, base, pool, kept, price, now, excluded)
        if best is None:
            return self._choose_cold(
                request, key, base, pool, bound, now, ChoiceReason.SPILL, excluded
            )
        if copies < wanted:
            base.rebalancer.settle(key, now)
        else:
            relieved = self._relieved(key, best, base, pool, now, excluded)
            if relieved is not None:
                return relieved
        chosen = Choice(best, ChoiceReason.RESIDENT, best.tier_at(key))
        if (
            copies >= wanted
            and (price > 0.0 or best.load <= pool.mean_load + 1)
            and best.load < bound
        ):
            return chosen
        if copies >= wanted and any(key in w.coming for w in holders):
            return chosen
        other = self._choose_cold(
            request,
            key,
            base,
            pool,
            bound,
            now,
            ChoiceReason.SPILL,
            excluded,
            copies,
            needed=copies < wanted,
        )
        if not isinstance(other, Choice) or other.cost is None:
            return chosen
        needed = copies < wanted and (best.load >= bound or base.abundant(pool, now))
        return other if needed or other.cost.total_s < least else chosen

    def _relieved(
        self,
        key: AdapterKey,
        w: WorkerView,
        base: _Base,
        pool: Pool,
        now: float,
        excluded: Set[WorkerId],
    ) -> Choice | None:
        """The lighter worker that the adapter moves to, if this worker is far busier than the
        others.
        """
        rebalancer = base.rebalancer
        if not rebalancer.due(w, key, pool, now) or not base.abundant(pool, now):
            return None
        lighter = rebalancer.lighter(w, base.rendezvous.order(key, pool), key)
        able = [
            o
            for o in lighter
            if o.accepts(excluded)
            and (o.open_slots > 1 or o.in_flight(key))
            and base.claims.open_to(o, key, pool, now)
        ]
        if not able:
            return None
        to = min(able, key=lambda o: (o.tier_at(key) > Tier.CPU, o.usual_load))
        rebalancer.move(w, to, key, now)
        return Choice(to, ChoiceReason.SPILL, to.tier_at(key))

    @staticmethod
    def _kept(
        key: AdapterKey, holders: list[WorkerView], need: int, bound: float, excluded: Set[WorkerId]
    ) -> list[WorkerView]:
        """While slots are scarce: as many holders as the demand needs, those with the most requests
        in flight. The other holders give their slots up.
        """
        if len(holders) <= need:
            return holders
        kept = sorted(holders, key=lambda w: -w.in_flight(key))[:need]
        return kept if any(w.load < bound and w.accepts(excluded) for w in kept) else holders

    def _cheapest(
        self,
        request: RoutingRequest,
        key: AdapterKey,
        base: _Base,
        pool: Pool,
        holders: list[WorkerView],
        price: float,
        now: float,
        excluded: Set[WorkerId],
    ) -> tuple[WorkerView | None, float]:
        best: WorkerView | None = None
        least = math.inf
        for w in holders:
            if (
                w.accepts(excluded)
                and not base.claims.closed(w, key)
                and base.claims.open_to(w, key, pool, now)
            ):
                cost = self._cost_on(request, key, w, base, pool, price, now).total_s
                if cost < least:
                    best, least = w, cost
        return best, least

    def _choose_cold(
        self,
        request: RoutingRequest,
        key: AdapterKey,
        base: _Base,
        pool: Pool,
        bound: float,
        now: float,
        reason: ChoiceReason,
        excluded: Set[WorkerId],
        copies: int = 0,
        needed: bool = True,
    ) -> Decision:
        """Where to load the adapter: the least cost among the workers that have it cached and its
        home set.
        """
        holders = pool.holders.get(key, NOBODY)
        candidates: list[WorkerView] = []
        stashed = pool.stashes.get(key, NOBODY)
        shut = base.claims.shut(key, pool, now) and not any(
            key in w.others_busy for w in stashed.values()
        )
        if stashed and not (copies and shut):
            cached = [
                w
                for w in islice(stashed.values(), LOWER_TIER_CHOICES)
                if w.id not in holders and w.tier_at(key) is Tier.CPU
            ]
            if not shut:
                candidates = [
                    w
                    for w in cached
                    if w.accepts(excluded) and base.claims.open_to(w, key, pool, now)
                ]
            if cached and not copies and not candidates:
                elsewhere_s = costs.load_elsewhere_s(cached[0], request.size_bytes, pool.mean_load)
                due = base.slot_wait.until(request, cached, base.slack(pool, now), elsewhere_s, now)
                if now < due:
                    return Defer(Blocked.TURN, due)
        if shut or not pool.open:
            return self._blocked(request, key, base, pool, now, excluded)
        candidates += self._homes(
            key, base, pool, bound, holders, now, excluded, anybody=not candidates
        )
        if not copies:
            candidates = self._emptiest(key, candidates, base, pool, bound, now, excluded)
        if not needed:
            candidates = [w for w in candidates if self._surplus(w, base, pool, now)]
        uses = 1.0 + base.rates.per_s(key, now) * HORIZON_S / (copies + 1) if copies else 1.0
        best: WorkerView | None = None
        cost = NOTHING
        for w in candidates:
            found = self._cost_on(request, key, w, base, pool, 0.0, now, uses)
            if best is None or found.total_s < cost.total_s:
                best, cost = w, found
        return (
            Choice(best, reason, best.tier_at(key), cost)
            if best is not None
            else self._blocked(request, key, base, pool, now, excluded)
        )

    @staticmethod
    def _emptiest(
        key: AdapterKey,
        candidates: list[WorkerView],
        base: _Base,
        pool: Pool,
        bound: float,
        now: float,
        excluded: Set[WorkerId],
    ) -> list[WorkerView]:
        """No adapter leaves its slot for a cold one while another worker has an empty slot. Of
        those workers it takes the first in rendezvous order, within the bound.
        """
        if any(w.has_empty_slot for w in candidates):
            return [w for w in candidates if w.has_empty_slot]
        if not any(w.has_empty_slot for w in pool.workers):
            return candidates
        empty = (
            w
            for w in base.rendezvous.order(key, pool)
            if w.has_empty_slot
            and w.load < bound
            and w.accepts(excluded)
            and base.claims.open_to(w, key, pool, now)
        )
        return list(islice(empty, HOME_CHOICES)) or candidates

    def _homes(
        self,
        key: AdapterKey,
        base: _Base,
        pool: Pool,
        bound: float,
        holders: Holders,
        now: float,
        excluded: Set[WorkerId],
        *,
        anybody: bool,
    ) -> list[WorkerView]:
        """The first workers of the rendezvous order that are open and within the bound. Workers
        that load nothing come first. If there are none within the bound, it takes those beyond it,
        and at last any.
        """
        claims = base.claims

        def first(number: int, workers: Iterable[WorkerView]) -> list[WorkerView]:
            return list(islice((w for w in workers if claims.open_to(w, key, pool, now)), number))

        homes = [
            w
            for w in base.rendezvous.order(key, pool)
            if w.accepts(excluded) and w.id not in holders
        ]
        within = first(HOME_CHOICES, (w for w in homes if w.load < bound and not w.coming))
        within = within or first(HOME_CHOICES, (w for w in homes if w.load < bound))
        if within or not anybody:
            return within
        beyond = first(HOME_CHOICES, homes)
        if beyond:
            return beyond
        able = [
            w
            for w in pool.workers
            if w.counted and w.counted[1] > 0 and w.accepts(excluded) and w.id not in holders
        ]
        return first(1, sorted(able, key=lambda w: w.load))

    def _choose_base(
        self,
        request: RoutingRequest,
        pool: Pool,
        now: float,
        rng: random.Random,
        excluded: Set[WorkerId],
    ) -> Decision:
        base = self._base(request.base)
        workers = pool.workers
        if len(workers) > BASE_CHOICES:
            workers = rng.sample(workers, BASE_CHOICES)
        best: WorkerView | None = None
        least = math.inf
        for w in workers:
            if w.accepts(excluded):
                cost = self._cost_on(request, None, w, base, pool, 0.0, now).total_s
                if cost < least:
                    best, least = w, cost
        if best is None:
            best = next((w for w in pool.workers if w.accepts(excluded)), None)
        return Choice(best, ChoiceReason.BASE) if best is not None else Defer(Blocked.ROOM)

    def _blocked(
        self,
        request: RoutingRequest,
        key: AdapterKey,
        base: _Base,
        pool: Pool,
        now: float,
        excluded: Set[WorkerId],
    ) -> Defer:
        if not any(w.accepts(excluded) for w in pool.workers):
            return Defer(Blocked.ROOM)
        held = key in pool.holders
        return Defer(
            Blocked.SLOT, base.claims.claim(request, key, pool, now, held=held, excluded=excluded)
        )

    # ---- costs -----------------------------------------------------------------------------------

    def _cost_on(
        self,
        request: RoutingRequest,
        key: AdapterKey | None,
        w: WorkerView,
        base: _Base,
        pool: Pool,
        price: float,
        now: float,
        uses: float = 1.0,
    ) -> CostBreakdown:
        rate = costs.prefill_rate(w)
        prefill_s = request.prompt_tokens / rate
        running = w.load
        # A step runs only where sequences run. What an idle worker measured last says nothing about
        # its next step.
        queue_s = (
            w.backlog_tokens(rate, now) / rate + prefill_s + (costs.step_s(w) if running else 0.0)
        )
        slot_s = load_s = evict_s = 0.0
        stall_s = prefill_s * running * PREFILL_DELAY_WEIGHT
        if key is not None:
            if not w.in_flight(key):
                slot_s = (
                    price if key in w.loaded else base.services.service_s * w.crowding * w.crowding
                )
            if key not in w.loaded:
                load_s, stalling_s = self._load(request, key, w, now)
                stall_s += stalling_s * running / uses
                if stalling_s:
                    evict_s = self._eviction(w, base, pool, now) / uses
        prefix_s = 0.0
        if self._last and (request.session or request.prefix) and w.id in self._known(request):
            prefix_s = min(prefill_s, AFFINITY_S) if not request.session else AFFINITY_S
        return CostBreakdown(queue_s, slot_s, load_s, stall_s, evict_s, prefix_s)

    def _load(
        self, request: RoutingRequest, key: AdapterKey, w: WorkerView, now: float
    ) -> tuple[float, float]:
        """(seconds until the adapter is in a slot, seconds of those that this load stalls the
        engine)
        """
        state, tier = w.held.get(key), w.tier_at(key)
        own_s = costs.load_s(w, tier, request.size_bytes)  # inside and beside the engine's loop
        if key in w.coming:
            eta_s = (
                state.eta_s - (now - w.beat_at) if state is not None and state.loading else own_s
            )
            return max(eta_s, 0.0), 0.0
        ahead_s = len(w.coming) * own_s if w.coming else 0.0
        return ahead_s + own_s + costs.fetch_s(w, tier), costs.stalling_load_s(
            w, tier, request.size_bytes
        )

    def _eviction(self, w: WorkerView, base: _Base, pool: Pool, now: float) -> float:
        """What it costs that an adapter must leave: the reload of the likely victim, if it is
        wanted again soon and is nowhere else.
        """
        if w.free_slots > 0 or not w.idle:
            return 0.0
        victim = self._victim(w, base, now)
        if len(pool.holders.get(victim, ())) > 1:
            return 0.0
        again = min(1.0, base.rates.per_s(victim, now) * HORIZON_S)
        tier = Tier.CPU if w.lower else Tier.DISK
        return again * (costs.load_s(w, tier, 0) + costs.stalling_load_s(w, tier, 0) * w.load)

    @staticmethod
    def _victim(w: WorkerView, base: _Base, now: float) -> AdapterKey:
        """The adapter that the worker will likely evict. The worker evicts the coldest, and that is
        nearly always among the adapters that became idle first.
        """
        return min(islice(w.idle, VICTIMS), key=lambda key: base.rates.per_s(key, now))

    def _surplus(self, w: WorkerView, base: _Base, pool: Pool, now: float) -> bool:
        """Whether the slot that a load would take is nobody's loss: it is empty, or its adapter has
        another copy or is hardly requested.
        """
        if w.free_slots > 0 or not w.idle:
            return w.free_slots > 0
        victim = self._victim(w, base, now)
        return (
            len(pool.holders.get(victim, ())) > 1
            or base.rates.per_s(victim, now) * HORIZON_S < RARE_REQUESTS
        )

    def _known(self, request: RoutingRequest) -> tuple[WorkerId | None, WorkerId | None]:
        base = request.base
        return (
            self._last.get((base, request.session)) if request.session else None,
            self._last.get((base, request.prefix)) if request.prefix else None,
        )

    # ---- what it hears ---------------------------------------------------------------------------

    def arrived(self, request: RoutingRequest, now: float) -> None:
        if request.adapter is not None:
            self._base(request.base).rates.note(key_of(request.adapter), now)

    def sent(self, request: RoutingRequest, choice: Choice, now: float) -> None:
        base = self._base(request.base)
        if request.adapter is not None:
            key = key_of(request.adapter)
            base.slot_wait.forget(request)
            base.occupancy.begin(request, choice.worker.id, key, now)
            base.claims.settle(request, key)
            if choice.reason is not ChoiceReason.RESIDENT:
                base.misses.note(MISS, now)
        for mark in (request.session, request.prefix):
            if mark:
                self._last[request.base, mark] = choice.worker.id
                self._last.move_to_end((request.base, mark))
        while len(self._last) > MAX_AFFINITIES:
            self._last.popitem(last=False)

    def left(self, request: RoutingRequest, now: float) -> None:
        if request.adapter is not None:
            base = self._base(request.base)
            base.slot_wait.forget(request)
            base.occupancy.end(request)
            base.claims.settle(request, key_of(request.adapter))

    def finished(
        self,
        request: RoutingRequest,
        worker: WorkerView,
        service_s: float,
        output_tokens: int,
        now: float,
    ) -> None:
        base = self._base(request.base)
        base.services.note(service_s, output_tokens)
        if request.adapter is not None:
            base.occupancy.end(request, service_s)

    def reserved_for(self, base: str, fleet: Fleet, now: float) -> list[AdapterKey]:
        return self._base(base).claims.reserved_for(fleet.pool(base), now)

    def warm_set(self, worker: WorkerView, fleet: Fleet, now: float) -> list[AdapterRef]:
        """The worker's share of the hot adapters: those that will surely be requested soon and
        whose home set now includes it. They fill at most half of its slots.
        """
        base, pool = self._base(worker.beat.base), fleet.pool(worker.beat.base)
        found: list[AdapterRef] = []
        for rate, key in base.rates.hottest(len(pool.workers) * worker.beat.slots, now):
            if rate * HORIZON_S < 1.0 or len(found) == worker.beat.slots // 2:
                break
            if worker in base.rendezvous.order(key, pool)[: base.homes.of(key)]:
                found.append(AdapterRef(worker.beat.base, *key))
        return found

    def explain(self, request: RoutingRequest, fleet: Fleet, now: float) -> list[Candidate]:
        pool, base = fleet.pool(request.base), self._base(request.base)
        key = None if request.adapter is None else key_of(request.adapter)
        price = base.slot_price(pool, now)
        found = []
        for w in pool.workers:
            note = "" if w.has_room else "no room"
            if key is not None and not note:
                note = (
                    "no slot"
                    if not base.claims.open_to(w, key, pool, now)
                    else "slot closing"
                    if base.claims.closed(w, key)
                    else ""
                )
                note = note or (
                    "moved to a lighter worker" if base.rebalancer.left(w, key, now) else ""
                )
            tier = Tier.GPU if key is None else w.tier_at(key)
            found.append(
                Candidate(
                    w, tier, not note, note, self._cost_on(request, key, w, base, pool, price, now)
                )
            )
        return sorted(found, key=lambda c: (not c.eligible, c.cost.total_s))

    def _base(self, name: str) -> _Base:
        base = self._bases.get(name)
        if base is None:
            base = self._bases[name] = _Base(self._longest_wait_s)
        return base


MISS: AdapterKey = ("", "")


class _Base:
    """What the policy has learned of one base model."""

    def __init__(self, longest_wait_s: float) -> None:
        self.rates = DemandRates()
        self.rendezvous = Rendezvous()
        self.misses = DemandRates(MISS_WINDOW_S, 1)
        self.services = costs.ServiceTimes()
        self.homes = HomeSets()
        self.rebalancer = Rebalancer()
        self.occupancy = Occupancy()
        self.claims = SlotClaims(self.rates, self.rendezvous, self.occupancy)
        self.slot_wait = SlotWait(self.occupancy, longest_wait_s)

    def slot_price(self, pool: Pool, now: float) -> float:
        """What the next slot is worth, in seconds: nothing while open slots abound, a service time
        when there is none.

        Misses come at random, and each occupies a slot for a service time. Twice the spread of
        their number is kept open for them (square-root staffing: Halfin and Whitt, "Heavy-Traffic
        Limits for Queues with Many Exponential Servers", 1981).
        """
        return self.services.service_s * max(0.0, 1.0 - self.slack(pool, now) / SPREADS)

    def abundant(self, pool: Pool, now: float) -> bool:
        """Whether one slot more or less is nobody's loss."""
        return self.slack(pool, now) >= ABUNDANT_SPREADS

    def slack(self, pool: Pool, now: float) -> float:
        """Open slots, in standard deviations of the number of slots that misses occupy."""
        return pool.open_slots / max(self._spread(now), LEAST_SPREAD)

    def _spread(self, now: float) -> float:
        """The standard deviation of the number of slots that misses occupy, in slots."""
        return math.sqrt(self.misses.per_s(MISS, now) * self.services.service_s)
