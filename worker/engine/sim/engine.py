"""Shell. A simulated engine: deterministic text, scripted timing, and the slot rules of a real
engine. It has no model and needs no torch.

It models three things. A step loop moves every running sequence by one token per `itl_ms`. A
prefill lane beside it takes prompts, first come first served. Loads happen between steps, and
nothing else moves meanwhile. A token is a word. Prompts are counted in words. An answer's text is
the label `[base=... adapter=... digest=...]` (the first token), then w0, w1, ... up to exactly
`max_tokens`. A token's id is its place in the answer. Sampling parameters, `stop`, tools and
logprobs are ignored.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from shared.adapters.identity import AdapterRef
from shared.api_endpoints import errors_of
from shared.averages import blend
from shared.config.engine import SimTiming
from shared.error_bodies import error_body
from shared.errors import EngineFailure, InvalidAdapter, InvalidRequest
from worker.engine.base import (
    EngineFacts,
    EngineRequest,
    EngineStats,
    Loaded,
    Reply,
    Storing,
    Swap,
    Swapped,
)
from worker.engine.hang_detection import EngineSigns
from worker.engine.sim.answers import TASKS, Answer, read_request, seen_tokens
from worker.engine.sim.sequence import SimSequence

clock = time.monotonic

MEASURE_WEIGHT = 0.2  # weight of the newest step or prefill in the moving averages
# uvloop's timers round to whole milliseconds. A timer that fires this much early is on time.
TIMER_SLACK_S = 0.0006
MB = 1e6
FREEZE = signal.SIGUSR1
"""This signal makes the engine hang while its process lives on. A second one lets it go on."""
MAX_ON_LOOP_BYTES = 64 << 10
"""Of a body; a longer one is read beside the loop."""
ACTIVATE_S = 0.004  # how long an adapter takes from host memory into a slot
HOST_PLACES_PER_SLOT = 5


class SimEngine:
    """Implements `worker.engine.base.Engine`.

    An answer's first token comes with the step that follows `timing.ttft_ms` after its prefill. At
    most `timing.max_num_seqs` sequences prefill or decode. The others wait without a bound of their
    own: the agent admits no more than `EngineFacts.capacity`.
    """

    stage = "starting"

    def __init__(
        self,
        base: str,
        timing: SimTiming,
        *,
        max_loras: int = 16,
        max_lora_rank: int = 16,
        max_model_len: int = 4096,
    ) -> None:
        self._base = base
        self._max_loras, self._max_lora_rank = max_loras, max_lora_rank
        self._max_model_len, self._max_num_seqs = max_model_len, timing.max_num_seqs
        self._ttft_s, self._itl_s = timing.ttft_ms / 1e3, timing.itl_ms / 1e3
        self._prefill_rate = timing.prefill_tokens_per_s
        self._load_s, self._load_s_per_mb = timing.load_ms / 1e3, timing.load_ms_per_mb / 1e3
        word = re.escape(timing.deadly_word.encode())
        self._deadly = re.compile(rb"\b" + word + rb"(\d*)\b") if word else None
        self._uses: dict[Loaded, int] = {}  # loaded adapters -> calls in flight
        self._warm: set[Loaded] = set()  # in host memory, but in no slot
        self._loads: deque[tuple[Loaded, asyncio.Future[None]]] = deque()
        # Every sequence is in exactly one of these, in the order of arrival.
        self._waiting: OrderedDict[SimSequence, None] = OrderedDict()
        self._prefilling: OrderedDict[SimSequence, None] = OrderedDict()
        self._running: OrderedDict[SimSequence, None] = OrderedDict()
        self._lane_free = 0.0  # when the prefill lane can take the next prompt
        self._stalled_until = 0.0
        self._next_step = 0.0  # valid while something runs
        self._step_began = 0.0
        self._step_s = self._measured_prefill_rate = 0.0
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._on_death: Callable[[str], None] | None = None
        self._dead = ""
        self._steps = 0
        self._thawed = asyncio.Event()
        self._thawed.set()

    async def start(self) -> EngineFacts:
        self._task = asyncio.create_task(self._step_for_ever(), name="sim engine")
        self._task.add_done_callback(self._ended)
        # signals can only be set in the main thread
        with contextlib.suppress(ValueError, RuntimeError):
            asyncio.get_running_loop().add_signal_handler(FREEZE, self.freeze)
        return EngineFacts(
            "sim",
            self._max_num_seqs,
            self._max_loras,
            self._max_lora_rank,
            self._max_loras * HOST_PLACES_PER_SLOT,
            tasks=TASKS,
            max_model_len=self._max_model_len,
        )

    async def serve(self, call: EngineRequest, reply: Reply) -> None:
        adapter = call.adapter
        assert adapter is None or adapter in self._uses, f"{adapter} is not loaded"
        self._check_alive()
        try:
            created = call.created or int(time.time())
            answer = await self._read(call, created)
            seen = seen_tokens(call, answer)
        except InvalidRequest as exc:
            reply.head(exc.status, False, error_body(exc, errors_of(call.path)), True)
            return
        reply.prompt_tokens = answer.prompt_tokens
        if call.on_seen is not None and answer.stream and seen:
            call.on_seen(b"".join(map(answer.event, range(seen))))
        done = asyncio.get_running_loop().create_future()
        sequence = SimSequence(answer, reply, clock(), done, seen, self._dies_at(call.body))
        if adapter is not None:
            self._uses[adapter] += 1
        self._waiting[sequence] = None
        self._wake_if_idle()
        try:
            await sequence.done
        finally:
            self._remove(sequence, clock())
            self._wake_if_idle()
            if adapter is not None:
                self._uses[adapter] -= 1

    async def _read(self, call: EngineRequest, created: int) -> Answer:
        arguments = call, self._base, self._max_model_len, created
        if len(call.body) <= MAX_ON_LOOP_BYTES:
            return read_request(*arguments)
        return await asyncio.to_thread(read_request, *arguments)

    def _dies_at(self, body: bytes) -> int | None:
        """The number of the token at which the prompt ends the engine. None: it does not."""
        found = self._deadly.search(body) if self._deadly is not None else None
        return None if found is None else int(found[1] or 0)

    def read_ahead(self, ref: AdapterRef, int_id: int, folder: Path) -> None: ...
    def forget(self, int_id: int) -> None: ...

    async def prepare(self, adapter: Loaded) -> None:
        """Takes as long as a load would, but the steps go on meanwhile."""
        self._check_alive()
        self._check_rank(adapter)
        await asyncio.sleep(self._load_s + self._load_s_per_mb * adapter.size_bytes / MB)
        self._check_alive()
        self._warm.add(adapter)

    async def swap(self, swap: Swap) -> Swapped:
        for adapter in swap.demote:
            await self.demote(adapter)
        for adapter in swap.unload:
            await self.unload(adapter)
        began = clock()
        outcomes = await asyncio.gather(*map(self.load, swap.enter), return_exceptions=True)
        refused: dict[AdapterRef, InvalidAdapter] = {}
        for adapter, outcome in zip(swap.enter, outcomes, strict=True):
            if isinstance(outcome, InvalidAdapter):
                refused[adapter.ref] = outcome
            elif outcome is not None:
                raise outcome
        return Swapped(refused, clock() - began)

    async def load(self, adapter: Loaded) -> None:
        """Puts one adapter into a slot."""
        assert len(self._uses) + len(self._loads) < self._max_loras, (
            f"no slot is free for {adapter}"
        )
        assert adapter not in self._uses and all(a != adapter for a, _ in self._loads), (
            f"{adapter} is loaded already"
        )
        self._check_alive()
        self._check_rank(adapter)
        loaded: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._loads.append((adapter, loaded))
        self._wake_if_idle()
        await loaded

    async def demote(self, adapter: Loaded) -> None:
        """Takes one adapter out of its slot; it stays in host memory."""
        await self.unload(adapter)
        self._warm.add(adapter)

    async def unload(self, adapter: Loaded) -> None:
        """Removes one adapter from its slot and from host memory."""
        assert adapter in self._uses or adapter in self._warm, f"{adapter} is not loaded"
        assert not self._uses.get(adapter), f"{adapter} is in flight"
        self._check_alive()
        self._uses.pop(adapter, None)
        self._warm.discard(adapter)

    def stores(self, answer_id: str) -> Storing:
        return Storing.NOT

    def copies(self) -> Iterator[tuple[str, bytes]]:
        return iter(())

    def keep_copy(self, answer_id: str, copy: bytes) -> None:
        return None

    def stats(self) -> EngineStats:
        tokens_held = sum(
            s.answer.prompt_tokens + s.sent
            for queue in (self._prefilling, self._running)
            for s in queue
        )
        return EngineStats(
            running=len(self._prefilling) + len(self._running),
            waiting=len(self._waiting),
            kv_usage=tokens_held / (self._max_num_seqs * self._max_model_len),
            prefill_tokens_per_s=self._measured_prefill_rate,
            step_s=self._step_s,
        )

    def signs(self) -> EngineSigns:
        waiting = [s for q in (self._waiting, self._prefilling) for s in q]
        return EngineSigns(
            self._steps,
            len(self._prefilling) + len(self._running),
            sum(s.answer.prompt_tokens for s in waiting),
            self._prefill_rate,
        )

    async def ping(self) -> None:
        await self._thawed.wait()
        self._check_alive()

    def broken(self) -> None:
        return None

    def freeze(self) -> None:
        """The engine hangs while its process lives on, as with a stuck kernel. A second call lets
        it go on.
        """
        if self._thawed.is_set():
            self._thawed.clear()
        else:
            self._thawed.set()

    def died(self, callback: Callable[[str], None]) -> None:
        self._on_death = callback

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    # ---- the step loop ---------------------------------------------------------------------------

    async def _step_for_ever(self) -> None:
        while True:
            self._prefill(clock())
            due = self._due()
            await self._sleep_until(due)
            await self._thawed.wait()
            now = clock()
            if due is not None and now >= due - TIMER_SLACK_S:
                self._step(now, due)
                # The frames of this step leave before the next step, even if that is due.
                await asyncio.sleep(0)
            while self._loads:
                await self._load_first()

    async def _sleep_until(self, due: float | None) -> None:
        """Sleeps until `due`, if there is such a time. While nothing decodes, a new call or load
        ends it.
        """
        self._wake.clear()
        if self._loads and not self._running:
            return
        timer = (
            None
            if due is None
            else asyncio.get_running_loop().call_later(max(0.0, due - clock()), self._wake.set)
        )
        try:
            await self._wake.wait()
        finally:
            if timer is not None:
                timer.cancel()

    def _due(self) -> float | None:
        if self._running:
            return self._next_step
        if self._prefilling:
            return next(iter(self._prefilling)).ready
        return self._lane_free if self._waiting else None

    def _prefill(self, now: float) -> None:
        """Moves sequences into the prefill lane, one after another, each at the moment the lane was
        free.
        """
        while self._waiting and len(self._prefilling) + len(self._running) < self._max_num_seqs:
            sequence = next(iter(self._waiting))
            start = max(self._lane_free, sequence.arrived)
            if start > now:
                return
            del self._waiting[sequence]
            self._lane_free = start + sequence.prefill_tokens / self._prefill_rate
            sequence.prefill_began, sequence.ready = start, self._lane_free + self._ttft_s
            self._prefilling[sequence] = None

    def _step(self, now: float, due: float) -> None:
        """Adds the sequences that have left prefill, and moves every running sequence by
        one token.
        """
        self._steps += 1
        if self._running:
            self._step_s = blend(self._step_s, now - self._step_began, MEASURE_WEIGHT)
        self._join(max(now, due))
        for sequence in [s for s in self._running if s.advance()]:
            self._remove(sequence, now)
            if not sequence.done.done():
                sequence.done.set_result(None)
        self._step_began = now
        # Counted from when it was due, so late timers do not add up. A step that came a whole
        # interval late is not made up for.
        self._next_step = max(due + self._itl_s, now)

    def _join(self, now: float) -> None:
        while self._prefilling:
            sequence = next(iter(self._prefilling))
            if sequence.ready > now:
                return
            del self._prefilling[sequence]
            self._running[sequence] = None
            # stalls by loads are included
            took = sequence.ready - self._ttft_s - sequence.prefill_began
            self._measured_prefill_rate = blend(
                self._measured_prefill_rate,
                sequence.prefill_tokens / max(took, 1e-6),
                MEASURE_WEIGHT,
            )

    async def _load_first(self) -> None:
        adapter, loaded = self._loads[0]
        if not loaded.cancelled():
            duration = (
                ACTIVATE_S
                if adapter in self._warm
                else self._load_s + self._load_s_per_mb * adapter.size_bytes / MB
            )
            self._stall(clock(), duration)
            await asyncio.sleep(duration)
        self._loads.popleft()
        if not loaded.done():
            self._uses[adapter] = 0
            self._warm.discard(adapter)
            loaded.set_result(None)

    def _stall(self, now: float, duration: float) -> None:
        """Prefill and decode stand still for this long, then go on where they were."""
        self._prefill(now)
        for sequence in self._prefilling:
            if sequence.ready > now:
                sequence.ready += duration
        self._lane_free = max(self._lane_free, now) + duration
        self._next_step += duration
        self._step_began += duration
        self._stalled_until = now + duration

    def _remove(self, sequence: SimSequence, now: float) -> None:
        """Takes the sequence out, wherever it is. Does nothing if it is out already."""
        full = len(self._prefilling) + len(self._running) >= self._max_num_seqs
        lane_freed = bool(self._prefilling) and next(reversed(self._prefilling)) is sequence
        for queue in (self._waiting, self._prefilling, self._running):
            if sequence in queue:
                del queue[sequence]
                break
        else:
            return
        if lane_freed:
            self._lane_free = max(min(self._lane_free, now), self._stalled_until)
        if full:
            # no sequence enters the lane before it is free
            self._lane_free = max(self._lane_free, now)

    def _wake_if_idle(self) -> None:
        if not self._running:  # while something runs, the next step sees it
            self._wake.set()

    def _check_rank(self, adapter: Loaded) -> None:
        if adapter.rank > self._max_lora_rank:
            raise InvalidAdapter(
                f"rank {adapter.rank} is greater than the server's max_lora_rank "
                f"{self._max_lora_rank}"
            )

    def _check_alive(self) -> None:
        assert self._task is not None, "the engine has not started"
        if self._dead:
            raise EngineFailure(self._dead)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """The step loop has ended: it was stopped, or a bug broke it."""
        self._dead = "stopped" if task.cancelled() else f"step loop broke: {task.exception()!r}"
        pending: Iterable[asyncio.Future[None]] = [
            s.done for q in (self._waiting, self._prefilling, self._running) for s in q
        ]
        for future in (*pending, *(loaded for _, loaded in self._loads)):
            if not future.done():
                future.set_exception(EngineFailure(self._dead))
        if not task.cancelled() and self._on_death is not None:
            self._on_death(self._dead)
