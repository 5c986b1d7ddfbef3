"""Shell. Drives the adapter's state machine of a worker. It tells residency what has happened, and
performs what residency instructs: fetches, swaps, and the start or the refusal of requests.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Protocol

from shared.adapters.identity import AdapterRef
from shared.errors import EngineFailure, InternalError, LoraplexError
from shared.link import messages
from worker.adapters.commands import CommandRunner
from worker.adapters.failures import Failure
from worker.adapters.fetching import AdapterFetcher, FetchHint
from worker.adapters.initial_adapters import InitialAdapters
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
from worker.disk.cache import Check
from worker.engine.base import Engine, Loaded, Swap
from worker.session import GatewaySession

log = logging.getLogger("loraplex.agent")
clock = time.monotonic

UNEXPECTED = "A fault of Loraplex kept the adapter from being loaded. The worker's log has it."


class WaitingRequests(Protocol):
    """The requests that may wait for an adapter, by their numbers (see RequestTable)."""

    def start(
        self,
        number: int,
        adapter: Loaded | None,
        came_from: messages.Tier,
        slot_wait_s: float,
    ) -> None: ...
    def refuse(self, number: int, code: str, message: str, retryable: bool) -> None: ...


class ResidencyDriver:
    """The adapters of one worker, for requests, operators and gateways.

    `changed` is called when gateways should hear of residency at once, and `on_engine_death` if a
    load finds the engine dead. Loads run in `tasks`, which the agent sets while it runs. Commands
    and early loads have negative numbers, requests positive ones.
    """

    def __init__(
        self,
        engine: Engine,
        fetcher: AdapterFetcher,
        times: LoadTimes,
        requests: WaitingRequests,
        changed: Callable[[], None],
        on_engine_death: Callable[[str], None],
    ) -> None:
        self._engine, self._fetcher, self.times = engine, fetcher, times
        self._requests, self._changed, self._on_engine_death = requests, changed, on_engine_death
        self.residency = Residency(0)  # no slots until the engine has started
        self._check: Check | None = None
        self._hints: dict[AdapterRef, FetchHint] = {}  # for fetches that have not begun yet
        self._commands = CommandRunner()
        self._initial = InitialAdapters(0, active=False)
        self._numbers = itertools.count(1)
        self._loads: set[asyncio.Task[None]] = set()  # fetches and swaps
        self.tasks: asyncio.TaskGroup | None = None

    def engine_started(self, residency: Residency, check: Check) -> None:
        """From now on adapters are fetched, checked by `check`, and put into the engine's slots."""
        self.residency, self._check = residency, check

    @property
    def warming(self) -> bool:
        """Whether adapters are loaded before the first request."""
        return self._initial.active

    async def load_first(
        self, slots: int, sessions: Callable[[], Iterable[GatewaySession]], most_s: float
    ) -> None:
        """Loads what gateways want before the first request, for at most `most_s`."""
        self._initial = InitialAdapters(slots)
        self._changed()
        took_s = await self._initial.wait(sessions, most_s)
        self._initial.active = False
        if count := len(self._initial.adapters):
            log.info("warmed up", extra={"adapters": count, "seconds": round(took_s, 2)})

    def want(self, number: int, adapter: AdapterRef, hint: FetchHint) -> None:
        """A request waits for its adapter."""
        self._seek(adapter, hint, self.residency.want(number, adapter, clock()))

    def warm_up(
        self, session: GatewaySession, adapters: Iterable[AdapterRef], *, serving: bool
    ) -> None:
        """Loads adapters for which no request has come yet. They take empty slots only."""
        for adapter in self._initial.receive(session, adapters):
            slots = self.residency.slots
            if self._initial.active or (serving and len(slots) < slots.size):
                number = -next(self._numbers)
                self._initial.begun(number)
                self._perform(self.residency.want(number, adapter, clock()))

    def command(
        self, session: GatewaySession, message: messages.AdapterCommand, *, serving: bool
    ) -> None:
        """An operator, or a new version, asks for something."""
        number, now = -next(self._numbers), clock()
        instructions = self._commands.begin(number, session, message, serving, self.residency, now)
        self._seek(message.adapter, FetchHint(message.stored, message.peers), instructions)

    def forget(self, session: GatewaySession) -> None:
        """The gateway is gone, and nobody waits for its commands."""
        for number in self._commands.forget(session):
            self.finish(number)

    def finish(self, number: int) -> None:
        """The request has ended."""
        self._perform(self.residency.finish(number, clock()))

    def tick(self) -> None:
        """Called regularly."""
        self._perform(self.residency.tick(clock()))

    def cancel_loads(self) -> None:
        """No request waits for these loads any more, and a dead engine would never answer them."""
        for load in self._loads:
            load.cancel()

    # ---- acting on instructions ------------------------------------------------------------------

    def _seek(self, adapter: AdapterRef, hint: FetchHint, instructions: list[Instruction]) -> None:
        """Performs the instructions. If one of them is a fetch, it uses the hint."""
        if any(isinstance(instruction, Fetch) for instruction in instructions):
            self._hints[adapter] = hint
        self._perform(instructions)

    def _perform(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Fetch(adapter):
                    self._run_load(self._fetch(adapter), f"fetch {adapter}")
                case Swap():
                    self._run_load(self._swap(instruction), "swap")
                case Start(number) | Reject(number) | CommandDone(number) if number < 0:
                    self._initial.settled(number)
                    self._perform(self._commands.settle(instruction, self.residency, clock()))
                case Start(number, adapter, came_from, slot_wait_s):
                    self._requests.start(number, adapter, came_from, slot_wait_s)
                case Reject(number, code, message, retryable):
                    self._requests.refuse(number, code, message, retryable)
        if any(isinstance(instruction, Fetch | Swap) for instruction in instructions):
            self._changed()

    async def _fetch(self, ref: AdapterRef) -> None:
        assert self._check is not None
        hint = self._hints.pop(ref, FetchHint())
        try:
            ahead = ref in self.residency.adapters()
            fetched = await self._fetcher.fetch(ref, hint, self._check, ahead=ahead)
            self._perform(self.residency.cached(ref, clock()))
            if ref not in self.residency.adapters():
                self._fetcher.leave(fetched)
                return  # only the files on disk were wanted
            loaded = await self._fetcher.prepare(ref, fetched)
        except EngineFailure as exc:
            self._on_engine_death(exc.message)
            return
        except Exception as exc:
            # What nobody expected of an adapter fails its requests, and nobody else's.
            error = exc if isinstance(exc, LoraplexError) else InternalError(UNEXPECTED)
            log.warning(
                "adapter not fetched",
                extra={"adapter": str(ref), "code": error.code, "reason": error.message},
                exc_info=None if error is exc else exc,
            )
            failure = Failure(error.code, error.message, error.retryable)
            self._perform(self.residency.failed(ref, failure, clock()))
            self._changed()
            return
        self._perform(self.residency.fetched(loaded, fetched.came_from, clock()))

    async def _swap(self, swap: Swap) -> None:
        try:
            failures = await perform_swap(self._engine, swap, self.residency.came_from, self.times)
        except EngineFailure as exc:
            self._on_engine_death(exc.message)
            return
        self._perform(self.residency.swapped(failures, clock()))
        self._changed()

    def _run_load(self, work: Coroutine[Any, Any, None], name: str) -> None:
        assert self.tasks is not None
        task = self.tasks.create_task(work, name=name)
        self._loads.add(task)
        task.add_done_callback(self._loads.discard)
