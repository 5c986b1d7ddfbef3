"""Pure. All workers of this machine: how many are wanted, which ones exist, and what must be done
about the difference.

A worker starts, serves, leaves and ends. Leaving has two phases. First, adapters in use that only
this worker has are loaded elsewhere, for at most WARM_S; until then the worker can still be kept.
Then it retires: gateways send it nothing new, its requests end, and then its process is ended. So
scaling never cuts off a request.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from gateway.supervisor.autoscaling.autoscaler import Autoscaler
from gateway.supervisor.autoscaling.decision import ScalingDecision
from gateway.supervisor.autoscaling.gpu_allocation import GpuDemand, GpuDevices, share
from gateway.supervisor.autoscaling.reports import (
    AdapterHandover,
    LoadReport,
    ModelLoad,
    ModelStatus,
    ScalingStatus,
    WorkerLoad,
)
from gateway.supervisor.autoscaling.scale_down import (
    ScaleDownCandidate,
    adapters_to_move,
    choose_victims,
    handovers,
)
from shared.averages import blend
from shared.config.deployment import AutoscalingConfig

WARM_S = 30.0
"""How long a leaving worker waits until others have loaded its adapters. A load takes a second or
two. If no slot becomes free elsewhere, the adapter is loaded with its next request.
"""
START_WEIGHT = 0.5
"""The weight of the newest start time in the moving average. Starts are rare, and the second one is
faster since the disk cache is warm.
"""


@dataclass(frozen=True, slots=True)
class StartWorker:
    """Start a worker of this model on these GPUs."""

    worker: str
    model: str
    devices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class EndWorker:
    """End the process of this worker. It has no requests left."""

    worker: str


Action: TypeAlias = StartWorker | EndWorker


@dataclass(slots=True)
class WorkerRecord:
    """One worker, from its start until its process has ended for good.

    `age` numbers the workers in the order of their starts. `served` is whether it has served since
    its last start. `leaves_since` and `retired_since` are the times of the two phases of leaving.
    """

    name: str
    model: str
    age: int
    started: float
    served: bool = False
    leaves_since: float | None = None
    retired_since: float | None = None
    ending: bool = False

    @property
    def stays(self) -> bool:
        return self.leaves_since is None


@dataclass(slots=True)
class ScaledModel:
    """One base model. `gpus` is what each of its workers takes. `start_s` is the average time that
    its workers took to start (0: none has yet). `granted` is the number of workers that fit on this
    machine.
    """

    scaler: Autoscaler
    gpus: int
    start_s: float = 0.0
    granted: int = 0
    decision: ScalingDecision | None = None


class WorkerSet:
    """Gateway processes report their load to it, and the supervisor reports restarts and ends.
    `step` returns what must be done.

    After `drain_limit_s` a retired worker is ended, even if requests are still counted for it. No
    request lasts longer.
    """

    def __init__(
        self,
        models: Mapping[str, ScaledModel],
        devices: Sequence[str],
        drain_limit_s: float,
        warm_s: float = WARM_S,
    ) -> None:
        self._models = dict(models)
        self._devices = GpuDevices(devices)
        self._drain_limit_s, self._warm_s = drain_limit_s, warm_s
        self._workers: dict[str, WorkerRecord] = {}
        self._last_age = 0
        self._loads: dict[str, dict[str, ModelLoad]] = {}
        self._grant()

    def configure(self, model: str, config: AutoscalingConfig, capacity: int) -> None:
        """See Autoscaler.configure."""
        self._models[model].scaler.configure(config, capacity)

    # ---- events ----------------------------------------------------------------------------------

    def report(self, report: LoadReport, now: float) -> None:
        """Takes the load report of one gateway process."""
        self._loads[report.process] = report.models
        for name, load in report.models.items():
            if name in self._models:
                self._models[name].scaler.report(report.process, load, now)
        for worker in self._workers.values():
            if not worker.served and worker.name in self._models[worker.model].scaler.serving():
                worker.served = True
                model = self._models[worker.model]
                model.start_s = blend(model.start_s, now - worker.started, START_WEIGHT)

    def forget(self, process: str) -> None:
        """The gateway process has ended, so its last report no longer counts."""
        self._loads.pop(process, None)
        for model in self._models.values():
            model.scaler.forget(process)

    def restarted(self, name: str, now: float) -> None:
        """The worker's process has ended and is started again."""
        worker = self._workers.get(name)
        if worker is not None:
            worker.started, worker.served = now, False

    def gone(self, name: str) -> None:
        """The worker's process has ended for good. Its name and its GPUs are free again."""
        if self._workers.pop(name, None) is not None:
            self._devices.give_back(name)

    # ---- actions ---------------------------------------------------------------------------------

    def step(self, now: float) -> list[Action]:
        """The actions that are due. Each action is returned once."""
        for name, model in self._models.items():
            running = [m.name for m in self._of(name) if m.stays and m.name in self._serving(name)]
            model.decision = model.scaler.decide(now, running)
        self._grant()
        actions: list[Action] = []
        for name in self._models:
            actions += self._fit(name, now)
        for worker in list(self._workers.values()):
            actions += self._leave(worker, now)
        return actions

    def status(self, now: float) -> ScalingStatus:
        return ScalingStatus({name: self._status(name, now) for name in self._models})

    def complete(self, but: Container[str] = ()) -> bool:
        """Whether every model has as many serving workers as it may have, apart from the models in
        `but`.
        """
        return all(
            name in but or sum(m.stays and m.served for m in self._of(name)) >= model.granted
            for name, model in self._models.items()
        )

    # ---- inside ----------------------------------------------------------------------------------

    def _of(self, model: str) -> list[WorkerRecord]:
        return [m for m in self._workers.values() if m.model == model]

    def _serving(self, model: str) -> dict[str, WorkerLoad]:
        return self._models[model].scaler.serving()

    def _grant(self) -> None:
        demands = [
            GpuDemand(
                name,
                model.gpus,
                model.scaler.rules.min_workers,
                model.scaler.wanted,
                sum(m.stays for m in self._of(name)),
                self._idle(name),
            )
            for name, model in self._models.items()
        ]
        for name, granted in share(demands, len(self._devices)).items():
            self._models[name].granted = granted

    def _idle(self, model: str) -> bool:
        """Whether no request of the model runs or waits, nor did one in the window of its load."""
        decision = self._models[model].decision
        reported = [models[model] for models in self._loads.values() if model in models]
        open_now = sum(m.queued + sum(w.requests for w in m.workers.values()) for m in reported)
        return decision is not None and decision.ongoing <= 0 and not open_now

    def _fit(self, model_name: str, now: float) -> list[Action]:
        """Starts the workers that are missing, and marks surplus ones as leaving."""
        model = self._models[model_name]
        staying = [w for w in self._of(model_name) if w.stays]
        missing = model.granted - len(staying)
        if missing < 0:
            serving = self._serving(model_name)
            candidates = [ScaleDownCandidate(w.name, w.age, serving.get(w.name)) for w in staying]
            for victim in choose_victims(candidates, -missing):
                self._workers[victim].leaves_since = now
            return []
        recallable = [w for w in self._of(model_name) if not w.stays and w.retired_since is None]
        for worker in recallable[:missing]:
            worker.leaves_since = None
        actions: list[Action] = []
        for _ in range(missing - len(recallable)):
            name = self._free_name()
            devices = self._devices.take(name, model.gpus)
            if devices is None:
                break  # workers that are leaving still own the GPUs
            self._last_age += 1
            self._workers[name] = WorkerRecord(name, model_name, self._last_age, now)
            actions.append(StartWorker(name, model_name, devices))
        return actions

    def _leave(self, worker: WorkerRecord, now: float) -> list[Action]:
        if worker.leaves_since is None or worker.ending:
            return []
        serving = self._serving(worker.model)
        if worker.retired_since is None:
            mine, stayers = serving.get(worker.name), self._stayers(worker.model)
            to_move = mine is not None and stayers and adapters_to_move([mine], stayers)
            if to_move and now - worker.leaves_since < self._warm_s:
                return []
            worker.retired_since = now
        quiet = not self._requests_that_hold(worker) and worker.name not in serving
        if worker.served and not quiet and now - worker.retired_since < self._drain_limit_s:
            return []
        worker.ending = True
        return [EndWorker(worker.name)]

    def _requests_that_hold(self, worker: WorkerRecord) -> int:
        """Those that must end before it does. Others go on at a worker that stays: this one drains,
        and what has not ended by then moves.
        """
        reporting = [
            load.workers[worker.name]
            for models in self._loads.values()
            if (load := models.get(worker.model)) is not None and worker.name in load.workers
        ]
        movable = sum(w.movable for w in reporting) if self._stayers(worker.model) else 0
        return sum(w.requests for w in reporting) - movable

    def _stayers(self, model: str) -> dict[str, WorkerLoad]:
        serving = self._serving(model)
        return {m.name: serving[m.name] for m in self._of(model) if m.stays and m.name in serving}

    def _free_name(self) -> str:
        """The lowest free number. Numbers are reused, so metrics get few distinct labels."""
        number = 0
        while f"w{number}" in self._workers:
            number += 1
        return f"w{number}"

    def _status(self, name: str, now: float) -> ModelStatus:
        model, workers, serving = self._models[name], self._of(name), self._serving(name)
        rules, decision = model.scaler.rules, model.decision
        starting = [m for m in workers if m.stays and m.name not in serving]
        eta_s = None
        if starting and model.start_s:
            eta_s = max(0.0, min(m.started for m in starting) + model.start_s - now)
        reason = decision.reason if decision else ""
        if model.granted < model.scaler.wanted:
            reason += f"; the GPUs of this machine allow {model.granted}"
        return ModelStatus(
            wanted=model.scaler.wanted,
            serving=sum(m.stays and m.name in serving for m in workers),
            starting=len(starting),
            draining=sum(not m.stays for m in workers),
            min_replicas=rules.min_workers,
            max_replicas=rules.max_workers,
            scales=rules.min_workers < rules.max_workers,
            reason=reason,
            cause=decision.cause if decision else "",
            held_by=decision.held_by if decision else "",
            held_s=round(decision.held_s, 1) if decision else 0.0,
            ongoing=decision.ongoing if decision else 0.0,
            target_ongoing=decision.target_ongoing if decision else 0.0,
            recommended=decision.recommended if decision else 0,
            needs={str(name): count for name, count in decision.needs} if decision else {},
            start_s=model.start_s or None,
            eta_s=eta_s,
            retiring=tuple(m.name for m in workers if m.retired_since is not None),
            handovers=self._handovers(name),
            without_gpus=max(0, model.scaler.wanted - model.granted),
        )

    def _handovers(self, model: str) -> tuple[AdapterHandover, ...]:
        """Of all workers that leave together: they share the free slots of those that stay."""
        serving, stayers = self._serving(model), self._stayers(model)
        leaving = [
            serving[w.name]
            for w in self._of(model)
            if not w.stays and w.retired_since is None and w.name in serving
        ]
        return tuple(handovers(adapters_to_move(leaving, stayers), stayers))
