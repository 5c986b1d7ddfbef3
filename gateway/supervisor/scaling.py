"""Shell. Lets the decision act on this machine: asks the workforce what to do ten times a second,
has workers started and ended, and tells the gateway processes how things stand.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from gateway.supervisor.autoscaling.autoscaler import Autoscaler
from gateway.supervisor.autoscaling.workforce import EndWorker, Model, StartWorker, Workforce
from gateway.supervisor.custom_policy import load_policy
from gateway.supervisor.load_server import LoadServer
from shared.config.llm import AutoscalingConfig, LLMConfig, Settings
from shared.errors import ConfigError

log = logging.getLogger("loraplex.serve")

TICK_S = 0.1
"""Ray's control loop (RAY_SERVE_CONTROL_LOOP_INTERVAL_S)."""
PATIENCE_S = 10.0
"""Beyond the longest request, for a retired worker whose last request is still counted."""


def make_workforce(settings: Settings, devices: list[str]) -> Workforce:
    """Raises ConfigError if the devices are too few for the least number of workers, or a policy
    cannot be loaded.
    """
    models = {m.model_id: _model(m, bool(devices)) for m in settings.models}
    least = sum(m.gpus * m.scaler.rules.min_workers for m in models.values())
    if least > len(devices):
        raise ConfigError(
            f"the workers of {settings.source or 'this config'} need more GPUs "
            f"than the {len(devices)} found; "
            "lower num_replicas (or min_replicas), or tensor_parallel_size"
        )
    return Workforce(models, devices, settings.gateway.request_timeout_s + PATIENCE_S)


def _model(config: LLMConfig, has_gpus: bool) -> Model:
    workers = config.workers
    scaling = config.deployment_config.autoscaling_config
    if scaling is None:
        scaling = AutoscalingConfig(min_replicas=workers, max_replicas=max(1, workers))
    policy = load_policy(scaling.policy)
    scaler = Autoscaler(config.model_id, scaling, workers, config.runs_at_once, policy)
    return Model(scaler, config.gpus_per_worker if has_gpus else 0)


class Scaling:
    """`start` starts a worker's process, `end` ends one; neither may wait for long."""

    def __init__(
        self,
        workforce: Workforce,
        run_dir: Path,
        start: Callable[[StartWorker], Awaitable[None]],
        end: Callable[[str], None],
    ) -> None:
        self._workforce = workforce
        self._start, self._end = start, end
        self._server = LoadServer(
            run_dir, lambda report: workforce.hear(report, time.monotonic()), workforce.forget
        )
        self._told: dict[str, int] = {}

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Gateway processes that are started inside find us."""
        async with self._server.open():
            yield

    async def run(self) -> None:
        while True:
            await self.step()
            await asyncio.sleep(TICK_S)

    async def step(self) -> None:
        now = time.monotonic()
        for action in self._workforce.step(now):
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
        status = self._workforce.status(now)
        for name, found in status.models.items():
            if self._told.get(name, found.wanted) != found.wanted:
                log.info(
                    "scaled",
                    extra={"model": name, "wanted": found.wanted, "reason": found.reason},
                )
            self._told[name] = found.wanted
        self._server.tell(status)
