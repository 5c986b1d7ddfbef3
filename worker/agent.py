"""Shell. The worker's middle: takes requests from every gateway, acts on what residency says,
streams answers back, and beats.

One task per request runs the engine; all that the requests of one turn of the loop yield leaves as
one message per gateway.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Coroutine
from dataclasses import asdict, dataclass
from typing import Any

from shared.adapters.checks import AdapterFacts
from shared.adapters.identity import AdapterRef, StoredAdapter
from shared.averages import blend
from shared.errors import AdapterNotFound, EngineFailure, LoraplexError, WorkerUnavailable
from shared.link import messages
from shared.stores import AdapterStore
from worker.adapters.residency import (
    CommandDone,
    Failure,
    Fetch,
    Instruction,
    Reject,
    Residency,
    Start,
)
from worker.commands import CommandRunner
from worker.disk.cache import Cached, Check, DiskCache
from worker.engine.base import Engine, EngineFacts, EngineRequest, Loaded, Swap
from worker.peers.client import Peers
from worker.session import GatewaySession
from worker.settings import WorkerSettings
from worker.validation.factory import open_validator

log = logging.getLogger("loraplex.agent")
clock = time.monotonic

LOAD_WEIGHT = 0.3  # of the newest load in the moving average
GATEWAY_SILENCE_S = 3.0  # floor of how long a gateway may be silent before its requests are dropped


@dataclass(slots=True)
class Job:
    """One request on this worker, from its arrival to its end."""

    number: int
    session: GatewaySession
    message: messages.Generate
    arrived: float
    task: asyncio.Task[None] | None = None
    started: float = 0.0
    came_from: messages.Tier = messages.Tier.GPU


class StreamReply:
    """Puts one stream's frames into its gateway's outbox; the facts of the request travel with the
    last one.
    """

    __slots__ = ("_job", "_outbox", "_sid", "begun", "output_tokens", "prompt_tokens")

    def __init__(self, job: Job) -> None:
        self._job, self._outbox, self._sid = job, job.session.outbox, job.message.sid
        self.prompt_tokens = self.output_tokens = 0
        self.begun = False

    def head(self, status: int, sse: bool, data: bytes, end: bool) -> None:
        self.begun = True
        self._outbox.frame(
            self._sid,
            status << messages.STATUS_SHIFT
            | (messages.SSE if sse else 0)
            | (messages.END if end else 0),
            data,
        )
        if end:
            self._end()

    def more(self, data: bytes, end: bool) -> None:
        self._outbox.frame(self._sid, messages.END if end else 0, data)
        if end:
            self._end()

    def _end(self) -> None:
        wait_s = self._job.started - self._job.arrived
        load_s = wait_s if self._job.came_from is not messages.Tier.GPU else 0.0
        self._outbox.done(
            messages.Done(
                self._sid,
                self.prompt_tokens,
                self.output_tokens,
                wait_s,
                load_s,
                self._job.came_from,
            )
        )


class Agent:
    """Runs until it is told to stop and has drained, or its engine dies."""

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
        self._settings = settings
        self._engine = engine
        self._store = store
        self._cache = cache
        self._sessions = sessions
        self._peers, self._peer_endpoint = peers, peer_endpoint
        self._state = messages.WorkerState.JOINING
        self._reason = ""
        self._facts = EngineFacts("", 0, 0, 0, 0)
        self._residency = Residency(0)
        self._commands = CommandRunner()
        self._jobs: dict[int, Job] = {}
        self._by_stream: dict[tuple[GatewaySession, messages.StreamId], Job] = {}
        self._numbers = itertools.count(1)
        self._int_ids = itertools.count(1)
        # of fetches that are about to begin
        self._offers: dict[AdapterRef, tuple[StoredAdapter | None, tuple[str, ...]]] = {}
        # until the engine has started; nothing is fetched before
        self._check: Check = lambda _: AdapterFacts(0, 0, ())
        self._prepare_s = self._stall_s = self._fetch_s = self._load_bytes = 0.0
        self._stopping = asyncio.Event()
        self._idle = asyncio.Event()
        self._tasks: asyncio.TaskGroup | None = None
        self._errands: set[asyncio.Task[None]] = set()  # fetches and swaps
        self.exit_code = 0

    async def run(self) -> None:
        """Boots the engine while it beats as JOINING, serves, and returns once stopped."""
        for session in self._sessions:
            session.open(self._on_request, self._on_silence)
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            beating = tasks.create_task(self._beat_for_ever(), name="beat")
            boot = tasks.create_task(self._boot(), name="boot")
            await self._stopping.wait()
            await self._drain()
            boot.cancel()
            self._become(messages.WorkerState.STOPPED, self._reason or "stopped")
            beating.cancel()
            # nobody waits for them; what was asked of an engine that died is never answered
            for errand in self._errands:
                errand.cancel()
        await self._engine.stop()
        for session in self._sessions:
            session.close()

    def stop(self, reason: str) -> None:
        """Drains, then ends. The second call ends at once."""
        if self._stopping.is_set():
            self._idle.set()
        self._reason = self._reason or reason
        self._stopping.set()

    # ---- life ------------------------------------------------------------------------------------

    async def _boot(self) -> None:
        try:
            self._facts = await self._engine.start()
            self._check = (
                await asyncio.to_thread(
                    open_validator, self._settings.model, self._facts.max_lora_rank
                )
            ).check
        except LoraplexError as exc:
            log.error("engine did not start: %s", exc.message)
            self.exit_code = 1
            self.stop(exc.message)
            return
        self._residency = Residency(self._facts.slots, self._facts.host_places)
        self._engine.died(self._on_engine_death)
        log.info(
            "serving",
            extra={
                "base": self._settings.base,
                "engine": self._facts.name,
                "slots": self._facts.slots,
                "capacity": self._facts.capacity,
            },
        )
        self._become(messages.WorkerState.SERVING, "")

    def _on_engine_death(self, reason: str) -> None:
        log.error("engine died: %s", reason)
        self.exit_code = 1
        self._reason = f"engine died: {reason}"
        self.stop(self._reason)
        for job in list(self._jobs.values()):
            self._refuse(job, EngineFailure.code, "The engine of this worker died.", True)

    async def _drain(self) -> None:
        self._become(messages.WorkerState.DRAINING, self._reason)
        self._wake_if_idle()
        try:
            async with asyncio.timeout(self._settings.drain_s):
                await self._idle.wait()
        except TimeoutError:
            log.warning("drain timed out", extra={"requests": len(self._jobs)})
        for job in list(self._jobs.values()):
            self._refuse(job, "worker_unavailable", "The worker shut down.", True)
        for session in self._sessions:
            session.outbox.flush()

    def _become(self, state: messages.WorkerState, reason: str) -> None:
        self._state, self._reason = state, reason
        self._beat()

    async def _beat_for_ever(self) -> None:
        while True:
            self._beat()
            self._perform(self._residency.tick(clock()))
            self._cache.keep(self._residency.adapters())
            await asyncio.sleep(self._settings.heartbeat_s)

    def _beat(self) -> None:
        """A full snapshot to every gateway."""
        now = clock()
        stats = self._engine.stats()
        load_s = self._prepare_s + self._stall_s
        adapters = self._residency.states(now, load_s)
        for session in self._sessions:
            session.beat(
                messages.Heartbeat(
                    worker=self._settings.worker,
                    epoch=self._settings.epoch,
                    seq=session.next_seq(),
                    base=self._settings.base,
                    state=self._state,
                    capacity=min(
                        self._settings.model.deployment_config.max_ongoing_requests,
                        self._facts.capacity,
                    ),
                    slots=self._facts.slots,
                    running=sum(j.task is not None for j in self._jobs.values()),
                    waiting=sum(j.task is None for j in self._jobs.values()),
                    yours=session.open_requests,
                    acked=session.last_sid,
                    waiting_tokens=stats.waiting_tokens,
                    kv_usage=stats.kv_usage,
                    adapters=adapters,
                    prefill_tokens_per_s=stats.prefill_tokens_per_s,
                    step_s=stats.step_s,
                    load_s=load_s,
                    stall_s=self._stall_s,
                    load_bytes=round(self._load_bytes),
                    reason=self._reason,
                    fetch_s=self._fetch_s,
                    host=self._cache.host,
                    peer_endpoint=self._peer_endpoint,
                )
            )

    # ---- from the gateways -----------------------------------------------------------------------

    def _on_silence(self, session: GatewaySession, reason: str) -> None:
        """The gateway is gone, or one of us stood still: its requests end here. It may have noticed
        nothing, so it is told of every one.
        """
        mine = [j for j in self._jobs.values() if j.session is session]
        if mine:
            log.warning(
                "gateway lost",
                extra={"gateway": session.endpoint, "reason": reason, "requests": len(mine)},
            )
        for job in mine:
            self._refuse(
                job, WorkerUnavailable.code, f"The worker lost its gateway ({reason}).", True
            )
        for number in self._commands.forget(session):
            self._perform(self._residency.finish(number, clock()))

    def _on_request(self, session: GatewaySession, message: messages.GatewayData) -> None:
        if isinstance(message, messages.Cancel):
            job = self._by_stream.get((session, message.sid))
            if job is not None:
                self._cancel(job)
            return
        if isinstance(message, messages.Prefetch):
            self._prefetch(message.adapter)
            return
        if isinstance(message, messages.AdapterCommand):
            self._tend(session, message)
            return
        if self._state is not messages.WorkerState.SERVING:
            session.outbox.refuse(
                messages.Refused(
                    message.sid,
                    "worker_unavailable",
                    "The worker is not serving.",
                    True,
                    self._stopping.is_set(),
                )
            )
            return
        job = Job(next(self._numbers), session, message, clock())
        self._jobs[job.number] = job
        self._by_stream[session, message.sid] = job
        session.open_requests += 1
        if message.adapter is None:
            self._start(job, None)
            return
        self._seek(
            message, message.adapter, self._residency.want(job.number, message.adapter, clock())
        )

    def _seek(
        self,
        message: messages.Generate | messages.AdapterCommand,
        adapter: AdapterRef,
        instructions: list[Instruction],
    ) -> None:
        """Acts on them; `message` says where the adapter's files are, should it have to be
        fetched.
        """
        if any(isinstance(instruction, Fetch) for instruction in instructions):
            self._offers[adapter] = message.stored, message.peers
        self._perform(instructions)

    def _prefetch(self, adapter: AdapterRef) -> None:
        """A request of nobody's: it ends as soon as the adapter is in its slot."""
        slots = self._residency.slots
        if self._state is messages.WorkerState.SERVING and len(slots) < slots.size:
            self._perform(self._residency.want(-next(self._numbers), adapter, clock()))

    def _tend(self, session: GatewaySession, message: messages.AdapterCommand) -> None:
        number, serving = -next(self._numbers), self._state is messages.WorkerState.SERVING
        self._seek(
            message,
            message.adapter,
            self._commands.begin(number, session, message, serving, self._residency, clock()),
        )

    def _cancel(self, job: Job) -> None:
        if job.task is not None:
            job.task.cancel()
        else:
            self._forget(job)

    # ---- acting on instructions ------------------------------------------------------------------

    def _perform(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Fetch(adapter):
                    self._run_errand(self._fetch(adapter), f"fetch {adapter}")
                case Swap():
                    self._run_errand(self._swap(instruction), "swap")
                # of nobody's request
                case Start(number) | Reject(number) | CommandDone(number) if number < 0:
                    self._perform(self._commands.settle(instruction, self._residency, clock()))
                case Start(number, adapter, came_from):
                    job = self._jobs[number]
                    job.came_from = came_from
                    self._start(job, adapter)
                case Reject(number, code, message, retryable):
                    self._refuse(self._jobs[number], code, message, retryable)
        if any(isinstance(instruction, Fetch | Swap) for instruction in instructions):
            self._beat()  # residency is news; gateways hear of it at once

    async def _fetch(self, ref: AdapterRef) -> None:
        stored, endpoints = self._offers.pop(ref, (None, ()))
        came_from = messages.Tier.DISK
        try:
            start = clock()
            # whatever the store does, what is here is served
            cached = await self._cache.open(ref, self._check)
            check_s = clock() - start
            if cached is None:
                came_from, check_s = messages.Tier.REMOTE, 0.0  # it is checked as it comes
                start = clock()
                stored = stored or await self._look_up(ref)
                assert self._store is not None
                found_s = clock() - start
                peers = self._peers.sources(ref, endpoints)
                cached = await self._cache.fetch(ref, stored, self._store, self._check, peers)
                self._note_fetch(ref, cached, found_s)
            self._perform(self._residency.cached(ref, clock()))
            if ref not in self._residency.adapters():
                return  # nobody wants more than the files
            loaded = Loaded(
                ref, next(self._int_ids), cached.folder, cached.facts.rank, cached.size_bytes
            )
            start = clock()
            await self._engine.prepare(loaded)
            prepare_s = clock() - start
            if came_from is messages.Tier.DISK or not self._prepare_s:
                self._prepare_s = blend(self._prepare_s, check_s + prepare_s, LOAD_WEIGHT)
            in_ms = {"ms": round(prepare_s * 1e3, 1), "check_ms": round(check_s * 1e3, 1)}
            log.info(
                "adapter prepared", extra={"adapter": str(ref), "bytes": cached.size_bytes, **in_ms}
            )
        except EngineFailure as exc:
            self._on_engine_death(exc.message)
            return
        except LoraplexError as exc:
            log.warning(
                "adapter not fetched",
                extra={"adapter": str(ref), "code": exc.code, "reason": exc.message},
            )
            self._perform(
                self._residency.failed(ref, Failure(exc.code, exc.message, exc.retryable), clock())
            )
            self._beat()
            return
        self._perform(self._residency.fetched(loaded, came_from, clock()))

    def _note_fetch(self, ref: AdapterRef, cached: Cached, found_s: float) -> None:
        took = {"find_s": found_s, **asdict(cached.times)}
        in_ms = {
            key.removesuffix("_s") + "_ms": round(seconds * 1e3, 1) for key, seconds in took.items()
        }
        sources = {"peer": cached.peer_bytes > 0, "store": cached.times.download_s > 0}
        # another worker of this host brought it
        origin = "+".join(name for name, had_part in sources.items() if had_part) or "host"
        log.info(
            "adapter fetched",
            extra={
                "adapter": str(ref),
                "from": origin,
                "bytes": cached.size_bytes,
                "peer_bytes": cached.peer_bytes,
                **in_ms,
            },
        )
        if origin == "store":
            self._fetch_s = blend(
                self._fetch_s, sum(took.values()) - cached.times.wait_s, LOAD_WEIGHT
            )

    async def _look_up(self, ref: AdapterRef) -> StoredAdapter:
        """The gateway thought that the adapter was here and sent no files: ask the store."""
        stored = await self._store.find(ref.name) if self._store is not None else None
        if stored is None or stored.digest != ref.digest:
            raise AdapterNotFound(
                f"The adapter `{ref.name}` of model `{ref.base}` is gone or has changed.",
                param="model",
            )
        return stored

    async def _swap(self, swap: Swap) -> None:
        start = clock()
        try:
            done = await self._engine.swap(swap)
        except EngineFailure as exc:
            self._on_engine_death(exc.message)
            return
        took_ms, stall_ms = round((clock() - start) * 1e3, 1), round(done.stall_s * 1e3, 1)
        if swap.enter:
            self._stall_s = blend(self._stall_s, done.stall_s / len(swap.enter), LOAD_WEIGHT)
            self._load_bytes = blend(
                self._load_bytes,
                sum(a.size_bytes for a in swap.enter) / len(swap.enter),
                LOAD_WEIGHT,
            )
        for adapter in swap.unload:
            log.info("adapter unloaded", extra={"adapter": str(adapter.ref)})
        failures = {}
        for adapter in swap.enter:
            refused = done.refused.get(adapter.ref)
            if refused is not None:
                log.warning(
                    "adapter not loaded",
                    extra={
                        "adapter": str(adapter.ref),
                        "code": refused.code,
                        "reason": refused.message,
                    },
                )
                failures[adapter.ref] = Failure(refused.code, refused.message, refused.retryable)
                continue
            came_from = self._residency.came_from(adapter.ref).name.lower()
            facts = {
                "adapter": str(adapter.ref),
                "rank": adapter.rank,
                "from": came_from,
                "ms": took_ms,
                "stall_ms": stall_ms,
            }
            log.info("adapter loaded", extra=facts | {"together": len(swap.enter)})
        self._perform(self._residency.swapped(failures, clock()))
        self._beat()

    def _start(self, job: Job, adapter: Loaded | None) -> None:
        job.started = clock()
        job.task = self._spawn(self._run(job, adapter), f"call {job.message.sid}")
        # Not in a `finally` of the task: one that is cancelled before its first step never gets
        # there.
        job.task.add_done_callback(lambda _: self._forget(job))

    async def _run(self, job: Job, adapter: Loaded | None) -> None:
        """One request in the engine. Ends its job whatever happens."""
        message = job.message
        reply = StreamReply(job)
        try:
            await self._engine.serve(
                EngineRequest(
                    message.path, message.request_id, message.body, adapter, message.model
                ),
                reply,
            )
        except EngineFailure as exc:
            if not reply.begun:
                job.session.outbox.refuse(
                    messages.Refused(message.sid, exc.code, exc.message, True, leaving=True)
                )
            self._on_engine_death(exc.message)

    def _refuse(self, job: Job, code: str, message: str, retryable: bool) -> None:
        job.session.outbox.refuse(
            messages.Refused(job.message.sid, code, message, retryable, self._stopping.is_set())
        )
        self._cancel(job)

    def _forget(self, job: Job) -> None:
        """Idempotent."""
        if self._jobs.pop(job.number, None) is None:
            return
        del self._by_stream[job.session, job.message.sid]
        job.session.open_requests -= 1
        self._perform(self._residency.finish(job.number, clock()))
        self._wake_if_idle()

    def _wake_if_idle(self) -> None:
        if self._stopping.is_set() and not self._jobs:
            self._idle.set()

    def _run_errand(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = self._spawn(work, name)
        self._errands.add(task)
        task.add_done_callback(self._errands.discard)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        assert self._tasks is not None
        return self._tasks.create_task(work, name=name)
