"""Shell. `loraplex serve`: everything on one machine. Starts gateway processes and workers,
replaces what ends or hangs, stops in order.

It imports nothing of the workers; it starts `gateway` and `worker` processes (on CPU hosts a zygote
forks the workers). Each process has a keeper of its own: what becomes of one model's workers
touches no other model.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from random import Random

import aiohttp
import msgspec

from gateway.supervisor.autoscaling.workforce import StartWorker
from gateway.supervisor.health import ProcessHealth, Trial, verdicts
from gateway.supervisor.keeper import Keeper
from gateway.supervisor.listening import check_address
from gateway.supervisor.liveness import Liveness
from gateway.supervisor.scaling import Scaling, make_workforce
from gateway.supervisor.workers import WorkerStarter
from loraplex.start import command
from shared.config.llm import Settings
from shared.config.settings_file import write_settings
from shared.errors import ConfigError, LoraplexError
from shared.runtime import children
from shared.runtime.children import Child
from shared.runtime.owned_folder import temporary_folder
from shared.runtime.process import on_stop_signals, visible_gpus
from shared.supervision.client import environment
from shared.supervision.messages import Verdicts, WorkerEnded

log = logging.getLogger("loraplex.serve")

START_S = 30.0  # for a gateway process to listen
LOOK_S = 0.1  # between two looks whether all workers serve


class Supervisor:
    """One run of `serve`. `say` prints a line for the person at the terminal."""

    def __init__(self, settings: Settings, run_dir: Path, say: Callable[[str], None]) -> None:
        self._settings = settings
        self._run_dir = run_dir
        self._config = write_settings(settings, run_dir)
        self._say = say
        self._stopping = asyncio.Event()
        self._liveness = Liveness(run_dir / "serve.sock", self._judge)
        self._starter = WorkerStarter(settings, self._config, self._liveness.socket, say)
        self._workforce = make_workforce(settings, visible_gpus())
        self._keepers: dict[str, Keeper] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._verdicts: dict[str, str] = {}
        self._failure: str | None = None
        self._was_ready = False
        self._rng = Random()
        self.port = 0

    async def run(self, ready: Callable[[int, str | None], None]) -> int:
        """Serves until a signal or a failure that retrying cannot mend.

        Once all workers serve, but for those of models that cannot start, `ready(port, model)` is
        called; `model` is one that names an adapter, if the store shows any.
        """
        on_stop_signals(lambda sig: self._stop(None))
        scaling = Scaling(self._workforce, self._run_dir, self._start_worker, self._end_worker)
        loops: list[asyncio.Task[None]] = []
        async with self._liveness.open(), scaling.open():
            try:
                check_address(self._settings.gateway)
                loops += [self._run(self._watch(), "watch")]
                await self._start_gateways()
                self._say_what_starts()
                loops += [self._run(scaling.run(), "scaling")]
                if await self._until_ready():
                    self._was_ready = True
                    ready(self.port, await self._adapter())
                await self._stopping.wait()
            except LoraplexError as exc:
                self._failure = exc.message
            finally:
                for loop in loops:
                    loop.cancel()
                await self._shut_down()
        if self._failure:
            print(f"loraplex serve: {self._failure}", file=sys.stderr)  # noqa: T201 - the one message a person must see
            return 2
        return 0

    # ---- starting --------------------------------------------------------------------------------

    async def _start_gateways(self) -> None:
        for index in range(self._settings.gateway.processes):
            name = f"g{index}"
            where = ("--index", str(index), "--run-dir", str(self._run_dir))
            argv = command("gateway", str(self._config), *where)
            env = environment(self._liveness.socket, name)
            child = await children.start(argv, env)
            facts = self._run_dir / f"{name}.json"
            await self._until(facts.exists, child, "the gateway")
            self.port = msgspec.json.decode(facts.read_bytes())["port"]
            self._pin_port()
            self._keep(name, lambda argv=argv, env=env: children.start(argv, env), child)  # type: ignore[misc]
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

    def _say_what_starts(self) -> None:
        first = sum(m.workers for m in self._settings.models)
        if first:
            self._say(f"starting {first} worker{'s' if first > 1 else ''} ...")

    async def _start_worker(self, action: StartWorker) -> None:
        """Starts it and keeps it alive until it is told to end."""
        if not self._stopping.is_set():
            start = self._starter.start
            self._keep(action.worker, lambda: start(action), model=action.model)

    def _end_worker(self, name: str) -> None:
        """It has nothing to do any more."""
        self._run(self._end_for_good(name), f"end {name}")

    async def _end_for_good(self, name: str) -> None:
        g = self._settings.gateway
        await self._keepers[name].stop(g.drain_s + g.kill_s, g.kill_s)
        del self._keepers[name]
        self._workforce.gone(name)

    async def _until_ready(self) -> bool:
        """True once all workers serve that are wanted and can; False if we stop before that."""
        while not self._stopping.is_set():
            if self._workforce.complete(but=self._verdicts):
                return True
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
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

    def _keep(
        self,
        name: str,
        start: Callable[[], Awaitable[Child]],
        child: Child | None = None,
        model: str | None = None,
    ) -> None:
        keeper = Keeper(name, start, self._liveness, self._on_end, self._rng, model)
        self._keepers[name] = keeper
        self._run(keeper.run(child), f"keep {name}")

    def _run(self, work: Coroutine[object, object, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._on_task_end)
        return task

    def _on_task_end(self, task: asyncio.Task[None]) -> None:
        """A task that failed keeps nothing alive any more: better to end, and be started again,
        than to serve less.
        """
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._stop(
                f"{task.get_name()}: "
                f"{error.message if isinstance(error, LoraplexError) else repr(error)}"
            )

    def _on_end(self, keeper: Keeper, health: ProcessHealth | None) -> None:
        """A process has ended that nobody told to. Gateways hear of a worker's end at once."""
        if keeper.model is not None:
            self._workforce.restarted(keeper.name, time.monotonic())
            if health is not None and health.epoch:
                self._liveness.tell(WorkerEnded(keeper.name, health.epoch, keeper.reason))
        self._judge()

    async def _watch(self) -> None:
        await self._liveness.watch(self._settings.gateway.hang_s, self._on_hang)

    def _on_hang(self, health: ProcessHealth) -> None:
        log.warning("process hangs, killing it", extra={"which": health.process})
        self._keepers[health.process].kill("it hung and was killed")

    def _judge(self) -> None:
        """A process has begun to serve, or ended: what does it mean for its model?"""
        found = verdicts(
            Trial(k.model, k.healthy, k.history.failures, k.reason)
            for k in self._keepers.values()
            if k.model is not None
        )
        for model in found.keys() - self._verdicts.keys():
            self._say(f"model {model} cannot start: {found[model]} (it is tried again)")
        self._verdicts = found
        self._liveness.tell(Verdicts(found))
        if not self._was_ready and found.keys() >= {m.model_id for m in self._settings.models}:
            self._stop("; ".join(f"{model} cannot start: {why}" for model, why in found.items()))

    # ---- stopping --------------------------------------------------------------------------------

    def _stop(self, failure: str | None) -> None:
        if self._stopping.is_set() and failure is None:
            for keeper in self._keepers.values():
                keeper.kill("Ctrl-C, again")  # the second one: at once
        self._failure = self._failure or failure
        self._stopping.set()

    async def _shut_down(self) -> None:
        """Gateways drain first, while their workers still answer; then the workers."""
        self._stopping.set()
        g = self._settings.gateway
        if any(keeper.child for keeper in self._keepers.values()):
            self._say("stopping (running requests may finish; Ctrl-C again to end at once) ...")
        for workers in (False, True):
            keepers = [k for k in self._keepers.values() if (k.model is not None) == workers]
            await asyncio.gather(*(k.stop(g.drain_s + g.kill_s, g.kill_s) for k in keepers))
        await self._starter.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def supervise(
    settings: Settings, say: Callable[[str], None], ready: Callable[[int, str | None], None]
) -> int:
    """`loraplex serve`, from its start to its end. Returns the exit status."""
    with temporary_folder() as run_dir:
        return await Supervisor(settings, run_dir, say).run(ready)
