"""Shell. The centre of a worker. The agent composes the engine, the adapters, the requests and the
sessions with the gateways, and it performs the instructions that residency gives.

Everything that the requests yield in one turn of the event loop leaves as one message per gateway.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Coroutine, Iterable
from typing import Any

from shared.adapters.checks import AdapterFacts
from shared.adapters.identity import AdapterRef
from shared.errors import EngineFailure, LoraplexError, WorkerUnavailable
from shared.link import messages
from shared.link.messages import WorkerState
from shared.runtime import garbage
from shared.stores import AdapterStore
from shared.supervision.client import report_to_supervisor
from shared.supervision.messages import Pulse
from worker.adapters.failures import Failure
from worker.adapters.fetching import AdapterFetcher, FetchHint
from worker.adapters.load_times import LoadTimes
from worker.adapters.residency import (
    CommandDone,
    Fetch,
    Instruction,
    Reject,
    Residency,
    Start,
)
from worker.adapters.swapping import perform_swap
from worker.boot import BootedEngine, boot
from worker.commands import CommandRunner
from worker.disk.cache import DiskCache
from worker.engine.base import Engine, EngineFacts, Swap
from worker.engine.watchdog import watch_engine
from worker.gateways import Gateways
from worker.heartbeat import HeartbeatSender, WorkerStatus
from worker.initial_adapters import InitialAdapters
from worker.peers.client import Peers
from worker.probes import ProbedState, open_probes
from worker.requests import RequestTable
from worker.session import GatewaySession
from worker.settings import WorkerSettings

log = logging.getLogger("loraplex.agent")
clock = time.monotonic

COLLECT_S = 10.0
"""Between two looks for garbage. The engine's modules are frozen, so little is left to look at."""
LAST_WORDS_S = 1.0
"""How long a drained worker waits until its gateways have received its last frames."""


