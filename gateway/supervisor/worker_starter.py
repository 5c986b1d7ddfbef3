"""Shell. Starts worker processes: directly, or by forking them from the zygote on CPU hosts."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from gateway.supervisor.autoscaling.worker_set import StartWorker
from gateway.supervisor.link_addresses import link_addresses
from loraplex.start import command
from shared.config.llm import Settings
from shared.errors import ConfigError
from shared.runtime import children
from shared.runtime.children import Child, Zygote
from shared.runtime.process import visible_gpus
from shared.supervision.client import environment

FORK_S = 20.0  # a zygote that takes longer to fork is taken for hung


class WorkerStarter:
    """Starts workers of one machine. The zygote is started for the first worker that needs it,
    since it takes 10 to 20 s and other workers need none.

    Args:
        config: the settings file that the child processes read.
        socket: the supervisor's socket, to which they report.
        say: prints a line for the person at the terminal.
    """

    def __init__(self, settings: Settings, config: Path, socket: Path) -> None:
        self._settings, self._config, self._socket = settings, config, socket
        self._threads = _thread_env(settings)
        self._zygote: Zygote | None = None
        self._opening = asyncio.Lock()
        self._import: asyncio.Task[Zygote] | None = None
        self._given_up = False

    def configure(self, settings: Settings) -> None:
        """Workers are started with these from now on; they read the file of `config`."""
        self._settings = settings

    async def start(self, action: StartWorker) -> Child:
        """Raises ConfigError if the zygote cannot be started, or hangs."""
        model = self._settings.model(action.model)
        assert model is not None
        argv = self._argv(action)
        env = environment(self._socket, action.worker)
        if action.devices:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(action.devices)
        if model.llm_engine != "sim" and len(action.devices) <= 1:
            return await self._fork(argv, env)
        return await children.start(command("worker", *argv), {**self._threads, **env})

    def give_up(self) -> None:
        """Nothing is started from now on, and no import is waited for."""
        self._given_up = True
        if self._import is not None:
            self._import.cancel()

    async def close(self) -> None:
        if self._zygote is not None:
            await self._zygote.close()

    async def _living_zygote(self) -> Zygote:
        async with self._opening:
            if self._zygote is None or self._zygote.ended:
                self._zygote = await self._open_zygote()
            return self._zygote

    async def _open_zygote(self) -> Zygote:
        """Raises ConfigError if vLLM cannot be imported, or is not any more."""
        # it never uses a GPU, and must not fail at what this variable says for its children
        env = {**self._threads, "CUDA_VISIBLE_DEVICES": "".join(visible_gpus()[:1])}
        if not self._given_up:
            opening = Zygote.open(env)
            self._import = asyncio.create_task(opening, name="import vLLM")
            await asyncio.wait([self._import])
            if not self._import.cancelled():
                return self._import.result()
        raise ConfigError("it was stopped while vLLM was imported")

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
            link_addresses(self._settings, i, self._config.parent).control
            for i in range(self._settings.gateway.processes)
        ]
        gateways = [part for endpoint in where for part in ("--gateway", endpoint)]
        return [str(self._config), "--model", action.model, "--worker", action.worker, *gateways]


def _thread_env(settings: Settings) -> dict[str, str]:
    """OMP_NUM_THREADS for CPU workers, unless the user has set it. The workers share the cores, and
    more threads than cores only wait for each other. Workers that scaling may add count as well,
    but no more than one per core.
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
