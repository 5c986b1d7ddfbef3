"""Pure. The supervisor as the dispatcher sees it: what this process tells it of the load, and what
its word means for those who wait.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from gateway.dispatch.request import InFlightRequest
from gateway.fleet.fleet import Fleet
from gateway.fleet.worker_view import WorkerView
from gateway.supervisor.autoscaling.reports import (
    MAX_ADAPTERS,
    HeldAdapter,
    ModelLoad,
    ModelStatus,
    WorkerLoad,
)


class ScalingState:
    """The supervisor's last word on each base model; empty where nobody scales."""

    def __init__(self) -> None:
        self.models: Mapping[str, ModelStatus] = {}

    def awaited(self, fleet: Fleet) -> dict[str, float]:
        """Base models without a worker for which one starts -> in how many seconds (0: unknown).
        Who waits for them waits for as long as the request itself may take.
        """
        return {
            base: status.eta_s or 0.0
            for base, status in self.models.items()
            if status.starting and not fleet.routable(base)
        }

    def start_s(self, base: str) -> float | None:
        """How long the next worker takes to serve; None if no start has been measured."""
        status = self.models.get(base)
        return (status.eta_s or status.start_s) if status is not None else None


def model_loads(
    fleet: Fleet, waiting: Iterable[InFlightRequest], bases: Iterable[str]
) -> dict[str, ModelLoad]:
    """Every base model's load: the queue, the adapters in flight or waiting, and each worker."""
    queues: dict[str, list[InFlightRequest]] = {base: [] for base in bases}
    for request in waiting:
        if request.model.base in queues:
            queues[request.model.base].append(request)
    workers: dict[str, list[WorkerView]] = {base: [] for base in queues}
    for worker in fleet:
        if worker.beat.base in workers:
            workers[worker.beat.base].append(worker)
    return {base: _model_load(queue, workers[base]) for base, queue in queues.items()}


def _model_load(queue: list[InFlightRequest], workers: list[WorkerView]) -> ModelLoad:
    adapters = {request.key[0] for request in queue if request.key is not None}
    for worker in workers:
        adapters |= {name for name, _ in worker.busy}
        adapters |= {name for name, _ in worker.others_busy}
    return ModelLoad(
        queued=len(queue),
        queued_tokens=sum(request.asked.prompt_tokens for request in queue),
        adapters=tuple(sorted(adapters)[:MAX_ADAPTERS]),
        workers={worker.id: _worker_load(worker) for worker in workers},
    )


def _worker_load(worker: WorkerView) -> WorkerLoad:
    beat = worker.beat
    in_use = worker.steady | worker.busy.keys() | worker.others_busy
    return WorkerLoad(
        serving=worker.routable,
        epoch=beat.epoch,
        seq=beat.seq,
        requests=len(worker.reserved),
        capacity=beat.capacity,
        slots=beat.slots,
        kv_usage=beat.kv_usage,
        waiting_tokens=beat.waiting_tokens,
        prefill_tokens_per_s=beat.prefill_tokens_per_s,
        load_s=beat.load_s,
        in_use=tuple(HeldAdapter(*key) for key in sorted(in_use)[:MAX_ADAPTERS]),
    )
