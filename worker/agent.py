"""Shell. The centre of a worker. The agent composes the engine, the adapters, the requests and the
sessions with the gateways, and it leads the worker from its start to its end.

Everything that the requests yield in one turn of the event loop leaves as one message per gateway.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time

from shared.errors import EngineFailure, LoraplexError, OnTrial, WorkerUnavailable
from shared.link import messages
from shared.link.messages import WorkerState
from shared.runtime import garbage
from shared.stores import AdapterStore
from shared.supervision.client import report_to_supervisor
from shared.supervision.messages import Pulse
from worker.adapters.fetching import AdapterFetcher, FetchHint
from worker.adapters.load_times import LoadTimes
from worker.adapters.residency import Residency
from worker.adapters.residency_driver import ResidencyDriver
from worker.boot import boot
from worker.disk.cache import DiskCache
from worker.engine.base import Engine, EngineFacts
from worker.engine.watchdog import watch_engine
from worker.gateways import Gateways
from worker.heartbeat import HeartbeatSender, WorkerStatus
from worker.peers.client import Peers
from worker.probes import ProbedState, open_probes
from worker.requests.request_table import RequestTable
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
        self._suspect = ""  # why the engine is not trusted for now
        self._facts = EngineFacts("", 0, 0, 0, 0)  # until the engine has started
        self._requests = RequestTable(
            engine, self._on_request_end, self._on_engine_death, settings.keep_answers
        )
        self._heartbeats = HeartbeatSender(
            settings, gateways, self._status, cache.host, peer_endpoint
        )
        times = LoadTimes()
        self._adapters = ResidencyDriver(
            engine,
            AdapterFetcher(engine, store, cache, peers.sources, times),
            times,
            self._requests,
            self._heartbeats.send,
            self._on_engine_death,
        )
        self._numbers = itertools.count(1)
        self._stopping, self._idle = asyncio.Event(), asyncio.Event()
        # A worker that hangs right after it has begun to serve would else be given as long as one
        # that boots.
        self._news = asyncio.Event()
        self.exit_code = 0

    async def run(self) -> None:
        """Boots the engine while heartbeats say JOINING, serves, and returns once stopped."""
        self._gateways.open(self._on_message, self._on_silence)
        async with (
            open_probes(self._settings.probe_port, self._probed, self._told_to_drain),
            asyncio.TaskGroup() as tasks,
        ):
            self._adapters.tasks = self._requests.tasks = tasks
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
            self._adapters.cancel_loads()
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
            booted = await boot(self._engine, self._settings)
        except LoraplexError as exc:
            log.error("engine did not start: %s", exc.message)
            self.exit_code = 1
            self.stop(exc.message)
            return
        facts = self._facts = booted.facts
        residency = Residency(facts.slots, facts.host_places, lru=self._settings.lru)
        self._adapters.engine_started(residency, booted.check)
        self._engine.died(self._on_engine_death)
        if facts.slots and self._settings.warm_up_s:
            sessions, most_s = self._gateways, self._settings.warm_up_s
            await self._adapters.load_first(facts.slots, lambda: sessions, most_s)
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
                    session.outbox.send(messages.StoredCopy(answer_id, copy))
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

    @property
    def _serving(self) -> bool:
        return self._state is WorkerState.SERVING

    def _pulse(self) -> Pulse:
        return Pulse(self._serving, self._reason, self._engine.stage)

    def _probed(self) -> ProbedState:
        why = self._suspect or self._reason or self._state.name.lower()
        return ProbedState(
            self._state is not WorkerState.JOINING, self._serving and not self._suspect, why
        )

    def _told_to_drain(self) -> None:
        if not self._stopping.is_set():
            log.info("told to drain", extra={"by": "its probe port"})
            self.stop("told to drain")

    def _status(self) -> WorkerStatus:
        running = self._requests.running
        residency, times = self._adapters.residency, self._adapters.times
        return WorkerStatus(
            state=self._state,
            reason=self._reason,
            facts=self._facts,
            stats=self._engine.stats(),
            running=running,
            waiting=len(self._requests) - running,
            adapters=residency.states(clock(), times.load_s),
            times=times,
            loads=dict(residency.loads),
            evictions=dict(residency.evictions),
            suspect=self._suspect,
            warming=self._adapters.warming,
            engine_requests=self._requests.started,
            failed=bool(self.exit_code),
        )

    async def _tick_for_ever(self) -> None:
        while True:
            self._adapters.tick()
            self._cache.keep(self._adapters.residency.adapters())
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
        self._adapters.forget(session)

    def _on_message(self, session: GatewaySession, message: messages.GatewayData) -> None:
        match message:
            case messages.Generate():
                self._generate(session, message)
            case messages.Cancel(sid, over):
                self._requests.cancel(session, sid, over=over)
            case messages.FindAnswer():
                self._requests.find(session, message)
            case messages.WarmUp(adapters):
                self._adapters.warm_up(session, adapters, serving=self._serving)
            case messages.AdapterCommand():
                self._adapters.command(session, message, serving=self._serving)
            case messages.KnownDeaths():
                for other in self._gateways:
                    if other is not session:
                        other.outbox.send(message)
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
        if not self._serving or self._suspect:
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
        if not self._requests.admits(message):
            why = "The worker has another request that may kill workers."
            session.outbox.refuse(messages.Refused(message.sid, OnTrial.code, why, True))
            return
        number = next(self._numbers)
        self._requests.accept(number, session, message)
        if message.adapter is None:
            self._requests.start(number, None)
        else:
            hint = FetchHint(message.stored, message.peers)
            self._adapters.want(number, message.adapter, hint)

    # ---- when a request has ended ----------------------------------------------------------------

    def _on_request_end(self, number: int) -> None:
        self._adapters.finish(number)
        self._wake_if_idle()

    def _wake_if_idle(self) -> None:
        if self._stopping.is_set() and not len(self._requests):
            self._idle.set()
