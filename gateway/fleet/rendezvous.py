"""Pure. Rendezvous hashing: each adapter has its own stable order of the workers."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

from gateway.fleet.pool import Pool
from gateway.fleet.worker_view import WorkerView
from shared.adapters.identity import AdapterKey

ORDER_LENGTH = 16
"""Workers of each rendezvous order that are remembered. If none of sixteen can take an adapter,
hardly any other can, and a scan of all workers decides.
"""


MAX_ORDERS = 20_000


MASK = (1 << 64) - 1


MIX = 0x9E3779B97F4A7C15
"""2^64 over the golden ratio, odd: the product's high bits depend on all bits of the factor
(Knuth's multiplicative hashing).
"""


def seed_of(key: AdapterKey) -> int:
    """The same number on every gateway, whatever its hash seed."""
    return int.from_bytes(hashlib.blake2b("\0".join(key).encode(), digest_size=8).digest(), "big")


class Rendezvous:
    """Ranks the workers of one pool for an adapter. The first ORDER_LENGTH workers of each order
    are remembered until the pool changes.
    """

    def __init__(self) -> None:
        self._orders: OrderedDict[AdapterKey, list[WorkerView]] = OrderedDict()
        self._seeds: list[int] = []
        self._version = -1

    def order(self, key: AdapterKey, pool: Pool) -> list[WorkerView]:
        if pool.version != self._version:
            self._version, self._seeds = pool.version, [w.seed for w in pool.workers]
            self._orders.clear()
        order = self._orders.get(key)
        if order is None:
            order = self._orders[key] = self._ranked(seed_of(key), pool.workers)
            if len(self._orders) > MAX_ORDERS:
                self._orders.popitem(last=False)
        return order

    def is_home(self, worker: WorkerView, key: AdapterKey, pool: Pool, homes: int) -> bool:
        """Whether the worker is one of the first `homes` of the order, or would be if it were in
        the pool.
        """
        seed = seed_of(key)
        mine = _rank(worker.seed, seed)
        order = self.order(key, pool)[:homes]
        return sum(w is not worker and _rank(w.seed, seed) > mine for w in order) < homes

    def _ranked(self, seed: int, workers: Sequence[WorkerView]) -> list[WorkerView]:
        """The first workers of the order. Of a large pool only those are sorted whose hash is in a
        top share that holds about 3 x ORDER_LENGTH workers.
        """
        cut = (
            int(MASK * (1 - 3 * ORDER_LENGTH / len(workers)))
            if len(workers) > 4 * ORDER_LENGTH
            else -1
        )
        found = [(h, n) for n, s in enumerate(self._seeds) if (h := _rank(s, seed)) > cut]
        if len(found) < ORDER_LENGTH and cut >= 0:
            found = [(_rank(s, seed), n) for n, s in enumerate(self._seeds)]
        found.sort(reverse=True)
        return [workers[n] for _, n in found[:ORDER_LENGTH]]


def _rank(worker_seed: int, seed: int) -> int:
    """The highest comes first."""
    return (worker_seed ^ seed) * MIX & MASK
