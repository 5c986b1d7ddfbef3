from __future__ import annotations

import random
from itertools import takewhile

from hypothesis import given
from hypothesis import strategies as st

from bench.load.workload import Fixed, Poisson, Workload, Zipf, requests
from bench.routing.sim.worker import WorkerFacts
from bench.routing.sim.world import Simulation, World
from gateway.fleet.fleet import Fleet, WorkerView
from gateway.fleet.rendezvous import Rendezvous
from gateway.routing.demand import DemandRates
from gateway.routing.occupancy import Occupancy
from gateway.routing.policy import RoutingRequest
from gateway.routing.slot_claims import SlotClaims
from shared.adapters.identity import AdapterKey, AdapterRef, key_of
from shared.link.messages import AdapterState, Heartbeat, Tier, WorkerState

ADAPTERS = [AdapterRef("tiny", f"a{n}", "d") for n in range(7)]
WORKERS = ("w0", "w1", "w2")


class Desk:
    """Workers of two or three slots, and claims on them."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.fleet, self.rates = rng, Fleet(1e9), DemandRates()
        self.claims = SlotClaims(self.rates, Rendezvous(), Occupancy(), age_bound_s=0.0)
        self.now, self.seq, self.sid = 0.0, 0, 0
        self.open: list[int] = []
        for worker in WORKERS:
            self.beat(worker)

    def beat(self, worker: str) -> None:
        self.seq += 1
        slots = 2 + int(worker[1:]) % 2
        drawn = self.rng.sample(ADAPTERS, slots)
        states = tuple(
            AdapterState(
                a.name,
                "d",
                Tier.GPU,
                in_flight=self.rng.randrange(2),
                steady=self.rng.random() < 0.4,
            )
            for a in drawn
        )
        running = self.rng.choice((0, 1, 7))
        self.fleet.beat(
            Heartbeat(
                worker, 1, self.seq, "tiny", WorkerState.SERVING, 8, slots, running, adapters=states
            ),
            self.now,
        )
        self.fleet.attach(worker, 1)

    def step(self) -> None:
        """Anything that can happen to slots."""
        ref = self.rng.choice(ADAPTERS)
        key, pool = key_of(ref), self.fleet.pool("tiny")
        match self.rng.randrange(6):
            case 0:
                self.beat(self.rng.choice(WORKERS))
            case 1:
                self.claims.claim(RoutingRequest("tiny", ref), key, pool, self.now)
            case 2:
                self.claims.settle(RoutingRequest("tiny", ref), key)
            case 3:
                self.now += self.rng.random()
                for _ in range(self.rng.choice((1, 40))):
                    self.rates.note(key, self.now)
            case 4 if self.open:
                self.fleet.release(self.open.pop(self.rng.randrange(len(self.open))))
            case _:
                able = [
                    w
                    for w in pool.workers
                    if w.has_room and self.claims.open_to(w, key, pool, self.now)
                ]
                if able:
                    self.sid += 1
                    self.fleet.reserve(self.rng.choice(able), self.sid, ref)
                    self.open.append(self.sid)

    def open_to(self, key: AdapterKey) -> list[WorkerView]:
        pool = self.fleet.pool("tiny")
        return [
            w for w in pool.workers if w.has_room and self.claims.open_to(w, key, pool, self.now)
        ]


@given(st.randoms(use_true_random=False))
def test_slots_are_shut_to_an_adapter_exactly_if_no_other_worker_is_open_to_it(
    rng: random.Random,
) -> None:
    desk = Desk(rng)
    for _ in range(60):
        desk.step()
        for ref in ADAPTERS:
            key = key_of(ref)
            able = desk.open_to(key)
            shut = desk.claims.shut(key, desk.fleet.pool("tiny"), desk.now)
            assert not (shut and any(not w.in_flight(key) for w in able)), (
                "it would wait for nothing"
            )
            assert shut or able, "everybody would be asked in vain"


@given(st.randoms(use_true_random=False))
def test_the_pools_sums_are_those_of_its_workers(rng: random.Random) -> None:
    desk = Desk(rng)
    for _ in range(60):
        desk.step()
        pool = desk.fleet.pool("tiny")
        assert pool.room == sum(w.has_room for w in pool.workers)
        assert set(pool.open) == {w.id for w in pool.workers if w.has_room and w.open_slots > 0}


@given(st.randoms(use_true_random=False))
def test_a_slot_that_is_kept_for_a_claim_is_its_claimants_to_have_at_once(
    rng: random.Random,
) -> None:
    desk = Desk(rng)
    for _ in range(60):
        desk.step()
        pool = desk.fleet.pool("tiny")
        reserved_for = desk.claims.reserved_for(pool, desk.now)
        assert all(desk.open_to(key) for key in reserved_for)
        for ref in ADAPTERS:
            key = key_of(ref)
            claim = desk.claims.of(key)
            if (
                claim is not None
                and claim.worker in desk.open_to(key)
                and claim.worker.open_slots > 0
            ):
                assert key in reserved_for


def test_few_slots_stand_empty_while_many_wait_for_one() -> None:
    """Twice what two workers can serve as it comes. A claimed slot that waits for its claimant's
    turn would be empty for seconds.
    """
    slots = 16
    mix = Workload(Poisson(54.0), Zipf(1.0), 250, Fixed(64), Fixed(128), seed=3)
    load = takewhile(lambda request: request.at_s < 12.0, requests(mix))
    simulation = Simulation(
        World("expected-ttft", 2, 250, 1, facts=WorkerFacts("base", slots=slots)), load
    )
    gateway = simulation.dispatcher
    empty: list[int] = []

    def look() -> None:
        if gateway.queued("base") > 40:
            empty.append(gateway.fleet.pool("base").open_slots)
        simulation.agenda.after(0.05, look)

    simulation.agenda.after(6.0, look)
    run = simulation.run()
    assert len(empty) > 100, "the run was to be overloaded for seconds"
    assert sum(empty) < 0.08 * 2 * slots * len(empty)
    assert all(outcome.failed is None for outcome in run.outcomes)
