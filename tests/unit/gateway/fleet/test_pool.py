from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from gateway.fleet.fleet import Fleet
from shared.adapters.identity import AdapterRef
from shared.link.messages import AdapterState, Heartbeat, Tier, WorkerState

ADAPTERS = [AdapterRef("tiny", f"a{n}", "d") for n in range(12)]


@given(st.randoms(use_true_random=False))
def test_the_pools_sums_are_those_of_its_workers(rng: random.Random) -> None:
    fleet, sids = Fleet(1e9), []
    for seq in range(1, 80):
        worker = rng.choice(("w0", "w1", "w2"))
        pool = fleet.pool("tiny")
        match rng.randrange(4):
            case 0:
                states = [
                    AdapterState(a.name, "d", rng.choice((Tier.GPU, Tier.CPU)), in_flight=n % 2)
                    for n, a in enumerate(rng.sample(ADAPTERS, 3))
                ]
                fleet.heartbeat(
                    Heartbeat(
                        worker,
                        1,
                        seq,
                        "tiny",
                        WorkerState.SERVING,
                        8,
                        2,
                        rng.choice((0, 1, 7)),
                        adapters=tuple(states),
                    ),
                    0.0,
                )
                fleet.attach(worker, 1)
            case 1 if sids:
                fleet.release(sids.pop(rng.randrange(len(sids))))
            case 2:
                fleet.unreachable(worker, 1)
            case _ if pool.room:
                sids.append(seq)
                able = [w for w in pool.workers if w.has_room]
                fleet.reserve(rng.choice(able), seq, rng.choice(ADAPTERS))
        pool = fleet.pool("tiny")
        assert pool.load == sum(w.load for w in pool.workers)
        assert pool.room == sum(w.has_room for w in pool.workers)
        assert set(pool.open) == {w.id for w in pool.workers if w.has_room and w.open_slots > 0}
        assert set(pool.empty) == {w.id for w in pool.workers if w.has_empty_slot}
