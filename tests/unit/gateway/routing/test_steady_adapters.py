"""Adapters in steady use keep a slot: gateway and workers together in virtual time."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from bench.load.workload import PlannedRequest
from bench.routing.sim.worker import WorkerFacts
from bench.routing.sim.world import SimOutcome, Simulation, World, adapter_name
from shared.adapters.identity import AdapterRef
from shared.link.messages import STEADY_PER_S, Tier
from worker.adapters.residency import SLOT_WAIT_S

WARM_UP_S, END_S, EVERY_S = 12.0, 25.0, 0.15


class Watch:
    """For each arrival after WARM_UP_S: which of the first `steady` adapters are in no slot
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


@given(colds=COLDS, slots=st.integers(2, 6))
def test_the_last_copy_of_an_adapter_in_steady_use_is_never_evicted_for_colder_ones(
    colds: list[tuple[float, int]], slots: int
) -> None:
    steady = 1
    watch, outcomes = played(steady, colds, slots)
    assert not watch.gone
    own = [o for o in outcomes if o.request.at_s >= WARM_UP_S and (o.request.adapter or 0) < steady]
    assert all(outcome.tier is Tier.GPU for outcome in own)
    turns = -(-len(colds) // (2 * slots - steady))
    assert max(o.ttft_s or 0.0 for o in outcomes) <= SLOT_WAIT_S + 4.0 * turns, (
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
    assert len(waits) == len(outcomes) and max(waits) <= SLOT_WAIT_S + 4.0 * turns


@given(colds=COLDS, slots=st.integers(1, 2))
def test_cold_adapters_are_served_though_every_slot_is_in_steady_use(
    colds: list[tuple[float, int]], slots: int
) -> None:
    """As many adapters in steady use as the two workers have slots: those who come once take turns
    with the coldest of them.
    """
    _, outcomes = played(2 * slots, colds[:6], slots)
    waits = [outcome.sent_s - outcome.request.at_s for outcome in outcomes]
    assert max(waits) <= SLOT_WAIT_S + 4.0 * len(colds[:6])


def test_adapters_that_are_asked_for_seldom_are_not_in_steady_use() -> None:
    """The control. With a longer gap than steady use allows, the same burst takes the slot."""
    watch, _ = played(
        1, [(WARM_UP_S + 0.01 * n, 50) for n in range(20)], 2, every_s=2.0 / STEADY_PER_S
    )
    assert watch.gone
