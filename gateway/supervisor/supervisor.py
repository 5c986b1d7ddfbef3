"""Shell. `loraplex serve`: everything on one machine. Starts gateway processes and workers,
restarts what ends, stops in order.

It imports nothing of the workers; it starts `gateway` and `worker` processes (on CPU hosts a zygote
forks the workers).
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import msgspec

from gateway.supervisor.endpoints import endpoints
from gateway.supervisor.listening import check_address
from loraplex.start import command
from shared.config.handover import write_settings
from shared.config.llm import LLMConfig, Settings
from shared.errors import ConfigError, LoraplexError
from shared.runtime import children
from shared.runtime.children import Child, Zygote
from shared.runtime.process import count_gpus, on_stop_signals

log = logging.getLogger("loraplex.serve")

START_S = 30.0  # for a gateway process to listen
BACKOFF_S = (1.0, 2.0, 5.0, 10.0, 30.0)  # between restarts of one process; the last one repeats
STEADY_S = 60.0  # a process that ran this long starts again with the first back-off
# a worker that never served and ended this often will not serve the next time either
FIRST_TRIES = 2


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """One worker to keep alive. `gpus` are indices for CUDA_VISIBLE_DEVICES; empty on a CPU
    host.
    """

    name: str
    model: LLMConfig
    gpus: tuple[int, ...]


def plan_workers(settings: Settings, gpus: int) -> list[WorkerSpec]:
    """Names and GPUs for every worker of the file: `gpus` devices are handed out in order. Raises
    ConfigError if they are too few.
    """
    specs: list[WorkerSpec] = []
    free = list(range(gpus))
    for model in settings.models:
        need = model.gpus_per_worker if gpus and model.llm_engine != "sim" else 0
        for _ in range(model.workers):
            if len(free) < need:
                raise ConfigError(
                    f"the workers of {settings.source or 'this config'} need more GPUs "
                    f"than the {gpus} found; "
                    "lower num_replicas (or min_replicas), or tensor_parallel_size"
                )
            mine, free = tuple(free[:need]), free[need:]
            specs.append(WorkerSpec(f"w{len(specs)}", model, mine))
    return specs


class Supervisor:
    """One run of `serve`. `say` prints a line for the person at the terminal."""

    def __init__(self, settings: Settings, say: Callable[[str], None]) -> None:
        self._settings = settings
        self._say = say
        self._stopping = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._live: dict[str, Child] = {}
        self._zygote: Zygote | None = None
        self._failure: str | None = None
        self._run_dir = Path(tempfile.mkdtemp(prefix="loraplex-"))
        self._was_ready = False
        self._example: str | None = None
        self.port = 0

    async def run(self, ready: Callable[[int, str | None], None]) -> int:
        """Serves until a signal or a failure that retrying cannot mend.

        Once all workers serve, `ready(port, model)` is called; `model` is one that names an
        adapter, if the store shows any.
        """
        on_stop_signals(lambda sig: self._stop(None))
        try:
            check_address(self._settings.gateway)
            specs = plan_workers(self._settings, count_gpus())
            config = str(write_settings(self._settings, self._run_dir))
            await self._start_gateways(config)
            await self._start_workers(specs, config)
            if not self._stopping.is_set() and await self._until_ready(len(specs)):
                self._was_ready = True
                ready(self.port, self._example)
            await self._stopping.wait()
        except LoraplexError as exc:
            self._failure = exc.message
        finally:
            await self._shut_down()
            shutil.rmtree(self._run_dir, ignore_errors=True)
        if self._failure:
            print(f"loraplex serve: {self._failure}", file=sys.stderr)  # noqa: T201 - the one message a person must see
            return 2
        return 0

    # ---- starting --------------------------------------------------------------------------------

    async def _start_gateways(self, config: str) -> None:
        for index in range(self._settings.gateway.processes):
            where = ("--index", str(index), "--run-dir", str(self._run_dir))
            argv = command("gateway", config, *where)
            child = await children.start(argv, {})
            facts = self._run_dir / f"g{index}.json"
            await self._until(lambda facts=facts: facts.exists(), child, "the gateway")  # type: ignore[misc]
            self.port = msgspec.json.decode(facts.read_bytes())["port"]
            self._pin_port()
            self._keep(f"g{index}", child, lambda argv=argv: children.start(argv, {}))  # type: ignore[misc]
        self._say(f"gateway listens on {self._settings.gateway.host}:{self.port}")

    def _pin_port(self) -> None:
        """Port 0 has become a real one: a gateway that is started again, and the other
        processes, take the same.
        """
        gateway = msgspec.structs.replace(self._settings.gateway, port=self.port)
        self._settings = msgspec.structs.replace(self._settings, gateway=gateway)
        write_settings(self._settings, self._run_dir)

    async def _until(self, condition: Callable[[], bool], child: Child, what: str) -> None:
        ended = asyncio.ensure_future(child.wait())
        end = time.monotonic() + START_S
        while not condition():
            if ended.done():
                raise ConfigError(
                    f"{what} did not start (status {ended.result()}; its message is above)"
                )
            if time.monotonic() > end:
                await children.end(child, 0, self._settings.gateway.kill_s)
                raise ConfigError(f"{what} did not start within {START_S:g} s")
            await asyncio.wait([ended], timeout=0.05)
        ended.cancel()

    async def _start_workers(self, specs: list[WorkerSpec], config: str) -> None:
        env = self._thread_env(len(specs))
        forked = any(s.model.llm_engine != "sim" and not s.gpus for s in specs)
        if forked:
            self._say("importing vLLM (about 10 s) ...")
            self._zygote = await Zygote.open(env)
        if specs:
            self._say(f"starting {len(specs)} worker{'s' if len(specs) > 1 else ''} ...")
        for spec in specs:
            argv = self._worker_argv(spec, config)
            start = self._starter(spec, argv, env)
            self._keep(spec.name, await start(), start)

    def _worker_argv(self, spec: WorkerSpec, config: str) -> list[str]:
        where = [
            endpoints(self._settings, i, self._run_dir).control
            for i in range(self._settings.gateway.processes)
        ]
        gateways = [part for endpoint in where for part in ("--gateway", endpoint)]
        return [config, "--model", spec.model.model_id, "--worker", spec.name, *gateways]

    def _starter(
        self, spec: WorkerSpec, argv: list[str], env: dict[str, str]
    ) -> Callable[[], asyncio.Future[Child]]:
        async def start() -> Child:
            if self._zygote is not None and spec.model.llm_engine != "sim" and not spec.gpus:
                return await self._zygote.start(argv, {})
            gpu_env = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, spec.gpus))} if spec.gpus else {}
            return await children.start(command("worker", *argv), {**env, **gpu_env})

        return lambda: asyncio.ensure_future(start())

    def _thread_env(self, workers: int) -> dict[str, str]:
        """CPU workers share the cores: more threads than cores would only wait for each other."""
        if "OMP_NUM_THREADS" in os.environ:
            return {}
        return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // max(1, workers)))}

    async def _until_ready(self, workers: int) -> bool:
        """True once /ready says so for all workers; False if we stop before that."""
        host = self._settings.gateway.host.replace("0.0.0.0", "127.0.0.1").replace("::", "[::1]")
        async with aiohttp.ClientSession() as client:
            while not self._stopping.is_set():
                try:
                    async with client.get(f"http://{host}:{self.port}/ready") as answer:
                        if sum((await answer.json())["workers"].values()) >= workers:
                            self._example = await self._adapter(
                                client, f"http://{host}:{self.port}/v1/models"
                            )
                            return True
                except aiohttp.ClientError:
                    pass
                try:
                    async with asyncio.timeout(0.2):
                        await self._stopping.wait()
                except TimeoutError:
                    continue
        return False

    async def _adapter(self, client: aiohttp.ClientSession, url: str) -> str | None:
        """An adapter to show how one is asked for; None if there are none, or if models are only
        told to those with a key.
        """
        async with client.get(url) as answer:
            if answer.status != 200:
                return None
            return next((m["id"] for m in (await answer.json())["data"] if m["parent"]), None)

    # ---- keeping alive ---------------------------------------------------------------------------

    def _keep(self, name: str, child: Child, start: Callable[[], object]) -> None:
        task = asyncio.create_task(self._keep_alive(name, child, start), name=f"keep {name}")
        self._tasks.add(task)
        task.add_done_callback(self._on_keep_alive_end)

    def _on_keep_alive_end(self, task: asyncio.Task[None]) -> None:
        """A task that failed keeps nothing alive any more (the zygote may be gone): better to
        end, and be started again, than to serve less.
        """
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._stop(
                f"{task.get_name()}: "
                f"{error.message if isinstance(error, LoraplexError) else repr(error)}"
            )

    async def _keep_alive(self, name: str, child: Child, start: Callable[[], object]) -> None:
        """Starts the process again whenever it ends, with back-off; gives up on one that never got
        going.
        """
        tries = 0
        while True:
            self._live[name] = child
            began = time.monotonic()
            status = await child.wait()
            del self._live[name]
            if self._stopping.is_set():
                return
            ran_s = time.monotonic() - began
            tries = 1 if ran_s > STEADY_S else tries + 1
            # 2: it refused its configuration
            if status == 2 or (tries >= FIRST_TRIES and not self._was_ready):
                self._stop(f"{name} cannot start (its message is above)")
                return
            wait_s = BACKOFF_S[min(tries, len(BACKOFF_S)) - 1]
            log.warning(
                "process ended, starting it again",
                extra={"which": name, "status": status, "after_s": round(ran_s, 1), "in_s": wait_s},
            )
            try:
                async with asyncio.timeout(wait_s):
                    await self._stopping.wait()
                return
            except TimeoutError:
                child = await start()  # type: ignore[misc]

    def _stop(self, failure: str | None) -> None:
        if self._stopping.is_set() and failure is None:
            for child in self._live.values():  # the second Ctrl-C: at once
                children.send_signal(child, signal.SIGKILL)
        self._failure = self._failure or failure
        self._stopping.set()

    async def _shut_down(self) -> None:
        """Gateways drain first, while their workers still answer; then the workers."""
        self._stopping.set()
        g = self._settings.gateway
        if self._live:
            self._say("stopping (running requests may finish; Ctrl-C again to end at once) ...")
        for prefix in ("g", "w"):
            live = [c for name, c in self._live.items() if name.startswith(prefix)]
            await asyncio.gather(*(children.end(c, g.drain_s + g.kill_s, g.kill_s) for c in live))
        if self._zygote is not None:
            await self._zygote.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)
