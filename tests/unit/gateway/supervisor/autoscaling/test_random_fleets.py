"""Random loads, starts, crashes and ends on a machine that two models share. Whatever comes: no GPU
has two owners, no request is cut, and in the end every model has its least.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from gateway.supervisor.autoscaling.autoscaler import Autoscaler
from gateway.supervisor.autoscaling.reports import HeldAdapter, LoadReport, ModelLoad, WorkerLoad
from gateway.supervisor.autoscaling.worker_set import (
    EndWorker,
    ScaledModel,
    StartWorker,
    WorkerSet,
)
from shared.config.deployment import AutoscalingConfig

GPUS = tuple(f"gpu{n}" for n in range(8))
STEP_S = 0.5
DRAIN_S = 600.0
CAPACITY = 4


class Worker:
    """A process as the machine sees it. `streams` are the adapters of requests that run there."""

    def __init__(self, model: str, gpus: tuple[str, ...], serves_at: float) -> None:
        self.model, self.gpus, self.serves_at = model, gpus, serves_at
        self.streams: list[str] = []
        self.slots: set[str] = set()
        self.ends_at: float | None = None


class RandomFleet:
    """Gateways give requests to workers that serve and that they do not know to retire."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.models = {f"m{n}": self._model() for n in range(2)}
        self.set = WorkerSet(self.models, GPUS, DRAIN_S, warm_s=3.0)
        self.workers: dict[str, Worker] = {}
        self.queues: dict[str, list[str]] = {name: [] for name in self.models}
        self.retiring: set[str] = set()
        self.movable = self.rng.random() < 0.5
        self.now = 0.0
        self.ended = 0

    def _model(self) -> ScaledModel:
        rng = self.rng
        config = AutoscalingConfig(
            min_replicas=rng.choice((0, 1, 2)),
            max_replicas=rng.choice((2, 4, 8)),
            target_ongoing_requests=rng.choice((1.0, 2.0, 3.5)),
            upscale_delay_s=rng.choice((0.0, 2.0)),
            downscale_delay_s=rng.choice((0.0, 4.0)),
            look_back_period_s=1.0,
            metrics_interval_s=0.5,
        )
        return ScaledModel(
            Autoscaler("m", config, config.min_replicas, CAPACITY), rng.choice((1, 2))
        )

    def step(self, arrivals: int, crash: bool) -> None:
        self.now += STEP_S
        for name, queue in self.queues.items():
            queue += [f"a{self.rng.randint(0, 5)}" for _ in range(self.rng.randint(0, arrivals))]
            self._place(name)
            for worker in self._of(name):
                worker.streams = [s for s in worker.streams if self.rng.random() < 0.8]
        if crash and self.workers:
            self._crash(self.rng.choice(sorted(self.workers)))
        self.set.report(
            LoadReport("g0", {name: self._load(name) for name in self.models}), self.now
        )
        for action in self.set.step(self.now):
            match action:
                case StartWorker(name, model, devices):
                    self._start(name, model, devices)
                case EndWorker(name):
                    self._end(name)
        for name, worker in list(self.workers.items()):
            if worker.ends_at is not None and worker.ends_at <= self.now:
                del self.workers[name]
                self.set.gone(name)
        status = self.set.status(self.now).models
        self.retiring = {name for told in status.values() for name in told.retiring}

    def _of(self, model: str) -> list[Worker]:
        return [w for w in self.workers.values() if w.model == model]

    def _open(self, model: str) -> list[Worker]:
        return [
            w
            for name, w in self.workers.items()
            if w.model == model
            and w.serves_at <= self.now
            and name not in self.retiring
            and w.ends_at is None
        ]

    def _place(self, model: str) -> None:
        queue = self.queues[model]
        while queue:
            free = [w for w in self._open(model) if len(w.streams) < CAPACITY]
            if not free:
                return
            worker = self.rng.choice(free)
            worker.streams.append(queue.pop(0))
            worker.slots.add(worker.streams[-1])

    def _load(self, model: str) -> ModelLoad:
        seen = {
            name: WorkerLoad(
                serving=name not in self.retiring,
                requests=len(w.streams),
                slots=4,
                in_use=tuple(HeldAdapter(a, "1") for a in sorted(set(w.streams))),
                movable=len(w.streams) if self.movable and name in self.retiring else 0,
            )
            for name, w in self.workers.items()
            if w.model == model and w.serves_at <= self.now
        }
        return ModelLoad(queued=len(self.queues[model]), workers=seen)

    def _start(self, name: str, model: str, devices: tuple[str, ...]) -> None:
        taken = {gpu for worker in self.workers.values() for gpu in worker.gpus}
        assert name not in self.workers and not taken & set(devices)
        assert len(devices) == self.models[model].gpus and set(devices) <= set(GPUS)
        self.workers[name] = Worker(model, devices, self.now + self.rng.choice((0.5, 2.0, 5.0)))

    def _end(self, name: str) -> None:
        worker = self.workers[name]
        assert worker.ends_at is None, "ended twice"
        stay = [w for w in self._open(worker.model) if w is not worker]
        assert not worker.streams or (self.movable and stay), (name, worker.streams)
        self.queues[worker.model] += worker.streams
        worker.streams = []
        worker.ends_at = self.now + self.rng.choice((0.0, 1.0, 3.0))
        self.ended += 1

    def _crash(self, name: str) -> None:
        worker = self.workers[name]
        if worker.ends_at is not None:
            return
        self.queues[worker.model] += worker.streams
        worker.streams = []
        worker.serves_at = self.now + self.rng.choice((0.5, 2.0))
        self.set.restarted(name, self.now)

    def until(self, condition: Callable[[], bool]) -> bool:
        """Without new requests."""
        for _ in range(400):
            if condition():
                return True
            self.step(0, crash=False)
        return False


@pytest.mark.parametrize("seed", range(12))
def test_gpus_have_one_owner_no_request_is_cut_and_every_model_keeps_its_least(seed: int) -> None:
    fleet = RandomFleet(seed)
    for n in range(300):
        fleet.step(fleet.rng.choice((0, 1, 6)) if n % 60 < 40 else 0, fleet.rng.random() < 0.03)
    assert fleet.until(lambda: not any(fleet.queues.values())), "requests are never answered"
    least = {name: m.scaler.rules.min_workers for name, m in fleet.models.items()}
    assert fleet.until(lambda: all(len(fleet._of(n)) == count for n, count in least.items()))
    assert fleet.ended > 3
