"""Pure. Rendezvous hashing: each adapter has its own stable order of the workers."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

from gateway.fleet.pool import Pool
from gateway.fleet.worker_view import Key, WorkerView

ORDER_LENGTH = 16
"""Workers of a rendezvous order that are kept. If none of sixteen can take an adapter, hardly
anybody can, and a scan settles it.
"""


MAX_ORDERS = 20_000


MASK = (1 << 64) - 1


MIX = 0x9E3779B97F4A7C15
"""2^64 over the golden ratio, odd: the product's high bits depend on all bits of the factor
(Knuth's multiplicative hashing).
"""


def seed_of(key: Key) -> int:
    """The same number on every gateway, whatever its hash seed."""
    return int.from_bytes(hashlib.blake2b("\0".join(key).encode(), digest_size=8).digest(), "big")


class Rendezvous:
    """Ranks the workers of one pool for an adapter; the first ORDER_LENGTH of each order are kept
    until the pool changes.
    """

    def __init__(self) -> None:
        self._orders: OrderedDict[Key, list[WorkerView]] = OrderedDict()
        self._seeds: list[int] = []
        self._version = -1

    def order(self, key: Key, pool: Pool) -> list[WorkerView]:
        if pool.version != self._version:
            self._version, self._seeds = pool.version, [w.seed for w in pool.workers]
            self._orders.clear()
        order = self._orders.get(key)
        if order is None:
            order = self._orders[key] = self._ranked(seed_of(key), pool.workers)
            if len(self._orders) > MAX_ORDERS:
                self._orders.popitem(last=False)
        return order

    def _ranked(self, seed: int, workers: Sequence[WorkerView]) -> list[WorkerView]:
        """Of a large pool only those whose hash is in the top share that holds some 3 x
        ORDER_LENGTH are sorted.
        """
        cut = (
            int(MASK * (1 - 3 * ORDER_LENGTH / len(workers)))
            if len(workers) > 4 * ORDER_LENGTH
            else -1
        )
        found = [(h, n) for n, s in enumerate(self._seeds) if (h := (s ^ seed) * MIX & MASK) > cut]
        if len(found) < ORDER_LENGTH and cut >= 0:
            found = [((s ^ seed) * MIX & MASK, n) for n, s in enumerate(self._seeds)]
        found.sort(reverse=True)
        return [workers[n] for _, n in found[:ORDER_LENGTH]]
