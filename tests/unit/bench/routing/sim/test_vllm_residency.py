"""Adapters on a worker as vLLM itself keeps them."""

from __future__ import annotations

from pathlib import Path

from bench.routing.sim.vllm_residency import VllmResidency
from shared.adapters.identity import AdapterRef
from shared.link.messages import Tier
from worker.engine.base import Loaded, Swap

A, B, C = (AdapterRef("tiny", name, "d") for name in "abc")


def loaded(adapter: AdapterRef) -> Loaded:
    return Loaded(adapter, 1, Path("/nowhere"), 8, 1000)


def resident(residency: VllmResidency, request: int, adapter: AdapterRef) -> None:
    residency.want(request, adapter, 0.0)
    residency.fetched(loaded(adapter), Tier.DISK, 0.0)
    residency.swapped({}, 0.0)


def test_the_least_recently_used_makes_room_however_often_it_was_asked_for() -> None:
    residency = VllmResidency(2, 2)
    for request in range(9):
        if request == 0:
            resident(residency, request, A)
        else:
            residency.want(request, A, 0.0)
        residency.finish(request, 0.0)
    resident(residency, 10, B)
    residency.finish(10, 0.0)
    residency.want(11, C, 0.0)
    swaps = [i for i in residency.fetched(loaded(C), Tier.DISK, 0.0) if isinstance(i, Swap)]
    assert [(s.enter, s.unload) for s in swaps] == [((loaded(C),), (loaded(A),))]


def test_an_adapter_that_always_runs_keeps_its_slot_for_ever() -> None:
    residency = VllmResidency(1, 1)
    resident(residency, 1, A)
    residency.want(2, C, 0.0)
    residency.fetched(loaded(C), Tier.DISK, 0.0)
    for n in range(100):
        residency.want(100 + n, A, float(n))
        assert residency.finish(99 + n if n else 1, float(n)) == []
        assert residency.tick(float(n)) == []
    assert residency.waiting == 1
