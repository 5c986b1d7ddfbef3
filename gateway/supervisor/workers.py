"""Shell. How `serve` starts a worker process: by itself, or forked from a zygote on CPU hosts."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

from gateway.supervisor.autoscaling.workforce import StartWorker
from gateway.supervisor.endpoints import endpoints
from loraplex.start import command
from shared.config.llm import Settings
from shared.errors import ConfigError
from shared.runtime import children
from shared.runtime.children import Child, Zygote
from shared.supervision.client import environment

FORK_S = 20.0  # for the zygote to fork; one that takes longer hangs


class WorkerStarter:
    """The zygote is opened for the first worker that needs it: others need not wait for that.
    `config` is the settings file of the children, `socket` where they report to."""

    def __init__(
        self, settings: Settings, config: Path, socket: Path, say: Callable[[str], None]
    ) -> None:
        self._settings, self._config, self._socket, self._say = settings, config, socket, say
        self._threads = _thread_env(settings)
        self._zygote: Zygote | None = None
        self._opening = asyncio.Lock()

    async def start(self, action: StartWorker) -> Child:
        """Raises ConfigError if the zygote has ended and cannot be opened again, or hangs."""
        model = self._settings.model(action.model)
        assert model is not None
        argv = self._argv(action)
        env = environment(self._socket, action.worker)
        if model.llm_engine != "sim" and not action.devices:
            return await self._fork(argv, env)
        if action.devices:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(action.devices)
        return await children.start(command("worker", *argv), {**self._threads, **env})

    async def close(self) -> None:
        if self._zygote is not None:
            await self._zygote.close()

    async def _living_zygote(self) -> Zygote:
        async with self._opening:
            if self._zygote is None or self._zygote.ended:
                self._say("importing vLLM (about 10 s) ...")
                self._zygote = await Zygote.open(self._threads)
            return self._zygote

    async def _fork(self, argv: list[str], env: dict[str, str]) -> Child:
        zygote = await self._living_zygote()
        try:
            async with asyncio.timeout(FORK_S):
                return await zygote.start(argv, env)
        except TimeoutError as exc:
            zygote.kill()
            raise ConfigError("the process that forks the workers hangs; it is replaced") from exc

    def _argv(self, action: StartWorker) -> list[str]:
        where = [
            endpoints(self._settings, i, self._config.parent).control
            for i in range(self._settings.gateway.processes)
        ]
        gateways = [part for endpoint in where for part in ("--gateway", endpoint)]
        return [str(self._config), "--model", action.model, "--worker", action.worker, *gateways]


def _thread_env(settings: Settings) -> dict[str, str]:
    """CPU workers share the cores: more threads than cores would only wait for each other. The
    workers that may come later count too, but at most one per core.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return {}
    cores = os.cpu_count() or 1
    most = 0
    for model in settings.models:
        scaling = model.deployment_config.autoscaling_config
        most += model.workers if scaling is None else scaling.max_replicas
    first = sum(model.workers for model in settings.models)
    workers = max(1, first, min(most, cores))
    return {"OMP_NUM_THREADS": str(max(1, cores // workers))}
