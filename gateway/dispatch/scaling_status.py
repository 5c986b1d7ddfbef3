"""Pure. The supervisor as the dispatcher sees it: the load that this process reports to it, and
what its answers mean for waiting requests.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType

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
from shared.link.messages import WorkerState

NONE_MOVABLE: Mapping[str, int] = MappingProxyType({})


class ScalingState:
    """The supervisor's last report on each base model. Empty if there is no supervisor."""

    def __init__(self) -> None:
        self.models: Mapping[str, ModelStatus] = {}
        self.elsewhere: frozenset[str] = frozenset()
        """Base models that may have no worker, where something else starts workers (Kubernetes)."""

    @property
    def retiring(self) -> frozenset[str]:
        """Workers that get no new requests because they are about to end."""
        return frozenset(name for status in self.models.values() for name in status.retiring)

    @property
    def shrinking(self) -> set[str]:
        """Base models of which a worker leaves: what lies idle on the others is of interest."""
        return {base for base, status in self.models.items() if status.draining}

    @property
    def from_zero(self) -> set[str]:
        """Base models that may have no worker, because a request starts one."""
        return {
            *self.elsewhere,
            *(b for b, status in self.models.items() if status.scales and not status.min_replicas),
        }

    def awaited(self, fleet: Fleet) -> dict[str, float | None]:
        """Base models without a worker for which one is starting, or is to start -> in how many
        seconds it serves (0: unknown; None: once another model's worker leaves a GPU). Requests for
        them may wait for as long as the request itself may take. Who starts it does not matter: its
        heartbeats tell.
        """
        from_zero = {b: s for b, s in self.models.items() if b in self.from_zero and s.wanted}
        joining = (w.heartbeat.base for w in fleet if w.heartbeat.state is WorkerState.JOINING)
        awaited: dict[str, float | None] = dict.fromkeys((*self.elsewhere, *joining), 0.0)
        awaited |= {b: None if s.without_gpus else 0.0 for b, s in from_zero.items()}
        awaited |= {b: s.eta_s or 0.0 for b, s in self.models.items() if s.starting}
        return {base: eta_s for base, eta_s in awaited.items() if not fleet.routable(base)}

    def start_s(self, base: str) -> float | None:
        """How long the next worker takes to serve. None: no start has been measured."""
        status = self.models.get(base)
        return (status.eta_s or status.start_s) if status is not None else None


def movable_by_worker(
    requests: Iterable[InFlightRequest], workers: Collection[str]
) -> Counter[str]:
    """Worker -> how many of its requests another worker could continue."""
    return Counter(
        request.choice.worker.id
        for request in requests
        if request.choice is not None
        and request.choice.worker.id in workers
        and not request.journal.obstacle
    )


def model_loads(
    fleet: Fleet,
    waiting: Iterable[InFlightRequest],
    bases: Iterable[str],
    movable: Mapping[str, int] = NONE_MOVABLE,
    shrinking: Collection[str] = (),
) -> dict[str, ModelLoad]:
    """The load of every base model: its queue, the adapters in flight or waiting, and each worker.
    Idle adapters are told of base models in `shrinking` alone: they may be thousands.
    """
    queues: dict[str, list[InFlightRequest]] = {base: [] for base in bases}
    for request in waiting:
        if request.model.base in queues:
            queues[request.model.base].append(request)
    workers: dict[str, list[WorkerView]] = {base: [] for base in queues}
    for worker in fleet:
        if worker.heartbeat.base in workers:
            workers[worker.heartbeat.base].append(worker)
    return {
        base: _model_load(queue, workers[base], movable, base in shrinking)
        for base, queue in queues.items()
    }


def _model_load(
    queue: list[InFlightRequest],
    workers: list[WorkerView],
    movable: Mapping[str, int],
    with_idle: bool,
) -> ModelLoad:
    adapters = {request.key[0] for request in queue if request.key is not None}
    for worker in workers:
        adapters |= {name for name, _ in worker.busy}
        adapters |= {name for name, _ in worker.others_busy}
    return ModelLoad(
        queued=len(queue),
        queued_tokens=sum(request.client_request.prompt_tokens for request in queue),
        adapters=tuple(sorted(adapters)[:MAX_ADAPTERS]),
        workers={worker.id: _worker_load(worker, movable, with_idle) for worker in workers},
    )


def _worker_load(worker: WorkerView, movable: Mapping[str, int], with_idle: bool) -> WorkerLoad:
    heartbeat = worker.heartbeat
    in_use = worker.steady | worker.busy.keys() | worker.others_busy
    busiest = sorted(in_use, key=lambda key: (-worker.in_flight(key), key))
    idle = sorted(worker.loaded - in_use) if with_idle else ()
    return WorkerLoad(
        serving=worker.routable,
        epoch=heartbeat.epoch,
        seq=heartbeat.seq,
        requests=len(worker.reserved),
        capacity=heartbeat.capacity,
        slots=heartbeat.slots,
        kv_usage=heartbeat.kv_usage,
        prefill_tokens_per_s=heartbeat.prefill_tokens_per_s,
        load_s=heartbeat.load_s,
        in_use=tuple(HeldAdapter(*key) for key in busiest[:MAX_ADAPTERS]),
        movable=min(len(worker.reserved), movable.get(worker.id, 0)),
        idle=tuple(HeldAdapter(*key) for key in idle[:MAX_ADAPTERS]),
    )