class Agent:
    """One worker, from boot to end. It runs until it is told to stop and has drained, or until its
    engine dies. `exit_code` is 1 if the engine did not start or died, else 0.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        engine: Engine,
        store: AdapterStore | None,
        cache: DiskCache,
        gateways: Gateways,
        peers: Peers,
        peer_endpoint: str = "",
    ) -> None:
        self._settings, self._engine, self._cache = settings, engine, cache
        self._gateways = gateways
        self._state, self._reason = WorkerState.JOINING, ""
        self._drain_s = settings.drain_s
        self._initial_adapters = InitialAdapters(0, active=False)
        self._suspect = ""  # why the engine is not trusted for now
        # Placeholders until the engine has started: no slots, and nothing is fetched.
        self._booted = BootedEngine(EngineFacts("", 0, 0, 0, 0), lambda _: AdapterFacts(0, 0, ()))
        self._residency = Residency(0)
        self._times = LoadTimes()
        self._fetcher = AdapterFetcher(engine, store, cache, peers.sources, self._times)
        self._hints: dict[AdapterRef, FetchHint] = {}  # for fetches that have not begun yet
        self._commands = CommandRunner()
        self._requests = RequestTable(
            engine, self._on_request_end, self._on_engine_death, settings.keep_answers
        )
        self._heartbeats = HeartbeatSender(
            settings, gateways, self._status, cache.host, peer_endpoint
        )
        self._numbers = itertools.count(1)
        self._stopping, self._idle = asyncio.Event(), asyncio.Event()
        # A worker that hangs right after it has begun to serve would else be given as long as one
        # that boots.
        self._news = asyncio.Event()
        self._tasks: asyncio.TaskGroup | None = None
        self._loads: set[asyncio.Task[None]] = set()  # fetches and swaps
        self.exit_code = 0

    async def run(self) -> None:
        """Boots the engine while heartbeats say JOINING, serves, and returns once stopped."""
        self._gateways.open(self._on_message, self._on_silence)
        async with (
            open_probes(self._settings.probe_port, self._probed, self._told_to_drain),
            asyncio.TaskGroup() as tasks,
        ):
            self._tasks = self._requests.tasks = tasks
            following = tasks.create_task(self._gateways.follow(), name="gateways")
            heartbeats = tasks.create_task(self._heartbeats.run(), name="heartbeat")
            ticks = tasks.create_task(self._tick_for_ever(), name="residency ticks")
            pulses = tasks.create_task(
                report_to_supervisor(self._pulse, epoch=self._settings.epoch, news=self._news),
                name="pulses",
            )
            collecting = tasks.create_task(garbage.collect_for_ever(COLLECT_S), name="garbage")
            booting = tasks.create_task(self._boot(), name="boot and watch")
            await self._stopping.wait()
            await self._drain()
            booting.cancel()
            await self._hand_over()
            await self._send_last_frames()
            self._become(WorkerState.STOPPED, self._reason or "stopped")
            following.cancel()
            heartbeats.cancel()
            ticks.cancel()
            pulses.cancel()
            collecting.cancel()
            # No request waits for these loads any more, and a dead engine would never answer them.
            for load in self._loads:
                load.cancel()
        await self._engine.stop()
        self._gateways.close()

    @property
    def reason(self) -> str:
        """Why the worker is in its state. After the end: why it ended."""
        return self._reason

    def stop(self, reason: str) -> None:
        """Starts the drain, after which the worker ends. A second call ends the drain at once."""
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
        await self._load_first(facts.slots)
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

    async def _load_first(self, slots: int) -> None:
        """What gateways want loaded before the first request, in bounded time."""
        if not slots or not self._settings.warm_up_s:
            return
        self._initial_adapters = InitialAdapters(slots)
        self._heartbeats.send()
        took_s = await self._initial_adapters.wait(lambda: self._gateways, self._settings.warm_up_s)
        self._initial_adapters.active = False
        if count := len(self._initial_adapters.adapters):
            log.info("warmed up", extra={"adapters": count, "seconds": round(took_s, 2)})

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
        """The watchdog doubts the engine, or, with an empty reason, trusts it again. While it
        doubts, gateways send no new requests, and the open ones are given back to go on elsewhere.
        A false alarm costs no more than that move.
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
        """Acts on a dead engine, whoever noticed it. No other code does."""
        log.error("engine died: %s", reason)
        self.exit_code = 1
        self._reason = f"engine died: {reason}"
        self.stop(self._reason)
        self._requests.refuse_all(EngineFailure.code, "The engine of this worker died.")

    async def _drain(self) -> None:
        """Waits until no request is open, for at most the drain time. What is still open then is
        given back.
        """
        self._become(WorkerState.DRAINING, self._reason)
        self._wake_if_idle()
        try:
            async with asyncio.timeout(self._drain_s):
                await self._idle.wait()
        except TimeoutError:
            log.warning("drain timed out", extra={"requests": len(self._requests)})
        self._requests.refuse_all(WorkerUnavailable.code, "The worker shut down.")
        for session in self._gateways:
            session.outbox.flush()

    async def _hand_over(self) -> None:
        """Gives copies of the answers that are stored here to a gateway that is there, for other
        workers.
        """
        session = next((session for session in self._gateways if not session.silent), None)
        if session is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS_S):
                for answer_id, copy in self._engine.copies():
                    session.outbox.copy(messages.StoredCopy(answer_id, copy))
                    await session.room()

    async def _send_last_frames(self) -> None:
        """Tells every gateway that this worker has ended, after all frames. A gateway whose link
        carries nothing is not waited for longer than LAST_WORDS_S.
        """
        reason = self._reason or "stopped"
        try:
            async with asyncio.timeout(LAST_WORDS_S), asyncio.TaskGroup() as tasks:
                for session in self._gateways:
                    tasks.create_task(session.last_word(reason), name="last word")
        except TimeoutError:
            log.warning("a gateway did not confirm the last frames")

    def _become(self, state: WorkerState, reason: str) -> None:
        self._state, self._reason = state, reason
        self._news.set()
        self._heartbeats.send()

    def _pulse(self) -> Pulse:
        return Pulse(self._state is WorkerState.SERVING, self._reason, self._engine.stage)

    def _probed(self) -> ProbedState:
        serving = self._state is WorkerState.SERVING
        why = self._suspect or self._reason or self._state.name.lower()
        return ProbedState(
            self._state is not WorkerState.JOINING, serving and not self._suspect, why
        )

    def _told_to_drain(self) -> None:
        if not self._stopping.is_set():
            log.info("told to drain", extra={"by": "its probe port"})
            self.stop("told to drain")

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
            warming=self._initial_adapters.active,
            engine_requests=self._requests.started,
            failed=bool(self.exit_code),
        )

    async def _tick_for_ever(self) -> None:
        while True:
            self._perform(self._residency.tick(clock()))
            self._cache.keep(self._residency.adapters())
            self._requests.expire(clock())
            await asyncio.sleep(self._settings.heartbeat_s)

    # ---- from the gateways -----------------------------------------------------------------------

    def _on_silence(self, session: GatewaySession, reason: str) -> None:
        """The gateway is gone, or this process or the gateway stood still. All requests of that
        gateway end here. The gateway may have noticed nothing, so it gets a refusal for each of
        them.
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
            case messages.Cancel(sid, over):
                self._requests.cancel(session, sid, over=over)
            case messages.FindAnswer():
                self._requests.find(session, message)
            case messages.WarmUp(adapters):
                self._warm_up(session, adapters)
            case messages.AdapterCommand():
                self._command(session, message)
            case messages.KeepCopy(answer_id, data):
                self._engine.keep_copy(answer_id, data)
            case messages.DrainWorker(wait_s, reason):
                if not self._stopping.is_set():
                    log.info("told to drain", extra={"by": session.endpoint, "reason": reason})
                    self._drain_s = wait_s
                    self.stop(reason)

    def _generate(self, session: GatewaySession, message: messages.Generate) -> None:
        if message.key is not None and self._requests.join(session, message):
            return
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

    def _warm_up(self, session: GatewaySession, adapters: Iterable[AdapterRef]) -> None:
        """Loads adapters for which no request has come yet. They take empty slots only."""
        for adapter in self._initial_adapters.receive(session, adapters):
            slots = self._residency.slots
            if self._initial_adapters.active or (
                self._state is WorkerState.SERVING and len(slots) < slots.size
            ):
                number = -next(self._numbers)
                self._initial_adapters.begun(number)
                self._perform(self._residency.want(number, adapter, clock()))

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
        """Performs the instructions. If one of them is a fetch, it uses the adapter's files and
        peers that `message` names.
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
                # commands and early loads have negative numbers, requests positive ones
                case Start(number) | Reject(number) | CommandDone(number) if number < 0:
                    self._initial_adapters.settled(number)
                    self._perform(self._commands.settle(instruction, self._residency, clock()))
                case Start(number, adapter, came_from, slot_wait_s):
                    self._requests.start(number, adapter, came_from, slot_wait_s)
                case Reject(number, code, message, retryable):
                    self._requests.refuse(number, code, message, retryable)
        if any(isinstance(instruction, Fetch | Swap) for instruction in instructions):
            self._heartbeats.send()  # tell the gateways at once that residency has changed

    async def _fetch(self, ref: AdapterRef) -> None:
        hint = self._hints.pop(ref, FetchHint())
        try:
            ahead = ref in self._residency.adapters()
            fetched = await self._fetcher.fetch(ref, hint, self._booted.check, ahead=ahead)
            self._perform(self._residency.cached(ref, clock()))
            if ref not in self._residency.adapters():
                self._fetcher.leave(fetched)
                return  # only the files on disk were wanted
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
