"""Pure. Slots as the gateway hands them out: never more distinct adapters in flight on a worker than it has, and nobody waits for ever.

Requests for adapters in flight may always join, so a busy adapter would keep its slot for ever. A request that has waited for a slot longer
than AGE_BOUND_S makes a claim: the adapter with the fewest requests in flight on some worker gets no new ones there, and when its last has
ended the slot goes to the claimant's adapter, with all who wait for it. (vLLM's own scheduler skips requests over `max_loras` without end.)
"""

from __future__ import annotations

from dataclasses import dataclass

from gateway.pool import Pool
from gateway.routing import Ask
from gateway.worker import Key, Worker
from shared.wire import WorkerId

AGE_BOUND_S = 3.0
"""A request older than this claims a slot; it then waits for no more than the emptiest adapter's running requests."""
HELD_AGE_S = 0.1
"""The same for a request whose adapter's holders are all full: soon, for every further one will wait as well."""


@dataclass(frozen=True, slots=True)
class Claim:
    worker: Worker
    victim: Key


class Claims:
    """Open claims of one base model: at most one per waiting adapter, and at most half of a worker's slots."""

    def __init__(self, age_bound_s: float = AGE_BOUND_S) -> None:
        self._age_bound_s = age_bound_s
        self._claims: dict[Key, Claim] = {}  # by the claimant's adapter
        self._closing: set[tuple[WorkerId, Key]] = set()
        self._per_worker: dict[WorkerId, int] = {}

    def __len__(self) -> int:
        return len(self._claims)

    def closed(self, worker: Worker, key: Key) -> bool:
        """The adapter gives up its slot there: nothing new for it."""
        return bool(self._closing) and (worker.id, key) in self._closing

    def open_to(self, worker: Worker, key: Key) -> bool:
        """The worker has a slot for the adapter that no claim of another one keeps."""
        if not self._claims:
            return worker.takes(key)
        if worker.in_flight(key):
            return True
        claim = self._claims.get(key)
        kept = self._per_worker.get(worker.id, 0) - (claim is not None and claim.worker is worker)
        # Before the victim has left, its slot is occupied: only claims whose victim is gone keep an open one.
        for other, c in self._claims.items():
            if c.worker is worker and other != key and worker.in_flight(c.victim):
                kept -= 1
        return worker.open_slots > kept

    def claim(self, ask: Ask, key: Key, pool: Pool, now: float, *, held: bool = False) -> float:
        """No slot anywhere: claims one if the request is old enough. Returns when to ask again.

        `held`: the adapter has slots, all on full workers, while others have room: that is no want of slots but a bad distribution of them, so
        the claim comes after HELD_AGE_S, on the least loaded worker.
        """
        due = ask.arrived + (min(HELD_AGE_S, self._age_bound_s) if held else self._age_bound_s)
        mine = self._claims.get(key)
        if mine is not None and mine.worker.counted is None:
            self._drop(key)
            mine = None
        if now < due or mine is not None:
            return due if now < due else now + self._age_bound_s
        found = self._victim(key, pool, by_load=held)
        if found is not None:
            self._claims[key] = found
            self._closing.add((found.worker.id, found.victim))
            self._per_worker[found.worker.id] = self._per_worker.get(found.worker.id, 0) + 1
        return now + self._age_bound_s

    def settle(self, ask: Ask, key: Key) -> None:
        """The adapter has a slot, or nobody waits for it any more."""
        if key in self._claims:
            self._drop(key)

    def _victim(self, key: Key, pool: Pool, *, by_load: bool) -> Claim | None:
        """The adapter in flight with the fewest requests, on any worker or the least loaded one that has claims to spare."""
        best: tuple[int, int, Claim] | None = None
        for w in pool.workers:
            if not w.has_room or self._per_worker.get(w.id, 0) >= max(1, w.beat.slots // 2):
                continue
            for victim, count in w.busy.items():
                rank = (w.load, count) if by_load else (count, w.load)
                if (best is None or rank < best[:2]) and victim != key and (w.id, victim) not in self._closing:
                    best = (*rank, Claim(w, victim))
        return best[2] if best else None

    def _drop(self, key: Key) -> None:
        claim = self._claims.pop(key)
        self._closing.discard((claim.worker.id, claim.victim))
        left = self._per_worker[claim.worker.id] - 1
        if left:
            self._per_worker[claim.worker.id] = left
        else:
            del self._per_worker[claim.worker.id]
