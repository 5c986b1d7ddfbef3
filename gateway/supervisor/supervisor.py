"""Shell. `loraplex serve`: everything on one machine. Starts gateway processes and workers,
restarts what ends, stops in order.

It imports nothing of the workers; it starts `gateway` and `worker` processes (on CPU hosts a zygote
forks the workers).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp
import msgspec

from gateway.supervisor.autoscaling.workforce import StartWorker, Workforce
from gateway.supervisor.endpoints import endpoints
from gateway.supervisor.listening import check_address
from gateway.supervisor.scaling import Scaling, make_workforce
from loraplex.start import command
from shared.config.handover import write_settings
from shared.config.llm import LLMConfig, Settings
from shared.errors import ConfigError, LoraplexError
from shared.runtime import children
from shared.runtime.children import Child, Zygote
from shared.runtime.process import on_stop_signals, visible_gpus

log = logging.getLogger("loraplex.serve")

START_S = 30.0  # for a gateway process to listen
BACKOFF_S = (1.0, 2.0, 5.0, 10.0, 30.0)  # between restarts of one process; the last one repeats
STEADY_S = 60.0  # a process that ran this long starts again with the first back-off
# a worker that never served and ended this often will not serve the next time either
FIRST_TRIES = 2


class Supervisor:
    """One run of `serve`. `say` prints a line for the person at the terminal."""

    def __init__(self, settings: Settings, say: Callable[[str], None]) -> None:
        self._settings = settings
        self._say = say
        self._stopping = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._live: dict[str, Child] = {}
        self._ending: dict[str, asyncio.Event] = {}  # set once a worker is to end for good
        self._config = ""
        self._zygote: Zygote | None = None
        self._failure: str | None = None
        self._run_dir = Path(tempfile.mkdtemp(prefix="loraplex-"))
        self._was_ready = False
        self._example: str | None = None
        self._workforce: Workforce
        self.port = 0

    async def run(self, ready: Callable[[int, str | None], None]) -> int:
        """Serves until a signal or a failure that retrying cannot mend.

        Once all workers serve, `ready(port, model)` is called; `model` is one that names an
        adapter, if the store shows any.
        """
        on_stop_signals(lambda sig: self._stop(None))
        try:
            check_address(self._settings.gateway)
            self._workforce = make_workforce(self._settings, visible_gpus())
            self._config = str(write_settings(self._settings, self._run_dir))
            scaling = Scaling(self._workforce, self._run_dir, self._start_worker, self._end_worker)
            async with scaling.open():
                await self._start_gateways(self._config)
                await self._open_zygote()
                self._watch(asyncio.create_task(scaling.run(), name="scaling"))
                if await self._until_ready():
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

    async def _open_zygote(self) -> None:
        if any(m.llm_engine != "sim" and not self._takes_gpus(m) for m in self._settings.models):
            self._say("importing vLLM (about 10 s) ...")
            self._zygote = await Zygote.open(self._thread_env())
        first = sum(m.workers for m in self._settings.models)
        if first:
            self._say(f"starting {first} worker{'s' if first > 1 else ''} ...")

    async def _start_worker(self, action: StartWorker) -> None:
        """Starts it and keeps it alive until it is told to end."""
        if self._stopping.is_set():
            return
        model = self._settings.model(action.model)
        assert model is not None
        start = self._starter(action, model)
        self._ending[action.worker] = asyncio.Event()
        self._keep(action.worker, await start(), start)

    def _end_worker(self, name: str) -> None:
        """It has nothing to do any more."""
        self._ending[name].set()
        child = self._live.get(name)
        if child is not None:
            g = self._settings.gateway
            ended = children.end(child, g.drain_s + g.kill_s, g.kill_s)
            self._watch(asyncio.create_task(_result(ended), name=f"end {name}"))

    @staticmethod
    def _takes_gpus(model: LLMConfig) -> bool:
        return bool(model.gpus_per_worker and visible_gpus())

    def _worker_argv(self, worker: str, model: LLMConfig) -> list[str]:
        where = [
            endpoints(self._settings, i, self._run_dir).control
            for i in range(self._settings.gateway.processes)
        ]
        gateways = [part for endpoint in where for part in ("--gateway", endpoint)]
        return [self._config, "--model", model.model_id, "--worker", worker, *gateways]

    def _starter(
        self, action: StartWorker, model: LLMConfig
    ) -> Callable[[], asyncio.Future[Child]]:
        argv = self._worker_argv(action.worker, model)

        async def start() -> Child:
            if self._zygote is not None and model.llm_engine != "sim" and not action.devices:
                return await self._zygote.start(argv, {})
            devices = ",".join(action.devices)
            gpu_env = {"CUDA_VISIBLE_DEVICES": devices} if devices else {}
            env = {**self._thread_env(), **gpu_env}
            return await children.start(command("worker", *argv), env)

        return lambda: asyncio.ensure_future(start())

    def _thread_env(self) -> dict[str, str]:
        """CPU workers share the cores: more threads than cores would only wait for each other. The
        workers that may come later count too, but at most one per core.
        """
        if "OMP_NUM_THREADS" in os.environ:
            return {}
        cores = os.cpu_count() or 1
        most = 0
        for model in self._settings.models:
            scaling = model.deployment_config.autoscaling_config
            most += model.workers if scaling is None else scaling.max_replicas
        first = sum(model.workers for model in self._settings.models)
        workers = max(1, first, min(most, cores))
        return {"OMP_NUM_THREADS": str(max(1, cores // workers))}

    async def _until_ready(self) -> bool:
        """True once all workers that are wanted serve; False if we stop before that."""
        while not self._stopping.is_set():
            if self._workforce.complete:
                self._example = await self._adapter()
                return True
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.1):
                    await self._stopping.wait()
        return False

    async def _adapter(self) -> str | None:
        """An adapter to show how one is asked for; None if there are none, or if models are only
        told to those with a key.
        """
        host = self._settings.gateway.host.replace("0.0.0.0", "127.0.0.1").replace("::", "[::1]")
        url = f"http://{host}:{self.port}/v1/models"
        try:
            async with aiohttp.ClientSession() as client, client.get(url) as answer:
                if answer.status != 200:
                    return None
                models = (await answer.json())["data"]
                return next((m["id"] for m in models if m["parent"]), None)
        except aiohttp.ClientError:
            return None

    # ---- keeping alive ---------------------------------------------------------------------------

    def _keep(self, name: str, child: Child, start: Callable[[], object]) -> None:
        self._watch(asyncio.create_task(self._keep_alive(name, child, start), name=f"keep {name}"))

    def _watch(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._on_keep_alive_end)

    def _on_keep_alive_end(self, task: asyncio.Task[None]) -> None:
        """A task that failed keeps nothing alive any more (the zygote may be gone): better to
        end, and be started again, than to serve less.
        """
        self._tasks.discard(task)
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
        ending = self._ending.get(name, asyncio.Event())
        while True:
            self._live[name] = child
            began = time.monotonic()
            status = await child.wait()
            del self._live[name]
            if ending.is_set():
                self._workforce.gone(name)
                return
            if self._stopping.is_set():
                return
            ran_s = time.monotonic() - began
            tries = 1 if ran_s > STEADY_S else tries + 1
            # 2: it refused its configuration
            if not self._was_ready and (status == 2 or tries >= FIRST_TRIES):
                self._stop(f"{name} cannot start (its message is above)")
                return
            wait_s = BACKOFF_S[min(tries, len(BACKOFF_S)) - 1]
            log.warning(
                "process ended, starting it again",
                extra={"which": name, "status": status, "after_s": round(ran_s, 1), "in_s": wait_s},
            )
            if await self._pause(wait_s, ending):
                self._workforce.gone(name)
                return
            self._workforce.restarted(name, time.monotonic())
            child = await start()  # type: ignore[misc]

    async def _pause(self, seconds: float, ending: asyncio.Event) -> bool:
        """True if we, or this one process, are told to end within it."""
        waits = [asyncio.ensure_future(event.wait()) for event in (self._stopping, ending)]
        done, _ = await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        return bool(done)

    def _stop(self, failure: str | None) -> None:
        if self._stopping.is_set() and failure is None:
            for child in self._live.values():  # the second Ctrl-C: at once
                children.send_signal(child, signal.SIGKILL)
        self._failure = self._failure or failure
        self._stopping.set()

    async def _shut_down(self) -> None:
        """Gateways drain first, while their workers still answer; then the workers."""
        self._stopping.set()
        for task in self._tasks:
            if task.get_name() == "scaling":
                task.cancel()
        g = self._settings.gateway
        if self._live:
            self._say("stopping (running requests may finish; Ctrl-C again to end at once) ...")
        for prefix in ("g", "w"):
            live = [c for name, c in self._live.items() if name.startswith(prefix)]
            await asyncio.gather(*(children.end(c, g.drain_s + g.kill_s, g.kill_s) for c in live))
        if self._zygote is not None:
            await self._zygote.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def _result(ended: Awaitable[object]) -> None:
    await ended
