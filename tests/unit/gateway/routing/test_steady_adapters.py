"""Adapters in steady use keep a slot: the policy by itself, and gateway and workers together in the
simulator's virtual time.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.load.workload import PlannedRequest
from bench.routing.sim.worker import WorkerFacts
from bench.routing.sim.world import SimOutcome, Simulation, World, adapter_name
from gateway.fleet.fleet import Fleet
from gateway.routing.expected_ttft import ExpectedTTFT
from gateway.routing.policy import Choice, Decision, Defer, RoutingRequest
from gateway.routing.slot_claims import AGE_BOUND_S, HELD_AGE_S
from shared.adapters.identity import AdapterRef
from shared.link.messages import (
    STEADY_PER_S,
    STEADY_SHARE,
    AdapterState,
    Heartbeat,
    Tier,
    WorkerState,
)


def adapter(name: str) -> AdapterRef:
    return AdapterRef("tiny", name, "d")


WARM, COLD = adapter("warm"), adapter("cold")


def held(name: str, *, steady: bool = False, in_flight: int = 0) -> AdapterState:
    return AdapterState(name, "d", Tier.GPU, in_flight=in_flight, steady=steady)


class Gateway:
    """A fleet and the policy; `send` reserves what it chooses, under stream ids 1, 2, ...

    Beside the workers of a test there is a full one: a worker that is alone keeps a line of its
    own.
    """

    def __init__(self) -> None:
        self.fleet, self.policy, self.now, self.sid = Fleet(1e9), ExpectedTTFT(), 0.0, 0
        self.worker("crowded", slots=1, running=256)

    def worker(
        self, name: str, *adapters: AdapterState, slots: int, seq: int = 1, running: int = 0
    ) -> None:
        beat = Heartbeat(
            name, 1, seq, "tiny", WorkerState.SERVING, 256, slots, running, adapters=adapters
        )
        self.fleet.beat(beat, self.now)
        self.fleet.attach(name, 1)

    def choose(self, request: RoutingRequest) -> Decision:
        return self.policy.choose(request, self.fleet, self.now, random.Random(1))

    def request(self, ref: AdapterRef) -> RoutingRequest:
        request = RoutingRequest("tiny", ref, 1000, 10, arrived=self.now)
        self.policy.arrived(request, self.now)
        return request

    def send(self, ref: AdapterRef) -> str | None:
        """The worker it went to."""
        request = self.request(ref)
        decision = self.choose(request)
        if isinstance(decision, Defer):
            return None
        self.sid += 1
        self.fleet.reserve(decision.worker, self.sid, ref)
        self.policy.sent(request, decision, self.now)
        return decision.worker.id


@pytest.fixture
def gateway() -> Gateway:
    return Gateway()


def test_the_idle_moment_of_an_adapter_in_steady_use_is_nobodys_slot(gateway: Gateway) -> None:
    gateway.worker("w0", held("warm", steady=True), held("stale"), slots=2)
    assert gateway.send(adapter("first")) == "w0", "the stale one makes room"
    assert gateway.send(COLD) is None
    assert gateway.send(WARM) == "w0"
    gateway.fleet.release(2)
    assert gateway.send(COLD) is None, "idle again"
    gateway.fleet.release(1)
    assert gateway.send(COLD) == "w0"


def test_an_adapter_that_is_idle_and_not_in_steady_use_makes_room(gateway: Gateway) -> None:
    gateway.worker("w0", held("stale"), slots=1)
    assert gateway.send(COLD) == "w0"


def test_an_adapter_in_steady_use_makes_room_for_a_hotter_one_alone(gateway: Gateway) -> None:
    gateway.worker("w0", held("warm", steady=True), slots=1)
    for _ in range(30):
        gateway.request(WARM)
    for _ in range(30):
        gateway.request(COLD)
    assert gateway.send(COLD) == "w0", "31 requests are more than 30"


def test_equally_hot_adapters_do_not_take_each_others_slots(gateway: Gateway) -> None:
    gateway.worker("w0", held("warm", steady=True), slots=1)
    for _ in range(30):
        gateway.request(WARM)
    for _ in range(29):
        gateway.request(COLD)
    assert gateway.send(COLD) is None


def test_of_several_copies_the_one_that_every_gateway_thinks_of_stays(gateway: Gateway) -> None:
    other = Gateway()
    for one, names in ((gateway, ("w0", "w1", "w2")), (other, ("w2", "w1", "w0"))):
        for name in names:
            one.worker(name, held("warm", steady=True), slots=1)
    taken = {gateway.send(adapter(f"cold{n}")) for n in range(3)}
    assert None in taken and len(taken) == 3
    assert {other.send(adapter(f"other{n}")) for n in range(3)} == taken


def test_what_another_gateway_has_in_flight_counts_once(gateway: Gateway) -> None:
    gateway.worker("w0", held("warm", steady=True, in_flight=1), slots=2, running=1)
    assert gateway.send(COLD) == "w0"


def test_a_claim_passes_by_an_adapter_in_steady_use_though_it_has_fewer_requests_in_flight(
    gateway: Gateway,
) -> None:
    gateway.worker("w0", held("warm", steady=True), held("b1"), held("b2"), held("b3"), slots=4)
    for name in ("warm", *["b1", "b2", "b3"] * 3, "b2", "b3"):
        gateway.send(adapter(name))
    old = gateway.request(COLD)
    gateway.now = AGE_BOUND_S
    assert isinstance(gateway.choose(old), Defer)
    assert gateway.send(WARM) == "w0" and gateway.send(adapter("b1")) is None


def test_of_many_in_steady_use_a_claim_takes_the_one_longest_without_a_new_request(
    gateway: Gateway,
) -> None:
    gateway.worker(
        "w0", held("warm", steady=True), held("hot", steady=True), held("b1"), held("b2"), slots=4
    )
    for name in ("warm", *["hot", "b1", "b2"] * 3):
        gateway.send(adapter(name))
        gateway.now += 0.01
    old = gateway.request(COLD)
    gateway.now += AGE_BOUND_S
    assert isinstance(gateway.choose(old), Defer)
    assert gateway.send(WARM) is None


def test_it_passes_by_even_where_the_others_slots_are_promised_already(gateway: Gateway) -> None:
    """One claim on each worker, as they have no more slots: the second claimant waits for its turn
    behind the first.
    """
    gateway.worker("w0", held("warm", steady=True), slots=1)
    gateway.worker("w1", held("b1"), held("b2"), held("b3"), slots=3)
    for name in ("warm", "b1", "b2", "b3"):
        gateway.send(adapter(name))
    first, second = gateway.request(adapter("c1")), gateway.request(adapter("c2"))
    gateway.now = AGE_BOUND_S
    assert isinstance(gateway.choose(first), Defer) and isinstance(gateway.choose(second), Defer)
    assert gateway.send(WARM) == "w0"


def test_where_most_slots_are_in_steady_use_a_colder_adapter_does_not_wait_for_an_idle_one(
    gateway: Gateway,
) -> None:
    """In a closed loop everybody may wait for others meanwhile, and then nobody would be served at
    all.
    """
    gateway.worker("w0", *(held(f"a{n}", steady=True) for n in range(3)), slots=3)
    for n in range(3):
        for _ in range(40 - 10 * n):
            gateway.request(adapter(f"a{n}"))
    assert isinstance(gateway.choose(gateway.request(COLD)), Choice)


def test_a_slot_is_claimed_on_the_least_loaded_worker_but_not_from_an_adapter_in_steady_use(
    gateway: Gateway,
) -> None:
    gateway.worker("full", held("pirate"), slots=1, running=256)
    gateway.worker("calm", held("warm", steady=True), slots=1)
    gateway.worker("busy", held("other"), held("b2"), held("b3"), slots=3)
    for name in ("warm", "other", "b2", "b2", "b3", "b3"):
        gateway.send(adapter(name))
    request = gateway.request(adapter("pirate"))
    gateway.now = HELD_AGE_S
    assert isinstance(gateway.choose(request), Defer)
    assert gateway.send(WARM) == "calm" and gateway.send(adapter("other")) is None


def test_explain_says_so(gateway: Gateway) -> None:
    gateway.worker("w0", held("warm", steady=True), slots=1)
    found = {
        c.worker.id: (c.eligible, c.note)
        for c in gateway.policy.explain(gateway.request(COLD), gateway.fleet, 0.0)
    }
    assert found == {"w0": (False, "no slot"), "crowded": (False, "no room")}


# ---- gateway and workers together ----------------------------------------------------------------

WARM_UP_S, END_S, EVERY_S = 12.0, 25.0, 0.15


class Watch:
    """Of each arrival after WARM_UP_S: which of the first `steady` adapters are in no slot
    anywhere.
    """

    def __init__(self, steady: int) -> None:
        self.simulation: Simulation | None = None
        self._steady = steady
        self.gone: set[str] = set()

    def __call__(self, now: float, outcomes: Sequence[SimOutcome]) -> bool:
        assert self.simulation is not None
        if now >= WARM_UP_S:
            slots = [worker.residency.slots for worker in self.simulation.workers]
            names = {adapter_name(n) for n in range(self._steady)}
            self.gone |= names - {
                name
                for name in names
                if any(AdapterRef("base", name, f"{int(name[1:]):016x}") in s for s in slots)
            }
        return False


def played(
    steady: int,
    colds: Sequence[tuple[float, int]],
    slots: int,
    every_s: float = EVERY_S,
    workers: int = 2,
) -> tuple[Watch, list[SimOutcome]]:
    """The first `steady` adapters are asked for all the time, each further one once: at (second,
    output tokens).
    """
    times = [
        (n * every_s + 0.01 * a, a, 5) for a in range(steady) for n in range(int(END_S / every_s))
    ]
    times += [(at_s, steady + n, tokens) for n, (at_s, tokens) in enumerate(colds)]
    requests = [
        PlannedRequest(n, at_s, index, None, 128, tokens)
        for n, (at_s, index, tokens) in enumerate(sorted(times))
    ]
    world = World(
        "expected-ttft",
        workers,
        steady + len(colds),
        1,
        facts=WorkerFacts("base", slots, disk_warm=False),
    )
    watch = Watch(steady)
    watch.simulation = Simulation(world, requests, watch)
    outcomes = watch.simulation.run().outcomes
    assert all(outcome.ends == 1 and outcome.failed is None for outcome in outcomes)
    return watch, outcomes


COLDS = st.lists(
    st.tuples(st.floats(WARM_UP_S, WARM_UP_S + 2.0), st.integers(5, 150)), min_size=1, max_size=64
)


@given(colds=COLDS, slots=st.integers(2, 6), data=st.data())
def test_the_last_copy_of_an_adapter_in_steady_use_is_never_evicted_for_colder_ones(
    colds: list[tuple[float, int]], slots: int, data: st.DataObject
) -> None:
    steady = data.draw(st.integers(1, int(STEADY_SHARE * 2 * slots)))
    watch, outcomes = played(steady, colds, slots)
    assert not watch.gone
    queued_s = {
        outcome.request: outcome.sent_s - outcome.request.at_s
        for outcome in outcomes
        if outcome.request.at_s >= WARM_UP_S
    }
    assert max(
        s
        for request, s in queued_s.items()
        if request.adapter is not None and request.adapter < steady
    ) == pytest.approx(0)
    turns = -(-len(colds) // (2 * slots - steady))
    assert max(queued_s.values()) <= AGE_BOUND_S + 4.0 * turns, (
        "150 tokens and a load take at most 4 s"
    )


@given(colds=COLDS, slots=st.integers(4, 6))
def test_nor_does_a_worker_that_is_alone_evict_it_for_those_in_its_own_line(
    colds: list[tuple[float, int]], slots: int
) -> None:
    watch, outcomes = played(1, colds, slots, workers=1)
    assert not watch.gone
    turns = -(-len(colds) // (slots - 1))
    waits = [outcome.ttft_s for outcome in outcomes if outcome.ttft_s is not None]
    assert len(waits) == len(outcomes) and max(waits) <= AGE_BOUND_S + 4.0 * turns


@given(colds=COLDS, slots=st.integers(1, 2))
def test_cold_adapters_are_served_though_every_slot_is_in_steady_use(
    colds: list[tuple[float, int]], slots: int
) -> None:
    """As many adapters in steady use as the two workers have slots: those who come once take turns
    with the coldest of them.
    """
    _, outcomes = played(2 * slots, colds[:6], slots)
    waits = [outcome.sent_s - outcome.request.at_s for outcome in outcomes]
    assert max(waits) <= AGE_BOUND_S + 4.0 * len(colds[:6])


def test_adapters_that_are_asked_for_seldom_are_not_in_steady_use() -> None:
    """The control: with a longer gap than steady use has, the same burst does take the slot."""
    watch, _ = played(
        1, [(WARM_UP_S + 0.01 * n, 50) for n in range(20)], 2, every_s=2.0 / STEADY_PER_S
    )
    assert watch.gone
