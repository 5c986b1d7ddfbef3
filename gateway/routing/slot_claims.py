"""Pure. How the gateway hands out adapter slots. A worker never has more distinct adapters in
flight than slots, and no request waits for ever.

An adapter in steady use is idle for short moments again and again. If its slot went to another
adapter at each such moment, its next request would wait for a reload behind a burst of rare
adapters. So one copy of it keeps its slot while idle: the first of its rendezvous order that has it
in a slot, on which all gateways agree. Colder adapters wait for another slot.

Requests for adapters in flight may always join, so a busy adapter would keep its slot for ever. A
request that has waited for a slot longer than AGE_BOUND_S therefore makes a claim on some worker.
An adapter there gets no new requests, and when its last one has ended, the slot goes to the
claimant's adapter and all requests that wait for it. The adapter that must leave is the one that
has gone longest without a new request. Adapters in steady use are spared while they have few of the
slots; with more, all others would have to share the rest. (vLLM's own scheduler skips requests over
`max_loras` without end.)
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass

from gateway.fleet.pool import Pool
from gateway.fleet.rendezvous import Rendezvous
from gateway.fleet.worker_view import WorkerView
from gateway.routing.demand import DemandRates
from gateway.routing.occupancy import Occupancy
from gateway.routing.policy import NONE_EXCLUDED, RoutingRequest
from shared.adapters.identity import AdapterKey
from shared.link.messages import STEADY_PER_S, STEADY_SHARE, WorkerId

AGE_BOUND_S = 3.0
"""A request older than this claims a slot. Then it waits no longer than the running requests of the
adapter whose last request was sent longest ago.
"""
HELD_AGE_S = 0.1
"""The same for a request whose adapter's holders are all full. It is short, because every further
request for the adapter will wait as well.
"""

NONE: AdapterKey = ("", "")
"""Stands for an adapter without requests: a slot that is open to it is open to any adapter."""


@dataclass(frozen=True, slots=True)
class SlotClaim:
    worker: WorkerView
    victim: AdapterKey


class SlotClaims:
    """The slots of one base model. There is at most one open claim per waiting adapter, and at most
    half of a worker's slots are claimed.
    """

    def __init__(
        self,
        rates: DemandRates,
        rendezvous: Rendezvous,
        occupancy: Occupancy,
        age_bound_s: float = AGE_BOUND_S,
    ) -> None:
        self._rates, self._rendezvous, self._occupancy = rates, rendezvous, occupancy
        self._age_bound_s = age_bound_s
        self._claims: dict[AdapterKey, SlotClaim] = {}  # by the claimant's adapter
        self._closing: set[tuple[WorkerId, AdapterKey]] = set()
        self._on: dict[WorkerId, dict[AdapterKey, SlotClaim]] = {}
        self._changes = 0
        self._as_of: tuple[Pool | None, int, int] = (None, 0, 0)
        self._vacant = False  # whether any worker had a slot at that time
        self._kept_open: list[tuple[WorkerView, int]] = []

    def __len__(self) -> int:
        return len(self._claims)

    def of(self, key: AdapterKey) -> SlotClaim | None:
        """The claim that the adapter has made."""
        return self._claims.get(key)

    def closed(self, worker: WorkerView, key: AdapterKey) -> bool:
        """Whether the adapter gives up its slot on the worker and gets no new requests there."""
        return bool(self._closing) and (worker.id, key) in self._closing

    def open_to(self, worker: WorkerView, key: AdapterKey, pool: Pool, now: float) -> bool:
        """Whether the worker has a slot for the adapter. Slots that are reserved for another
        adapter's claim, or for a hotter adapter in steady use, do not count.
        """
        if not self._claims and not worker.steady:
            return worker.takes(key)
        if key in worker.busy or key in worker.others_busy:
            return True
        return self._enough(worker.open_slots - self._promised(worker, key), worker, key, pool, now)

    def shut(self, key: AdapterKey, pool: Pool, now: float) -> bool:
        """Whether no worker has a slot for the adapter, except where it is in flight. The answer is
        that of `open_to` for each worker, without asking each.
        """
        if (pool, pool.changes, self._changes) != self._as_of:
            self._look(pool, now)
        if self._vacant:
            return False
        claim = self._claims.get(key)
        if (
            claim is not None
            and claim.worker.id in pool.open
            and self.open_to(claim.worker, key, pool, now)
        ):
            return False
        if self._kept_open and (
            self._rates.per_s(key, now) > STEADY_PER_S
            or any(key in w.steady for w in pool.holders.get(key, {}).values())
        ):
            return not any(self._enough(spare, w, key, pool, now) for w, spare in self._kept_open)
        return True

    def _look(self, pool: Pool, now: float) -> None:
        """Finds whether any worker has a slot for any adapter. If not, it finds the workers that
        reserve slots for adapters in steady use.
        """
        self._as_of = (pool, pool.changes, self._changes)
        self._kept_open = []
        for w in pool.open.values():
            spare = w.open_slots - self._promised(w, NONE)
            if self._enough(spare, w, NONE, pool, now):
                self._vacant = True
                return
            if spare > 0:
                self._kept_open.append((w, spare))
        self._vacant = False

    def claim(
        self,
        request: RoutingRequest,
        key: AdapterKey,
        pool: Pool,
        now: float,
        *,
        held: bool = False,
        excluded: Set[WorkerId] = NONE_EXCLUDED,
    ) -> float:
        """No worker has a slot: claims one if the request is old enough. Returns when to ask again.

        `held`: the adapter has slots, all on full workers, while other workers have room. Then
        slots are not short but badly distributed, so the claim comes after HELD_AGE_S, on the least
        loaded worker.
        """
        due = request.arrived + (min(HELD_AGE_S, self._age_bound_s) if held else self._age_bound_s)
        mine = self._claims.get(key)
        if mine is not None and mine.worker.counted is None:
            self._drop(key)
            mine = None
        if now < due or mine is not None:
            return due if now < due else now + self._age_bound_s
        found = self._victim(key, pool, now, excluded, by_load=held)
        if found is None:
            return now + self._age_bound_s
        self._claims[key] = found
        self._closing.add((found.worker.id, found.victim))
        self._on.setdefault(found.worker.id, {})[key] = found
        self._changes += 1
        return now + self._age_bound_s if found.worker.in_flight(found.victim) else now

    def settle(self, request: RoutingRequest, key: AdapterKey) -> None:
        """The adapter has a slot, or no request waits for it any more."""
        if key in self._claims:
            self._drop(key)

    def reserved_for(self, pool: Pool, now: float) -> list[AdapterKey]:
        """Adapters whose claimed slot is free. No other adapter may have it, so their requests are
        tried first, out of turn.
        """
        if not self._claims:
            return []
        freed = (w for w in pool.open.values() if w.id in self._on)
        return [key for w in freed for key in self._on[w.id] if self.open_to(w, key, pool, now)]

    def _promised(self, worker: WorkerView, key: AdapterKey) -> int:
        """Open slots that are reserved for claims of other adapters. Until the victim has left, its
        slot is occupied and not one of them.
        """
        claims = self._on.get(worker.id)
        if claims is None:
            return 0
        busy, others = worker.busy, worker.others_busy
        return sum(
            [
                c.victim not in busy and c.victim not in others and other != key
                for other, c in claims.items()
            ]
        )

    def _enough(
        self, spare: int, worker: WorkerView, key: AdapterKey, pool: Pool, now: float
    ) -> bool:
        """Whether there are more spare slots than are reserved for adapters in steady use."""
        if spare <= 0 or spare > len(worker.steady):
            return spare > 0
        # Where most adapters are in steady use, all of them may be idle while all requests wait for
        # others.
        few = len(worker.steady) <= max(1.0, STEADY_SHARE * worker.beat.slots)
        return not few or spare > self._kept(worker, key, pool, now)

    def _kept(self, worker: WorkerView, key: AdapterKey, pool: Pool, now: float) -> int:
        """Slots of idle adapters in steady use that are no colder than this one and whose lasting
        copy is on this worker.
        """
        per_s = self._rates.per_s(key, now)
        return sum(
            other != key
            and (per_s <= STEADY_PER_S or per_s <= self._rates.per_s(other, now))
            and (worker.id, other) not in self._closing
            and self._lasts(worker, other, pool)
            for other in _idle_steady(worker)
        )

    def _lasts(self, worker: WorkerView, key: AdapterKey, pool: Pool) -> bool:
        """Whether this copy of the adapter is the one that keeps its slot."""
        if len(pool.holders.get(key, ())) < 2:
            return True
        first = next((w for w in self._rendezvous.order(key, pool) if key in w.loaded), None)
        return first is None or first is worker

    def _victim(
        self, key: AdapterKey, pool: Pool, now: float, excluded: Set[WorkerId], *, by_load: bool
    ) -> SlotClaim | None:
        """The adapter that must leave, on any worker or on the least loaded one, where claims are
        left. The one whose last request was sent longest ago will be gone soonest and misses the
        slot least. (With own loads, at 1.2 and 1.5 times the capacity, mean TTFT is an eighth less
        than with the adapter that has the fewest requests in flight.) While few adapters are in
        steady use, those are spared, even if no other one can be claimed for now.
        """
        able = [w for w in pool.workers if w.accepts(excluded)]
        few = sum(len(w.steady) for w in able) <= STEADY_SHARE * sum(w.beat.slots for w in able)
        best: tuple[float, float, float, float, SlotClaim] | None = None
        others = False
        for w in able:
            others = others or not w.others_busy <= w.steady
            spare = len(self._on.get(w.id, ())) < max(1, w.beat.slots // 2)
            for victim, count in (*w.busy.items(), *((idle, 0) for idle in _idle_steady(w))):
                if victim == key:
                    continue
                per_s = (
                    max(STEADY_PER_S, self._rates.per_s(victim, now)) if victim in w.steady else 0.0
                )
                others = others or not per_s
                rank = (
                    (few * per_s, w.load, count, per_s)
                    if by_load
                    else (few * per_s, self._occupancy.newest(w.id, victim), w.load, per_s)
                )
                if (
                    spare
                    and (best is None or rank < best[:4])
                    and (w.id, victim) not in self._closing
                ):
                    best = (*rank, SlotClaim(w, victim))
        return best[4] if best and not (best[0] and others) else None

    def _drop(self, key: AdapterKey) -> None:
        claim = self._claims.pop(key)
        self._closing.discard((claim.worker.id, claim.victim))
        claims = self._on[claim.worker.id]
        del claims[key]
        if not claims:
            del self._on[claim.worker.id]
        self._changes += 1


def _idle_steady(worker: WorkerView) -> Iterator[AdapterKey]:
    return (
        key for key in worker.steady if key not in worker.busy and key not in worker.others_busy
    )
