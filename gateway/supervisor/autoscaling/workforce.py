"""Pure. All workers of this machine: which are wanted, which are there, and what has to be done.

A worker's way: it starts, it serves (its gateways say so), it leaves, it has gone. Leaving has two
parts. First the adapters in use that only it has are loaded elsewhere, for WARM_S at most, and the
decision can still be taken back. Then it retires: gateways give it nothing new, its requests end,
and once none is left its process is told to end. So no request is ever cut by scaling.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from gateway.supervisor.autoscaling.autoscaler import Autoscaler
from gateway.supervisor.autoscaling.decision import Decision
from gateway.supervisor.autoscaling.gpus import Claim, Devices, share
from gateway.supervisor.autoscaling.reports import (
    LoadReport,
    ModelLoad,
    ModelStatus,
    Move,
    ScalingStatus,
    WorkerLoad,
)
from gateway.supervisor.autoscaling.victims import Present, choose_victims, moves, sole_adapters
from shared.averages import blend

WARM_S = 30.0
"""For an adapter to be loaded elsewhere before its only holder retires. A load takes a second or
two; with no free slot elsewhere it never comes, and its next request loads it.
"""
START_WEIGHT = 0.5
"""Of the newest start in the average: starts are rare, and a warm disk makes the second faster."""


@dataclass(frozen=True, slots=True)
class StartWorker:
    """Start a worker of the model on these devices."""

    worker: str
    model: str
    devices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class EndWorker:
    """The worker has nothing to do any more: end its process."""

    worker: str


Action: TypeAlias = StartWorker | EndWorker


@dataclass(slots=True)
class Member:
    """One worker process, from its start until it has gone. `served`: it has served since then."""

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
class Model:
    """One base model: its autoscaler, the devices that one worker takes, the seconds that its
    starts have taken (0: none yet), the workers that it may have on this machine.
    """

    scaler: Autoscaler
    gpus: int
    start_s: float = 0.0
    granted: int = 0
    decision: Decision | None = None


class Workforce:
    """Written by reports of gateway processes and the ends of workers; `step` says what to do.

    `patience_s`: a retired worker is ended after it even if requests of it are still counted; no
    request lasts longer.
    """

    def __init__(
        self, models: Mapping[str, Model], devices: Sequence[str], patience_s: float
    ) -> None:
        self._models = dict(models)
        self._devices = Devices(devices)
        self._patience_s = patience_s
        self._members: dict[str, Member] = {}
        self._last_age = 0
        self._loads: dict[str, dict[str, ModelLoad]] = {}
        self._grant()

    # ---- what happens ----------------------------------------------------------------------------

    def hear(self, report: LoadReport, now: float) -> None:
        self._loads[report.process] = report.models
        for name, load in report.models.items():
            if name in self._models:
                self._models[name].scaler.hear(report.process, load, now)
        for member in self._members.values():
            if not member.served and member.name in self._models[member.model].scaler.serving():
                member.served = True
                model = self._models[member.model]
                model.start_s = blend(model.start_s, now - member.started, START_WEIGHT)

    def forget(self, process: str) -> None:
        """The gateway process has ended."""
        self._loads.pop(process, None)
        for model in self._models.values():
            model.scaler.forget(process)

    def restarted(self, worker: str, now: float) -> None:
        """Its process ended and was started again."""
        member = self._members.get(worker)
        if member is not None:
            member.started, member.served = now, False

    def gone(self, worker: str) -> None:
        """Its process has ended for good."""
        if self._members.pop(worker, None) is not None:
            self._devices.give_back(worker)

    # ---- what to do ------------------------------------------------------------------------------

    def step(self, now: float) -> list[Action]:
        """What has to be done now; each action is told once."""
        for name, model in self._models.items():
            running = [m.name for m in self._of(name) if m.stays and m.name in self._serving(name)]
            model.decision = model.scaler.decide(now, running)
        self._grant()
        actions: list[Action] = []
        for name in self._models:
            actions += self._fit(name, now)
        for member in list(self._members.values()):
            actions += self._leave(member, now)
        return actions

    def status(self, now: float) -> ScalingStatus:
        return ScalingStatus({name: self._status(name, now) for name in self._models})

    def complete(self, but: Container[str] = ()) -> bool:
        """Every model has as many workers that serve as it may have, save for those in `but`."""
        return all(
            name in but or sum(m.stays and m.served for m in self._of(name)) >= model.granted
            for name, model in self._models.items()
        )

    # ---- inside ----------------------------------------------------------------------------------

    def _of(self, model: str) -> list[Member]:
        return [m for m in self._members.values() if m.model == model]

    def _serving(self, model: str) -> dict[str, WorkerLoad]:
        return self._models[model].scaler.serving()

    def _grant(self) -> None:
        claims = [
            Claim(
                name,
                model.gpus,
                model.scaler.rules.min_workers,
                model.scaler.wanted,
                sum(m.stays for m in self._of(name)),
            )
            for name, model in self._models.items()
        ]
        for name, granted in share(claims, len(self._devices)).items():
            self._models[name].granted = granted

    def _fit(self, name: str, now: float) -> list[Action]:
        """Starts what is missing, and lets go what is too much."""
        model = self._models[name]
        staying = [m for m in self._of(name) if m.stays]
        missing = model.granted - len(staying)
        serving = self._serving(name)
        if missing < 0:
            present = [Present(m.name, m.age, serving.get(m.name)) for m in staying]
            for victim in choose_victims(present, -missing):
                self._members[victim].leaves_since = now
            return []
        returning = [m for m in self._of(name) if not m.stays and m.retired_since is None]
        for member in returning[:missing]:
            member.leaves_since = None
        actions: list[Action] = []
        for _ in range(missing - len(returning)):
            worker = self._free_name()
            devices = self._devices.take(worker, model.gpus)
            if devices is None:
                break  # those who leave still hold them
            self._last_age += 1
            self._members[worker] = Member(worker, name, self._last_age, now)
            actions.append(StartWorker(worker, name, devices))
        return actions

    def _leave(self, member: Member, now: float) -> list[Action]:
        if member.leaves_since is None or member.ending:
            return []
        serving = self._serving(member.model)
        if member.retired_since is None:
            sole = sole_adapters(member.name, serving)
            if sole and self._stayers(member.model) and now - member.leaves_since < WARM_S:
                return []
            member.retired_since = now
        quiet = not self._open_requests(member) and member.name not in serving
        if member.served and not quiet and now - member.retired_since < self._patience_s:
            return []
        member.ending = True
        return [EndWorker(member.name)]

    def _open_requests(self, member: Member) -> int:
        return sum(
            load.workers[member.name].requests
            for models in self._loads.values()
            if (load := models.get(member.model)) is not None and member.name in load.workers
        )

    def _stayers(self, model: str) -> dict[str, WorkerLoad]:
        serving = self._serving(model)
        return {m.name: serving[m.name] for m in self._of(model) if m.stays and m.name in serving}

    def _free_name(self) -> str:
        """The lowest number that no worker has: labels stay few."""
        number = 0
        while f"w{number}" in self._members:
            number += 1
        return f"w{number}"

    def _status(self, name: str, now: float) -> ModelStatus:
        model, members, serving = self._models[name], self._of(name), self._serving(name)
        rules, decision = model.scaler.rules, model.decision
        starting = [m for m in members if m.stays and m.name not in serving]
        eta_s = None
        if starting and model.start_s:
            eta_s = max(0.0, min(m.started for m in starting) + model.start_s - now)
        reason = decision.reason if decision else ""
        if model.granted < model.scaler.wanted:
            reason += f"; the GPUs of this machine allow {model.granted}"
        return ModelStatus(
            wanted=model.scaler.wanted,
            serving=sum(m.stays and m.name in serving for m in members),
            starting=len(starting),
            draining=sum(not m.stays for m in members),
            min_replicas=rules.min_workers,
            max_replicas=rules.max_workers,
            scales=rules.min_workers < rules.max_workers,
            reason=reason,
            cause=decision.cause if decision else "",
            held_by=decision.held_by if decision else "",
            held_s=round(decision.held_s, 1) if decision else 0.0,
            ongoing=decision.ongoing if decision else 0.0,
            target_ongoing=decision.target_ongoing if decision else 0.0,
            start_s=model.start_s or None,
            eta_s=eta_s,
            retiring=tuple(m.name for m in members if m.retired_since is not None),
            moves=self._moves(name),
        )

    def _moves(self, model: str) -> tuple[Move, ...]:
        serving, found = self._serving(model), []
        for member in self._of(model):
            if member.leaves_since is not None and member.retired_since is None:
                found += moves(sole_adapters(member.name, serving), self._stayers(model))
        return tuple(found)
