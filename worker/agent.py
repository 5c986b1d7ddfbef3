"""Shell. The worker's middle: it composes the engine, the adapters, the requests and the gateways'
sessions, and acts on what residency says.

All that the requests of one turn of the event loop yield leaves as one message per gateway.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Coroutine
from typing import Any

from shared.adapters.checks import AdapterFacts
from shared.adapters.identity import AdapterRef
from shared.errors import EngineFailure, LoraplexError, WorkerUnavailable
from shared.link import messages
from shared.link.messages import WorkerState
from shared.stores import AdapterStore
from shared.supervision.client import report_to_supervisor
from shared.supervision.messages import Pulse
from worker.adapters.fetching import AdapterFetcher, FetchHint
from worker.adapters.load_times import LoadTimes
from worker.adapters.residency import (
    CommandDone,
    Failure,
    Fetch,
    Instruction,
    Reject,
    Residency,
    Start,
)
from worker.adapters.swapping import perform_swap
from worker.boot import Booted, boot
from worker.commands import CommandRunner
from worker.disk.cache import DiskCache
from worker.engine.base import Engine, EngineFacts, Swap
from worker.engine.watchdog import watch_engine
from worker.heartbeat import HeartbeatSender, WorkerStatus
from worker.peers.client import Peers
from worker.requests import RequestTable
from worker.session import GatewaySession
from worker.settings import WorkerSettings

log = logging.getLogger("loraplex.agent")
clock = time.monotonic

LAST_WORDS_S = 1.0
"""How long a worker that has drained waits for its gateways to have heard its last frames."""


class Agent:
    """Runs until it is told to stop and has drained, or until its engine dies."""

    def __init__(
        self,
        settings: WorkerSettings,
        engine: Engine,
        store: AdapterStore | None,
        cache: DiskCache,
        sessions: list[GatewaySession],
        peers: Peers,
        peer_endpoint: str = "",
    ) -> None:
        self._settings, self._engine, self._cache = settings, engine, cache
        self._sessions = sessions
        self._state, self._reason = WorkerState.JOINING, ""
        self._drain_s = settings.drain_s
        self._suspect = ""  # why the engine is not trusted for now
        # until the engine has started: it has no slots, and nothing is fetched
        self._booted = Booted(EngineFacts("", 0, 0, 0, 0), lambda _: AdapterFacts(0, 0, ()))
        self._residency = Residency(0)
        self._times = LoadTimes()
        self._fetcher = AdapterFetcher(engine, store, cache, peers.sources, self._times)
        self._hints: dict[AdapterRef, FetchHint] = {}  # of fetches that are about to begin
        self._commands = CommandRunner()
        self._requests = RequestTable(engine, self._on_request_end, self._on_engine_death)
        self._heartbeats = HeartbeatSender(
            settings, sessions, self._status, cache.host, peer_endpoint
        )
        self._numbers = itertools.count(1)
        self._stopping, self._idle = asyncio.Event(), asyncio.Event()
        self._tasks: asyncio.TaskGroup | None = None
        self._loads: set[asyncio.Task[None]] = set()  # fetches and swaps
        self.exit_code = 0

    async def run(self) -> None:
        """Boots the engine while heartbeats say JOINING, serves, and returns once stopped."""
        for session in self._sessions:
            session.open(self._on_message, self._on_silence)
        async with asyncio.TaskGroup() as tasks:
            self._tasks = self._requests.tasks = tasks
            heartbeats = tasks.create_task(self._heartbeats.run(), name="heartbeat")
            ticks = tasks.create_task(self._tick_for_ever(), name="residency ticks")
            pulses = tasks.create_task(
                report_to_supervisor(self._pulse, epoch=self._settings.epoch), name="pulses"
            )
            booting = tasks.create_task(self._boot(), name="boot and watch")
            await self._stopping.wait()
            await self._drain()
            booting.cancel()
            await self._say_last_words()
            self._become(WorkerState.STOPPED, self._reason or "stopped")
            heartbeats.cancel()
            ticks.cancel()
            pulses.cancel()
            # nobody waits for them, and an engine that died never answers them
            for load in self._loads:
                load.cancel()
        await self._engine.stop()
        for session in self._sessions:
            session.close()

    @property
    def reason(self) -> str:
        """Why it is in its state; after the end, why it ended."""
        return self._reason

    def stop(self, reason: str) -> None:
        """Drains, then ends. The second call ends at once."""
        if self._stopping.is_set():
            self._idle.set()
        self._reason = self._reason or reason
        self._requests.leaving = True
        self._stopping.set()

    # ---- life ------------------------------------------------------------------------------------

    async def _boot(self) -> None:
        """Boots the engine, then watches it."""
        try:
            self._booted = await boot(self._engine, self._settings)
        except LoraplexError as exc:
            log.error("engine did not start: %s", exc.message)
            self.exit_code = 1
            self.stop(exc.message)
            return
        facts = self._booted.facts
        self._residency = Residency(facts.slots, facts.host_places, lru=self._settings.lru)
        self._engine.died(self._on_engine_death)
        log.info(
            "serving",
            extra={
                "base": self._settings.base,
                "engine": facts.name,
                "slots": facts.slots,
                "capacity": facts.capacity,
            },
        )
        self._become(WorkerState.SERVING, "")
        await self._watch()

    async def _watch(self) -> None:
        settings = self._settings
        await watch_engine(
            self._engine,
            settings.engine_suspect_s,
            settings.engine_kill_s,
            self._on_suspect,
            self._on_hung,
        )

    def _on_suspect(self, reason: str) -> None:
        """The engine makes no progress (or does again, with no reason): gateways send nothing new,
        and what is here goes on elsewhere. If it was wrong, that has cost a move.
        """
        if self._stopping.is_set():
            return
        if not reason:
            log.info("engine makes progress again")
        else:
            log.warning("engine is suspect", extra={"reason": reason})
        self._suspect, self._requests.suspect = reason, bool(reason)
        self._heartbeats.send()
        if reason:
            self._requests.refuse_all(EngineFailure.code, reason)

    def _on_hung(self, reason: str) -> None:
        self._engine.broken()
        self._on_engine_death(f"it hangs: {reason}")

    def _on_engine_death(self, reason: str) -> None:
        """The one place where a dead engine is acted on, whoever noticed."""
        log.error("engine died: %s", reason)
        self.exit_code = 1
        self._reason = f"engine died: {reason}"
        self.stop(self._reason)
        self._requests.refuse_all(EngineFailure.code, "The engine of this worker died.")

    async def _drain(self) -> None:
        self._become(WorkerState.DRAINING, self._reason)
        self._wake_if_idle()
        try:
            async with asyncio.timeout(self._drain_s):
                await self._idle.wait()
        except TimeoutError:
            log.warning("drain timed out", extra={"requests": len(self._requests)})
        self._requests.refuse_all(WorkerUnavailable.code, "The worker shut down.")
        for session in self._sessions:
            session.outbox.flush()

    async def _say_last_words(self) -> None:
        """Every gateway hears of the end after the frames before it, if its link carries at all."""
        reason = self._reason or "stopped"
        try:
            async with asyncio.timeout(LAST_WORDS_S), asyncio.TaskGroup() as tasks:
                for session in self._sessions:
                    tasks.create_task(session.last_word(reason), name="last word")
        except TimeoutError:
            log.warning("a gateway did not confirm the last frames")

    def _become(self, state: WorkerState, reason: str) -> None:
        self._state, self._reason = state, reason
        self._heartbeats.send()

    def _pulse(self) -> Pulse:
        return Pulse(self._state is WorkerState.SERVING, self._reason)

    def _status(self) -> WorkerStatus:
        running = self._requests.running
        return WorkerStatus(
            state=self._state,
            reason=self._reason,
            facts=self._booted.facts,
            stats=self._engine.stats(),
            running=running,
            waiting=len(self._requests) - running,
            adapters=self._residency.states(clock(), self._times.load_s),
            times=self._times,
            loads=dict(self._residency.loads),
            evictions=dict(self._residency.evictions),
            suspect=self._suspect,
        )

    async def _tick_for_ever(self) -> None:
        while True:
            self._perform(self._residency.tick(clock()))
            self._cache.keep(self._residency.adapters())
            await asyncio.sleep(self._settings.heartbeat_s)

    # ---- from the gateways -----------------------------------------------------------------------

    def _on_silence(self, session: GatewaySession, reason: str) -> None:
        """The gateway is gone, or one of us stood still: its requests end here. It may have noticed
        nothing, so it is told of every one.
        """
        if count := len(self._requests.of(session)):
            log.warning(
                "gateway lost",
                extra={"gateway": session.endpoint, "reason": reason, "requests": count},
            )
        self._requests.refuse_all(
            WorkerUnavailable.code, f"The worker lost its gateway ({reason}).", session
        )
        for number in self._commands.forget(session):
            self._perform(self._residency.finish(number, clock()))

    def _on_message(self, session: GatewaySession, message: messages.GatewayData) -> None:
        match message:
            case messages.Generate():
                self._generate(session, message)
            case messages.Cancel(sid):
                self._requests.cancel(session, sid)
            case messages.Prefetch(adapter):
                self._prefetch(adapter)
            case messages.AdapterCommand():
                self._command(session, message)
            case messages.DrainWorker(wait_s, reason):
                if not self._stopping.is_set():
                    log.info("told to drain", extra={"by": session.endpoint, "reason": reason})
                    self._drain_s = wait_s
                    self.stop(reason)

    def _generate(self, session: GatewaySession, message: messages.Generate) -> None:
        if self._state is not WorkerState.SERVING or self._suspect:
            session.outbox.refuse(
                messages.Refused(
                    message.sid,
                    WorkerUnavailable.code,
                    self._suspect or "The worker is not serving.",
                    True,
                    self._stopping.is_set(),
                    bool(self._suspect),
                )
            )
            return
        number = next(self._numbers)
        self._requests.accept(number, session, message)
        if message.adapter is None:
            self._requests.start(number, None)
            return
        self._seek(message, message.adapter, self._residency.want(number, message.adapter, clock()))

    def _prefetch(self, adapter: AdapterRef) -> None:
        """Like a request that nobody made: it ends as soon as the adapter is in its slot."""
        slots = self._residency.slots
        if self._state is WorkerState.SERVING and len(slots) < slots.size:
            self._perform(self._residency.want(-next(self._numbers), adapter, clock()))

    def _command(self, session: GatewaySession, message: messages.AdapterCommand) -> None:
        number, serving = -next(self._numbers), self._state is WorkerState.SERVING
        self._seek(
            message,
            message.adapter,
            self._commands.begin(number, session, message, serving, self._residency, clock()),
        )

    def _seek(
        self,
        message: messages.Generate | messages.AdapterCommand,
        adapter: AdapterRef,
        instructions: list[Instruction],
    ) -> None:
        """Performs them. `message` says where the adapter's files are, should it have to be
        fetched.
        """
        if any(isinstance(instruction, Fetch) for instruction in instructions):
            self._hints[adapter] = FetchHint(message.stored, message.peers)
        self._perform(instructions)

    # ---- acting on instructions ------------------------------------------------------------------

    def _perform(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Fetch(adapter):
                    self._run_load(self._fetch(adapter), f"fetch {adapter}")
                case Swap():
                    self._run_load(self._swap(instruction), "swap")
                # a negative number is a command's or a prefetch's, not a request's
                case Start(number) | Reject(number) | CommandDone(number) if number < 0:
                    self._perform(self._commands.settle(instruction, self._residency, clock()))
                case Start(number, adapter, came_from):
                    self._requests.start(number, adapter, came_from)
                case Reject(number, code, message, retryable):
                    self._requests.refuse(number, code, message, retryable)
        if any(isinstance(instruction, Fetch | Swap) for instruction in instructions):
            self._heartbeats.send()  # gateways hear at once that residency has changed

    async def _fetch(self, ref: AdapterRef) -> None:
        hint = self._hints.pop(ref, FetchHint())
        try:
            fetched = await self._fetcher.fetch(ref, hint, self._booted.check)
            self._perform(self._residency.cached(ref, clock()))
            if ref not in self._residency.adapters():
                return  # nobody wants more than the files on disk
            loaded = await self._fetcher.prepare(ref, fetched)
        except EngineFailure as exc:
            self._on_engine_death(exc.message)
            return
        except LoraplexError as exc:
            log.warning(
                "adapter not fetched",
                extra={"adapter": str(ref), "code": exc.code, "reason": exc.message},
            )
            failure = Failure(exc.code, exc.message, exc.retryable)
            self._perform(self._residency.failed(ref, failure, clock()))
            self._heartbeats.send()
            return
        self._perform(self._residency.fetched(loaded, fetched.came_from, clock()))

    async def _swap(self, swap: Swap) -> None:
        try:
            failures = await perform_swap(
                self._engine, swap, self._residency.came_from, self._times
            )
        except EngineFailure as exc:
            self._on_engine_death(exc.message)
            return
        self._perform(self._residency.swapped(failures, clock()))
        self._heartbeats.send()

    def _run_load(self, work: Coroutine[Any, Any, None], name: str) -> None:
        assert self._tasks is not None
        task = self._tasks.create_task(work, name=name)
        self._loads.add(task)
        task.add_done_callback(self._loads.discard)

    # ---- when a request has ended ----------------------------------------------------------------

    def _on_request_end(self, number: int) -> None:
        self._perform(self._residency.finish(number, clock()))
        self._wake_if_idle()

    def _wake_if_idle(self) -> None:
        if self._stopping.is_set() and not len(self._requests):
            self._idle.set()
