"""Which worker leaves, where its adapters go, and who gets its GPUs."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.supervisor.autoscaling.gpu_allocation import GpuDemand, GpuDevices, share
from gateway.supervisor.autoscaling.reports import AdapterHandover, HeldAdapter, WorkerLoad
from gateway.supervisor.autoscaling.scale_down import (
    ScaleDownCandidate,
    adapters_to_move,
    choose_victims,
    handovers,
)


def load(*adapters: str, requests: int = 0, slots: int = 4, idle: str = "") -> WorkerLoad:
    """`idle`: one letter for each."""
    in_use, other = (tuple(HeldAdapter(a, "1") for a in names) for names in (adapters, idle))
    return WorkerLoad(serving=True, requests=requests, slots=slots, in_use=in_use, idle=other)


def test_a_worker_that_does_not_serve_yet_leaves_first() -> None:
    assert choose_victims(
        [ScaleDownCandidate("w0", 0, load()), ScaleDownCandidate("w1", 1)], 1
    ) == ["w1"]


def test_of_equals_the_youngest_leaves() -> None:
    assert choose_victims([ScaleDownCandidate(f"w{n}", n, load()) for n in range(3)], 2) == [
        "w2",
        "w1",
    ]


def test_the_only_holder_of_an_adapter_in_use_stays_however_young_it_is() -> None:
    present = [
        ScaleDownCandidate("w0", 0, load("a", "b", requests=9)),
        ScaleDownCandidate("w1", 1, load("a", "b", requests=9)),
        ScaleDownCandidate("w2", 2, load("c")),
    ]
    assert choose_victims(present, 1) == ["w1"]


def test_with_the_first_gone_the_other_holder_is_the_only_one() -> None:
    present = [
        ScaleDownCandidate("w0", 0, load("a")),
        ScaleDownCandidate("w1", 1, load("a")),
        ScaleDownCandidate("w2", 2, load("b", "c", requests=5)),
    ]
    assert choose_victims(present, 2) == ["w1", "w0"]


def test_fewer_streams_leave_before_more() -> None:
    present = [
        ScaleDownCandidate("w0", 0, load(requests=1)),
        ScaleDownCandidate("w1", 1, load(requests=2)),
    ]
    assert choose_victims(present, 1) == ["w0"]


def test_adapters_that_nobody_else_has_go_to_the_emptiest_workers() -> None:
    stayers = {"w1": load("a", slots=2), "w2": load("d", "e", slots=4)}
    moving = adapters_to_move([load("a", "b", "c")], stayers)
    assert [adapter.name for adapter in moving] == ["b", "c"]
    found = handovers(moving, stayers)
    assert found == [AdapterHandover(moving[0], "w2"), AdapterHandover(moving[1], "w1")]


def test_where_slots_are_short_the_busiest_adapters_get_them() -> None:
    stayers = {"w1": load("a", slots=2)}
    moving = adapters_to_move([load("c", "b"), load("d", "e")], stayers)
    assert [adapter.name for adapter in moving] == ["c", "d", "b", "e"]
    assert handovers(moving, stayers) == [AdapterHandover(HeldAdapter("c", "1"), "w1")]
    assert handovers(moving, {"w1": load("a", "b", "c", slots=2)}) == []


def test_another_order_of_the_adapters_gives_none_of_them_another_place() -> None:
    stayers = {"w1": load(slots=1), "w2": load(slots=1)}
    one_way, other_way = (adapters_to_move([load(*names)], stayers) for names in ("bc", "cb"))
    assert handovers(one_way, stayers) == handovers(other_way, stayers)


def test_an_adapter_that_lies_idle_on_a_worker_that_stays_is_there_already() -> None:
    assert adapters_to_move([load("a")], {"w1": load(idle="a")}) == []
    present = [
        ScaleDownCandidate("w0", 0, load("a")),
        ScaleDownCandidate("w1", 1, load("b")),
        ScaleDownCandidate("w2", 2, load("c", "d", idle="a")),
    ]
    assert choose_victims(present, 1) == ["w0"]


def test_every_model_gets_its_least_before_any_gets_more() -> None:
    claims = [GpuDemand("a", 1, 1, 4), GpuDemand("b", 1, 2, 2), GpuDemand("c", 2, 1, 1)]
    assert share(claims, 5) == {"a": 1, "b": 2, "c": 1}
    assert share(claims, 6) == {"a": 2, "b": 2, "c": 1}


def test_what_is_left_goes_to_whom_lacks_most() -> None:
    assert share([GpuDemand("a", 1, 0, 6), GpuDemand("b", 1, 0, 2)], 4) == {"a": 3, "b": 1}


def test_of_equals_the_one_that_has_the_worker_keeps_it() -> None:
    assert share([GpuDemand("a", 1, 0, 1, 0), GpuDemand("b", 1, 0, 1, 1)], 1) == {"a": 0, "b": 1}


def test_of_equals_one_that_nobody_asks_for_keeps_no_worker_from_the_other() -> None:
    idle = GpuDemand("b", 1, 0, 1, 1, idle=True)
    assert share([GpuDemand("a", 1, 0, 1, 0), idle], 1) == {"a": 1, "b": 0}
    assert share([GpuDemand("a", 1, 0, 1, 0, idle=True), idle], 1) == {"a": 0, "b": 1}
    assert share([GpuDemand("a", 1, 0, 1, 0), idle], 2) == {"a": 1, "b": 1}
    least = GpuDemand("b", 1, 1, 1, 1, idle=True)
    assert share([GpuDemand("a", 1, 0, 1, 0), least], 1) == {"a": 0, "b": 1}


def test_workers_without_gpus_are_not_limited_by_them() -> None:
    assert share([GpuDemand("a", 0, 1, 7), GpuDemand("b", 1, 0, 1)], 0) == {"a": 7, "b": 0}


claims = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 6), st.integers(0, 6)),
    max_size=4,
)


@given(claims, st.integers(0, 12))
def test_no_gpu_is_given_twice_nobody_gets_more_than_wanted_and_none_lies_idle_that_fits(
    found: list[tuple[int, int, int, int]], total: int
) -> None:
    asked = [GpuDemand(f"m{n}", *claim) for n, claim in enumerate(found)]
    granted = share(asked, total)
    used = sum(granted[c.model] * c.gpus for c in asked)
    assert used <= total
    for c in asked:
        assert granted[c.model] <= c.wanted
        assert granted[c.model] == c.wanted or c.gpus > total - used


def test_a_device_has_one_owner_until_the_owner_has_gone() -> None:
    devices = GpuDevices(["2", "5", "GPU-7"])
    assert devices.take("w0", 2) == ("2", "5")
    assert devices.take("w1", 2) is None
    assert devices.take("w1", 1) == ("GPU-7",)
    devices.give_back("w0")
    devices.give_back("w0")
    assert devices.take("w2", 2) == ("2", "5")
    assert len(devices) == 3
