"""Shell. `loraplex serve`: runs everything on one machine. It starts gateway and worker processes,
restarts those that end or hang, and stops them in order.

It imports nothing of the workers. On CPU hosts, a zygote forks the workers. Each process has a
SupervisedProcess of its own, so the failures of one model's workers affect no other model.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from random import Random

import aiohttp
import msgspec

from gateway.supervisor.autoscaling.actuator import (
    ScalingActuator,
    check_gpus,
    configure,
    make_worker_set,
)
from gateway.supervisor.autoscaling.worker_set import StartWorker
from gateway.supervisor.health import ProcessHealth, WorkerHealth, models_that_cannot_start
from gateway.supervisor.liveness import Liveness
from gateway.supervisor.port_check import check_address
from gateway.supervisor.start_progress import (
    IMPORTING,
    QUIET_S,
    Starting,
    StartProgress,
    StartTimes,
)
from gateway.supervisor.supervised_process import SupervisedProcess
from gateway.supervisor.worker_starter import WorkerStarter
from loraplex.start import command
from shared.config.llm import Settings
from shared.config.reload import ReloadPlan, plan
from shared.config.settings_file import FollowedConfig, write_settings
from shared.errors import ConfigError, LoraplexError
from shared.runtime import children
from shared.runtime.children import Child
from shared.runtime.owned_folder import temporary_folder
from shared.runtime.process import on_reload_signal, on_stop_signals, visible_gpus
from shared.runtime.shared_memory import SUFFIX, remove_segments
from shared.runtime.state_file import StateFile
from shared.supervision.client import environment
from shared.supervision.messages import CannotStart, ConfigRefused, WorkerEnded

log = logging.getLogger("loraplex.serve")

START_S = 30.0  # a gateway process has this long to begin to listen
LOOK_S = 0.1  # between two checks whether all workers serve


class Supervisor:
    """One run of `loraplex serve`. `say` prints a line for the person at the terminal."""

    def __init__(
        self, settings: Settings, config: FollowedConfig, run_dir: Path, say: Callable[[str], None]
    ) -> None:
        self._settings, self._source = settings, config
        self._run_dir = run_dir
        self._config = write_settings(settings, run_dir)
        self._say = say
        self._stopping = asyncio.Event()
        self._liveness = Liveness(run_dir / "serve.sock", self._judge)
        self._starter = WorkerStarter(settings, self._config, self._liveness.socket)
        self._devices = visible_gpus()
        self._worker_set = make_worker_set(settings, self._devices)
        self._processes: dict[str, SupervisedProcess] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._cannot_start: dict[str, str] = {}
        self._failure: str | None = None
        self._was_ready = False
        self._rng = Random()
        state_dir = Path(settings.gateway.state_dir).expanduser()
        self._times = StateFile(state_dir / "start-times.json", StartTimes)
        self.port = 0

    async def run(self, ready: Callable[[int, str | None], None]) -> int:
        """Serves until a signal comes, or a failure that no retry can mend. Returns the exit
        status.

        `ready(port, model)` is called once all workers serve, except those of models that cannot
        start. `model` is the name of some adapter in the store, or None if there is none to show.
        """
        on_stop_signals(lambda sig: self._stop(None), self._end_at_once)
        on_reload_signal(self._source.ask)
        scaling = ScalingActuator(
            self._worker_set, self._run_dir, self._start_worker, self._end_worker
        )
        loops: list[asyncio.Task[None]] = []
        async with self._liveness.open(), scaling.open():
            try:
                check_address(self._settings.gateway)
                self._say("starting the gateway ...")
                loops += [self._run(self._watch(), "watch")]
                await self._start_gateways()
                self._say_what_starts()
                loops += [self._run(scaling.run(), "scaling")]
                loops += [self._run(self._follow_config(), "config")]
                if await self._until_ready():
                    self._was_ready = True
                    ready(self.port, await self._adapter())
                await self._stopping.wait()
            except LoraplexError as exc:
                if not self._stopping.is_set():
                    self._failure = exc.message
            finally:
                for loop in loops:
                    loop.cancel()
                await self._shut_down()
        if self._failure:
            # the one message a person must see
            print(f"loraplex serve: {self._failure}", file=sys.stderr)  # noqa: T201
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
            self._supervise(name, functools.partial(children.start, argv, env), child)
        self._say(f"gateway listens on {self._settings.gateway.host}:{self.port}")

    def _pin_port(self) -> None:
        """Writes the port into the settings that all processes read. If port 0 was configured,
        restarted gateways and further processes then take the same real port.
        """
        if self._settings.gateway.port == self.port:
            return  # gateways would read the same file again
        gateway = msgspec.structs.replace(self._settings.gateway, port=self.port)
        self._settings = msgspec.structs.replace(self._settings, gateway=gateway)
        write_settings(self._settings, self._run_dir)

    async def _until(self, condition: Callable[[], bool], child: Child, what: str) -> None:
        ended = asyncio.ensure_future(child.wait())
        began = said_at = time.monotonic()
        end = began + START_S
        while not condition():
            if self._stopping.is_set():
                await children.end(child, 0, self._settings.gateway.kill_s)
                raise ConfigError(f"{what} was stopped while it started")
            now = time.monotonic()
            if now - said_at > QUIET_S:
                said_at = now
                self._say(f"{what} is starting; {now - began:.0f} s so far")
            if ended.done():
                raise ConfigError(
                    f"{what} did not start (status {ended.result()}; its message is above)"
                )
            if now > end:
                await children.end(child, 0, self._settings.gateway.kill_s)
                raise ConfigError(f"{what} did not start within {START_S:g} s")
            await asyncio.wait([ended], timeout=0.05)
        ended.cancel()

    def _say_what_starts(self) -> None:
        first = sum(m.workers for m in self._settings.models)
        if first:
            self._say(f"starting {first} worker{'s' if first > 1 else ''} ...")

    async def _start_worker(self, action: StartWorker) -> None:
        """Starts a worker, and restarts it until it is told to end."""
        if not self._stopping.is_set():
            start = self._starter.start
            self._supervise(action.worker, lambda: start(action), model=action.model)

    def _end_worker(self, name: str) -> None:
        """Ends a worker that has no requests left."""
        self._run(self._end_for_good(name), f"end {name}")

    async def _end_for_good(self, name: str) -> None:
        g = self._settings.gateway
        await self._processes[name].stop(g.drain_s + g.kill_s, g.kill_s)
        del self._processes[name]
        self._worker_set.gone(name)

    async def _until_ready(self) -> bool:
        """True once all wanted workers serve, except those of models that cannot start. False if
        the supervisor stops before that.
        """
        times = self._times
        models = " ".join(m.model_id for m in self._settings.models)
        began = time.monotonic()
        progress = StartProgress(began, _usual_s(times, models))
        while not self._stopping.is_set():
            if self._worker_set.complete(but=self._cannot_start):
                _note(times, models, time.monotonic() - began)
                return True
            if (said := progress.line(self._starting(), time.monotonic())) is not None:
                self._say(said)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._stopping.wait()
        return False

    def _starting(self) -> list[Starting]:
        """The workers that do not serve yet."""
        imports = {
            m.model_id: "starting" if m.llm_engine == "sim" else IMPORTING
            for m in self._settings.models
        }
        return [
            Starting(k.name, (k.health.stage if k.health is not None else "") or imports[k.model])
            for k in self._processes.values()
            if k.model is not None and not k.healthy
        ]

    async def _adapter(self) -> str | None:
        """The name of an adapter for the example that is shown at the start. None: there is no
        adapter, or the gateway asks for a key.
        """
        host = self._settings.gateway.host.replace("0.0.0.0", "127.0.0.1").replace("::", "[::1]")
        url = f"http://{host}:{self.port}/v1/models"
        try:
            async with aiohttp.ClientSession() as client, client.get(url) as answer:
                if answer.status != 200:
                    return None
                models = (await answer.json())["data"]
                return next((m["id"] for m in models if m["parent"]), None)
        except aiohttp.ClientError:  # it speaks TLS, say
            return None

    # ---- keeping alive ---------------------------------------------------------------------------

    def _supervise(
        self,
        name: str,
        start: Callable[[], Awaitable[Child]],
        child: Child | None = None,
        model: str | None = None,
    ) -> None:
        process = SupervisedProcess(name, start, self._liveness, self._on_end, self._rng, model)
        self._processes[name] = process
        self._run(process.run(child), f"keep {name}")

    def _run(self, work: Coroutine[object, object, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._on_task_end)
        return task

    def _on_task_end(self, task: asyncio.Task[None]) -> None:
        """A task that failed no longer watches its process. So the whole supervisor ends, and its
        own supervisor (systemd, Kubernetes) restarts it. The alternative would be to serve less
        without a word.
        """
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._stop(
                f"{task.get_name()}: "
                f"{error.message if isinstance(error, LoraplexError) else repr(error)}"
            )

    def _on_end(self, process: SupervisedProcess, health: ProcessHealth | None) -> None:
        """A process has ended that nobody told to end. Gateways hear at once of a worker's end."""
        remove_segments(self._run_dir / f"{process.name}{SUFFIX}")
        if process.model is not None:
            self._worker_set.restarted(process.name, time.monotonic())
            if health is not None and health.epoch:
                self._liveness.tell(
                    WorkerEnded(process.name, health.epoch, process.reason, process.killed)
                )
        self._judge()

    async def _watch(self) -> None:
        await self._liveness.watch(self._settings.gateway.hang_s, self._on_hang)

    def _on_hang(self, health: ProcessHealth) -> None:
        log.warning("process hangs, killing it", extra={"which": health.process})
        self._processes[health.process].kill("it hung and was killed")

    def _judge(self) -> None:
        """Called when a process begins to serve, or ends. Works out which models cannot start, and
        tells the gateways.
        """
        found = models_that_cannot_start(
            WorkerHealth(k.model, k.healthy, k.history.failed_starts, k.reason)
            for k in self._processes.values()
            if k.model is not None
        )
        for model in found.keys() - self._cannot_start.keys():
            self._say(f"model {model} cannot start: {found[model]} (it is tried again)")
        self._cannot_start = found
        self._liveness.tell(CannotStart(found))
        if not self._was_ready and found.keys() >= {m.model_id for m in self._settings.models}:
            self._stop("; ".join(f"{model} cannot start: {why}" for model, why in found.items()))

    # ---- another config --------------------------------------------------------------------------

    async def _follow_config(self) -> None:
        """Reads it for all processes: gateways follow the file that is written for them."""
        async for found in self._source.changes():
            try:
                if isinstance(found, ConfigError):
                    raise found
                self._take(plan(self._settings, found))
            except ConfigError as exc:
                log.error(
                    "config not read again; the one before stays in force",
                    extra={"why": exc.message},
                )
                self._liveness.tell(ConfigRefused(exc.message))

    def _take(self, planned: ReloadPlan) -> None:
        """Raises ConfigError, with nothing changed, for what this machine cannot do."""
        if self._devices:
            check_gpus(planned.settings, len(self._devices))
        try:
            write_settings(planned.settings, self._run_dir)
        except ConfigError:
            self._source.retry()
            raise
        self._settings = planned.settings
        self._starter.configure(self._settings)
        configure(self._worker_set, self._settings)
        logging.getLogger("loraplex").setLevel(self._settings.gateway.log_level.upper())
        log.info("config read again", extra={"changed": ", ".join(planned.changed) or "nothing"})
        if planned.need_restart:
            log.warning(
                "changes that take effect with the next start",
                extra={"keys": ", ".join(planned.need_restart)},
            )

    # ---- stopping --------------------------------------------------------------------------------

    def _stop(self, failure: str | None) -> None:
        self._failure = self._failure or failure
        self._stopping.set()
        self._starter.give_up()

    def _end_at_once(self) -> None:
        for process in self._processes.values():
            process.kill("Ctrl-C, again")

    async def _shut_down(self) -> None:
        """The gateways drain first, while their workers still answer. Then the workers end."""
        self._stopping.set()
        self._starter.give_up()
        g = self._settings.gateway
        if any(process.child for process in self._processes.values()):
            self._say("stopping (running requests may finish; Ctrl-C again to end at once) ...")
        for workers in (False, True):
            processes = [k for k in self._processes.values() if (k.model is not None) == workers]
            await asyncio.gather(*(k.stop(g.drain_s + g.kill_s, g.kill_s) for k in processes))
        await self._starter.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _usual_s(times: StateFile[StartTimes], models: str) -> float:
    with contextlib.suppress(LoraplexError, OSError):
        return times.read().start_s.get(models, 0.0)
    return 0.0


def _note(times: StateFile[StartTimes], models: str, took_s: float) -> None:
    """Of this configuration alone; it is no harm if it cannot be kept."""
    with contextlib.suppress(LoraplexError, OSError):
        times.update(lambda _: StartTimes({models: round(took_s, 1)}))


async def supervise(
    settings: Settings,
    config: FollowedConfig,
    say: Callable[[str], None],
    ready: Callable[[int, str | None], None],
) -> int:
    """`loraplex serve` from its start to its end. Returns the exit status."""
    with temporary_folder() as run_dir:
        return await Supervisor(settings, config, run_dir, say).run(ready)
