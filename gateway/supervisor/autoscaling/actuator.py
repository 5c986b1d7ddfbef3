"""Shell. Carries out the autoscaling decisions on this machine. Ten times a second it has workers
started and ended, and tells the gateway processes the state.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from gateway.supervisor.autoscaling.autoscaler import Autoscaler
from gateway.supervisor.autoscaling.custom_policy import load_policy
from gateway.supervisor.autoscaling.scaling_server import ScalingServer
from gateway.supervisor.autoscaling.worker_set import EndWorker, ScaledModel, StartWorker, WorkerSet
from shared.config.llm import AutoscalingConfig, LLMConfig, Settings
from shared.errors import ConfigError

log = logging.getLogger("loraplex.serve")

TICK_S = 0.1
"""The interval of Ray's control loop (RAY_SERVE_CONTROL_LOOP_INTERVAL_S)."""
DRAIN_SLACK_S = 10.0
"""A retired worker may have requests for this long beyond the longest request. Then it is ended,
even if requests are still counted for it.
"""


def make_worker_set(settings: Settings, devices: list[str]) -> WorkerSet:
    """The workers that the settings ask for, on these GPUs.

    Raises ConfigError if there are too few GPUs for the least number of workers, or if a scaling
    policy cannot be loaded.
    """
    if devices:
        check_gpus(settings, len(devices))
    models = {m.model_id: _model(m, bool(devices)) for m in settings.models}
    return WorkerSet(models, devices, settings.gateway.request_timeout_s + DRAIN_SLACK_S)


def check_gpus(settings: Settings, found: int) -> None:
    """Raises ConfigError if the least number of workers needs more, or if they leave too few for a
    worker of a model that may have none: its requests would wait for ever.
    """
    least = sum(m.gpus_per_worker * _scaling(m).min_replicas for m in settings.models)
    if least > found:
        raise ConfigError(
            f"the workers of {settings.source or 'this config'} need more GPUs "
            f"than the {found} found; "
            "lower num_replicas (or min_replicas), or tensor_parallel_size"
        )
    for model in settings.models:
        if not _scaling(model).min_replicas and model.gpus_per_worker > found - least:
            raise ConfigError(
                f"model {model.model_id} could never have a worker: one needs "
                f"{model.gpus_per_worker} GPU(s), and of the {found} found others always keep "
                f"{least}; lower their num_replicas (or min_replicas), or its tensor_parallel_size"
            )


def _model(config: LLMConfig, has_gpus: bool) -> ScaledModel:
    scaling = _scaling(config)
    policy = load_policy(scaling.policy)
    scaler = Autoscaler(config.model_id, scaling, config.workers, config.runs_at_once, policy)
    return ScaledModel(scaler, config.gpus_per_worker if has_gpus else 0)


def _scaling(config: LLMConfig) -> AutoscalingConfig:
    """Without a section of its own the number of workers is fixed."""
    workers = config.workers
    fixed = AutoscalingConfig(min_replicas=workers, max_replicas=max(1, workers))
    return config.deployment_config.autoscaling_config or fixed


def configure(worker_set: WorkerSet, settings: Settings) -> None:
    """Other bounds, from now on."""
    for model in settings.models:
        worker_set.configure(model.model_id, _scaling(model), model.runs_at_once)


class ScalingActuator:
    """`start` starts a worker's process and `end` ends one. Neither may wait for long."""

    def __init__(
        self,
        worker_set: WorkerSet,
        run_dir: Path,
        start: Callable[[StartWorker], Awaitable[None]],
        end: Callable[[str], None],
    ) -> None:
        self._worker_set = worker_set
        self._start, self._end = start, end
        self._server = ScalingServer(
            run_dir, lambda report: worker_set.report(report, time.monotonic()), worker_set.forget
        )
        self._announced: dict[str, int] = {}

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Listens for gateway processes. They must be started while it is open."""
        async with self._server.open():
            yield

    async def run(self) -> None:
        while True:
            await self.step()
            await asyncio.sleep(TICK_S)

    async def step(self) -> None:
        now = time.monotonic()
        for action in self._worker_set.step(now):
            match action:
                case StartWorker(worker, model, devices):
                    log.info(
                        "starting a worker",
                        extra={"worker": worker, "model": model, "gpus": ",".join(devices)},
                    )
                    await self._start(action)
                case EndWorker(worker):
                    log.info("ending a worker", extra={"worker": worker})
                    self._end(worker)
        status = self._worker_set.status(now)
        for name, found in status.models.items():
            if self._announced.get(name, found.wanted) != found.wanted:
                log.info(
                    "scaled",
                    extra={"model": name, "wanted": found.wanted, "reason": found.reason},
                )
            self._announced[name] = found.wanted
        self._server.tell(status)
