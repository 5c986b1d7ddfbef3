"""What the supervisor's messages mean for waiting requests, and what the supervisor is told."""

from __future__ import annotations

import msgspec

from gateway.dispatch.scaling_status import ScalingState, model_loads
from gateway.fleet.fleet import Fleet
from gateway.supervisor.autoscaling.reports import HeldAdapter, ModelStatus
from shared.adapters.identity import AdapterRef
from shared.link.messages import AdapterState, Heartbeat, Tier, WorkerState


def fleet(*adapters: AdapterState, state: WorkerState = WorkerState.SERVING) -> Fleet:
    found = Fleet(3.0)
    found.heartbeat(
        Heartbeat("w0", 1, 1, "m", state, capacity=8, slots=4, adapters=adapters, running=2), 0.0
    )
    found.attach("w0", 1)
    return found


def test_a_model_is_awaited_while_its_first_worker_starts_and_only_then() -> None:
    state = ScalingState()
    assert state.awaited(Fleet(3.0)) == {} and state.start_s("m") is None
    state.models = {"m": ModelStatus(wanted=1, starting=1, start_s=9.0, eta_s=4.0)}
    assert state.awaited(Fleet(3.0)) == {"m": 4.0} and state.start_s("m") == 4.0
    assert state.awaited(fleet()) == {}
    state.models = {"m": ModelStatus(wanted=0, start_s=9.0)}
    assert state.awaited(Fleet(3.0)) == {} and state.start_s("m") == 9.0


def test_a_model_at_zero_is_awaited_while_other_models_have_all_gpus() -> None:
    state = ScalingState()
    waits = ModelStatus(wanted=1, max_replicas=2, scales=True, without_gpus=1)
    state.models = {"m": waits}
    assert state.awaited(Fleet(3.0)) == {"m": None} and state.awaited(fleet()) == {}
    state.models = {"m": msgspec.structs.replace(waits, without_gpus=0)}
    assert state.awaited(Fleet(3.0)) == {"m": 0.0}  # a GPU is free, and the start has not begun
    state.models = {"m": msgspec.structs.replace(waits, min_replicas=1)}
    assert state.awaited(Fleet(3.0)) == {}  # its worker was lost, and may not come back


def test_where_something_else_starts_workers_a_model_without_a_least_number_is_awaited() -> None:
    state = ScalingState()
    state.elsewhere = frozenset({"m"})
    assert state.from_zero == {"m"}
    assert state.awaited(Fleet(3.0)) == {"m": 0.0} and state.awaited(fleet()) == {}


def test_a_worker_that_anybody_starts_is_awaited_once_it_is_heard_of() -> None:
    state = ScalingState()
    assert state.awaited(fleet(state=WorkerState.JOINING)) == {"m": 0.0}
    assert state.awaited(fleet(state=WorkerState.DRAINING)) == {}
    state.models = {"m": ModelStatus(wanted=1, starting=1, start_s=9.0, eta_s=4.0)}
    assert state.awaited(fleet(state=WorkerState.JOINING)) == {"m": 4.0}


def test_the_report_counts_this_process_requests_and_names_every_adapter_in_use() -> None:
    workers = fleet(
        AdapterState("theirs", "1", Tier.GPU, in_flight=1),
        AdapterState("steady", "1", Tier.GPU, steady=True),
        AdapterState("idle", "1", Tier.GPU),
    )
    worker = workers.get("w0")
    assert worker is not None
    workers.reserve(worker, 1, AdapterRef("m", "ours", "1"))
    load = model_loads(workers, [], ["m", "asleep"])
    assert load["asleep"].workers == {} and load["m"].queued == 0
    assert load["m"].adapters == ("ours", "theirs")
    told = load["m"].workers["w0"]
    assert (told.serving, told.requests, told.capacity, told.slots) == (True, 1, 8, 4)
    assert told.in_use == tuple(HeldAdapter(n, "1") for n in ("ours", "theirs", "steady"))
    assert told.idle == ()
    told = model_loads(workers, [], ["m"], shrinking={"m"})["m"].workers["w0"]
    assert told.idle == (HeldAdapter("idle", "1"),)
