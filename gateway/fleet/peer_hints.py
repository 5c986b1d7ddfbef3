"""Pure. Which workers of other hosts can give a worker an adapter's files, as far as heartbeats and
reservations tell.
"""

from __future__ import annotations

from itertools import chain, islice

from gateway.fleet.pool import Pool
from gateway.fleet.worker_view import WorkerView
from shared.adapters.identity import AdapterKey
from shared.link.messages import Tier

MOST = 3
"""Told to a worker: the best one, and two for when that one fails."""
LOOKED_AT = 16
"""An adapter that is everywhere has a thousand holders; any few will do."""


def peer_hints(pool: Pool, worker: WorkerView, key: AdapterKey) -> tuple[str, ...]:
    """Endpoints of such workers, best first. Workers that have the files come before those that
    fetch them, and less loaded ones before others. There is one per host, and none of the worker's
    own host.
    """
    if not pool.holders.get(key) and not pool.stashes.get(key):
        return ()
    known = chain(pool.holders.get(key, {}).values(), pool.stashes.get(key, {}).values())
    able = [
        w
        for w in islice(known, LOOKED_AT)
        if w.heartbeat.peer_endpoint and w.heartbeat.host != worker.heartbeat.host
    ]
    able.sort(key=lambda w: (w.tier_at(key) is Tier.REMOTE, w.load))
    hosts = {w.heartbeat.host: w.heartbeat.peer_endpoint for w in reversed(able)}
    return tuple(dict.fromkeys(hosts[w.heartbeat.host] for w in able))[:MOST]
