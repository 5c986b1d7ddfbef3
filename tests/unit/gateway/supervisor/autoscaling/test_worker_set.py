"""The workers of one machine: who starts, who leaves and in which steps, and what is told of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from gateway.supervisor.autoscaling.autoscaler import Autoscaler
from gateway.supervisor.autoscaling.reports import (
    AdapterHandover,
    HeldAdapter,
    LoadReport,
    ModelLoad,
    WorkerLoad,
)
from gateway.supervisor.autoscaling.worker_set import (
    WARM_S,
    EndWorker,
    ScaledModel,
    StartWorker,
    WorkerSet,
)
from shared.config.deployment import AutoscalingConfig

AT_ONCE = {
    "upscale_delay_s": 0.0,
    "downscale_delay_s": 0.0,
    "target_ongoing_requests": 2.0,
    "look_back_period_s": 0.5,
    "metrics_interval_s": 0.1,
}
DRAIN_S = 600.0


def model(start: int = 1, gpus: int = 0, **scaling: Any) -> ScaledModel:
    config = AutoscalingConfig(**{"min_replicas": 0, "max_replicas": 4, **AT_ONCE, **scaling})
    return ScaledModel(Autoscaler("m", config, start, 16), gpus)


class Machine:
    """A worker set, and what its gateway processes would report of it."""

    def __init__(self, models: Mapping[str, ScaledModel], devices: tuple[str, ...] = ()) -> None:
        self.force = WorkerSet(models, devices, DRAIN_S)
        self.now = 100.0
        self.serving: dict[str, WorkerLoad] = {}
        self.queued = 0
        self.process = "g0"

    def step(self, seconds: float = 1.0) -> list[Any]:
        self.now += seconds
        load = ModelLoad(queued=self.queued, workers=dict(self.serving))
        self.force.report(LoadReport(self.process, {"m": load}), self.now)
        return self.force.step(self.now)

    def serve(
        self, name: str, requests: int = 0, *adapters: str, serving: bool = True, movable: int = 0
    ) -> None:
        held = tuple(HeldAdapter(a, "1") for a in adapters)
        self.serving[name] = WorkerLoad(
            serving=serving, requests=requests, slots=4, in_use=held, movable=movable
        )

    def status(self) -> Any:
        return self.force.status(self.now).models["m"]


def test_the_first_workers_start_at_once_and_are_told_once() -> None:
    m = Machine({"m": model(2)})
    m.serve("w0", 4)
    assert m.force.step(m.now) == [StartWorker("w0", "m", ()), StartWorker("w1", "m", ())]
    assert m.step() == []
    assert (m.status().starting, m.status().serving) == (1, 1)
    assert not m.force.complete()


def test_the_time_of_a_start_is_measured_and_promised() -> None:
    m = Machine({"m": model(1)})
    m.force.step(m.now)
    assert (m.status().start_s, m.status().eta_s) == (None, None)
    m.serve("w0", 6)
    m.step(8.0)
    assert (m.status().start_s, m.force.complete()) == (8.0, False)
    assert (m.status().starting, m.status().eta_s) == (2, 8.0)
    assert (m.status().recommended, m.status().cause) == (3, "requests")
    assert m.status().needs == {"kv_usage": 0, "slots": 0}
    m.step(3.0)
    assert m.status().eta_s == 5.0


def test_a_request_for_a_model_at_zero_starts_a_worker() -> None:
    m = Machine({"m": model(0)})
    assert m.step() == [] and m.force.complete()
    m.queued = 1
    assert m.step() == [StartWorker("w0", "m", ())]


def two_workers() -> Machine:
    m = Machine({"m": model(2, min_replicas=1)})
    m.force.step(m.now)
    m.serve("w0", 2)
    m.serve("w1", 2)
    assert m.step() == [] and m.force.complete()
    return m


def test_a_worker_leaves_only_when_its_requests_have_ended_and_no_gateway_gives_it_new_ones() -> (
    None
):
    m = two_workers()
    m.serve("w0", 1)
    m.serve("w1", 1)
    assert m.step() == []
    assert (m.status().retiring, m.status().draining, m.status().wanted) == (("w1",), 1, 1)
    m.serve("w1", 1, serving=False)
    assert m.step() == []
    m.serve("w1", 0, serving=True)  # a gateway that has not heard yet
    m.serve("w0", 2)
    assert m.step() == []
    m.serve("w1", 0, serving=False)
    assert m.step() == [EndWorker("w1")]
    assert m.step() == []
    m.force.gone("w1")
    assert m.status().draining == 0


def test_a_worker_is_not_kept_by_requests_that_go_on_elsewhere_but_by_those_that_cannot() -> None:
    m = two_workers()
    m.serve("w0", 1)
    m.serve("w1", 1)
    m.step()
    (leaving,) = m.status().retiring
    m.serve(leaving, 2, serving=False, movable=1)
    assert m.step() == []
    m.serve(leaving, 2, serving=True, movable=2)  # a gateway that has not heard yet
    assert m.step() == []
    m.serve(leaving, 2, serving=False, movable=2)
    assert m.step() == [EndWorker(leaving)]


def test_without_a_worker_that_stays_no_request_can_go_on_elsewhere() -> None:
    m = Machine({"m": model(1)})
    m.step()
    m.serve("w0", 0)
    m.step()
    m.step()
    assert m.status().retiring == ("w0",)
    m.serve("w0", 1, serving=False, movable=1)  # came at the last moment
    assert m.step() == []


def test_a_request_that_never_ends_does_not_keep_a_worker_for_ever() -> None:
    m = two_workers()
    m.serve("w0", 1)
    m.serve("w1", 1)
    m.step()
    m.serve("w1", 1, serving=False)
    assert m.step(DRAIN_S - 2) == []
    assert m.step(3.0) == [EndWorker("w1")]


def test_a_request_of_any_gateway_process_keeps_it() -> None:
    m = two_workers()
    m.serve("w0", 1)
    m.serve("w1", 0)
    m.step()
    m.serve("w1", 0, serving=False)
    m.process = "g1"
    m.serve("w1", 1, serving=False)
    m.step(0.1)
    m.process = "g0"
    m.serve("w1", 0, serving=False)
    assert m.step(0.1) == []
    m.force.forget("g1")
    assert m.step(0.1) == [EndWorker("w1")]


def test_the_only_holder_of_adapters_in_use_waits_until_others_have_them() -> None:
    m = two_workers()
    m.serve("w0", 1, "a")
    m.serve("w1", 0, "b")
    m.step()
    status = m.status()
    leaving = status.handovers[0].adapter.name
    assert (status.retiring, len(status.handovers), status.draining) == ((), 1, 1)
    stayer = status.handovers[0].worker
    victim = {"w0": "w1", "w1": "w0"}[stayer]
    m.serve(stayer, 1, "a", "b")
    m.step()
    assert leaving in ("a", "b") and m.status().retiring == (victim,)


def three_workers_of_which_two_leave(*adapters: tuple[str, ...]) -> Machine:
    """The first has all the requests. `adapters`: of the two that leave."""
    m = Machine({"m": model(3, min_replicas=1)})
    m.force.step(m.now)
    for name in ("w0", "w1", "w2"):
        m.serve(name, 2)
    assert m.step() == []
    m.serve("w0", 2, "x", "y", "z")
    for name, held in zip(("w1", "w2"), adapters, strict=True):
        m.serve(name, 0, *held)
    m.step()
    assert (m.status().wanted, m.status().draining) == (1, 2)
    return m


def test_two_that_leave_at_once_do_not_count_on_each_other_for_an_adapter() -> None:
    m = three_workers_of_which_two_leave(("a",), ("a",))
    assert m.status().handovers == (AdapterHandover(HeldAdapter("a", "1"), "w0"),)
    assert m.status().retiring == ()
    idle_there = msgspec.structs.replace(m.serving["w0"], idle=(HeldAdapter("a", "1"),))
    m.serving["w0"] = idle_there
    m.step()
    assert m.status().retiring == ("w1", "w2")


def test_two_that_leave_at_once_are_not_promised_the_same_slot() -> None:
    m = three_workers_of_which_two_leave(("a",), ("b",))  # w0 has one slot left
    assert m.status().handovers == (AdapterHandover(HeldAdapter("a", "1"), "w0"),)


def test_it_retires_all_the_same_when_nobody_has_room_for_them_in_time() -> None:
    m = two_workers()
    m.serve("w0", 1, "a")
    m.serve("w1", 0, "b")
    m.step()
    m.step(WARM_S - 1)
    assert m.status().retiring == ()
    m.step(2.0)
    assert len(m.status().retiring) == 1


def test_a_worker_that_only_prepares_to_leave_stays_when_load_comes_back() -> None:
    m = two_workers()
    m.serve("w0", 1, "a")
    m.serve("w1", 0, "b")
    m.step()
    assert m.status().draining == 1
    m.serve("w0", 4, "a")
    assert m.step() == []
    assert (m.status().draining, m.status().serving) == (0, 2)


def test_a_worker_that_does_not_serve_yet_leaves_at_once() -> None:
    m = Machine({"m": model(2, min_replicas=1)})
    m.force.step(m.now)
    m.serve("w0", 1)
    assert m.step() == [EndWorker("w1")]


def test_a_worker_that_crashed_while_it_retired_is_ended() -> None:
    m = two_workers()
    m.serve("w0", 1)
    m.serve("w1", 1)
    m.step()
    del m.serving["w1"]
    m.force.restarted("w1", m.now)
    assert m.step() == [EndWorker("w1")]


def test_names_are_used_again_so_that_labels_stay_few() -> None:
    m = two_workers()
    m.force.gone("w0")
    del m.serving["w0"]
    m.serve("w1", 4)
    assert m.step() == [StartWorker("w0", "m", ())]


def test_a_worker_gets_devices_of_its_own_and_a_new_one_waits_until_they_are_free() -> None:
    m = Machine({"m": model(1, gpus=2)}, ("4", "5", "6"))
    assert m.force.step(m.now) == [StartWorker("w0", "m", ("4", "5"))]
    m.serve("w0", 9)
    assert m.step() == []
    assert m.status().reason.endswith("the GPUs of this machine allow 1")


def test_the_least_of_one_model_comes_before_the_wants_of_another() -> None:
    greedy, modest = model(4, gpus=1), model(1, gpus=1, min_replicas=1)
    force = WorkerSet({"m": greedy, "n": modest}, ("0", "1", "2"), DRAIN_S)
    started = force.step(1.0)
    assert [(s.model, s.devices) for s in started if isinstance(s, StartWorker)] == [
        ("m", ("0",)),
        ("m", ("1",)),
        ("n", ("2",)),
    ]


def test_a_request_for_a_model_at_zero_takes_the_gpu_of_one_that_nobody_asks_for() -> None:
    m = Machine({"other": model(0, 1), "m": model(1, 1, downscale_delay_s=600.0)}, ("0",))
    m.serve("w0", 1)
    assert m.step() == [StartWorker("w0", "m", ("0",))]
    waits = LoadReport("g1", {"other": ModelLoad(queued=1)})
    m.force.report(waits, m.now + 1.0)
    assert m.step() == [] and m.status().retiring == ()  # a request of its own runs
    m.serve("w0", 0)
    for _ in range(2):
        m.force.report(waits, m.now + 1.0)
        assert m.step() == []
    assert m.status().retiring == ("w0",)
    m.serve("w0", 0, serving=False)
    m.force.report(waits, m.now + 1.0)
    assert m.step() == [EndWorker("w0")]
    m.force.gone("w0")
    m.serving.clear()
    m.force.report(waits, m.now + 1.0)
    assert m.step() == [StartWorker("w0", "other", ("0",))]


def test_a_model_that_nobody_asks_for_keeps_its_gpu_while_nobody_else_is_asked_for() -> None:
    m = Machine({"other": model(1, 1), "m": model(1, 1, downscale_delay_s=600.0)}, ("0",))
    assert m.force.step(m.now) == [StartWorker("w0", "other", ("0",))]
    m.force.report(LoadReport("g1", {"other": ModelLoad(queued=0)}), m.now + 1.0)
    assert m.step() == []
