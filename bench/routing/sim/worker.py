"""Pure. A worker in virtual time: the production residency and slots around the simulated engine,
in the part of worker/agent.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.routing.sim.agenda import Agenda
from bench.routing.sim.engine import Sequence, TimedEngine
from bench.routing.sim.timing import Timing
from bench.routing.sim.vllm_residency import VllmResidency
from shared.adapters.identity import AdapterRef
from shared.link import messages
from worker.adapters.load_times import LoadTimes
from worker.adapters.residency import Fetch, Instruction, Reject, Residency, Start
from worker.engine.base import Loaded, Swap

NOWHERE = Path("/nonexistent")
HEARTBEAT_S = 0.1
"""The production default."""
TOKENS_OF_CACHE = 256 * 4096
"""The KV cache's size, for `kv_usage`; no request ever waits for it here."""
TASKS, MAX_MODEL_LEN = ("generate",), 4096
OK_SSE = 200 << messages.STATUS_SHIFT | messages.SSE


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """What a worker is like. `capacity`: requests it takes at once; `cpu_adapters`: places of its
    CPU tier.
    """

    base: str
    slots: int = 16
    capacity: int = 256
    cpu_adapters: int = 64
    adapter_bytes: int = 26 << 20
    rank: int = 16
    disk_warm: bool = True
    """The disk cache holds every adapter from the start; else the first fetch of each comes from
    the store.
    """
    heartbeat_s: float = HEARTBEAT_S
    kept_by_vllm: bool = False
    """Slots and host memory are vLLM's own, as behind Ray."""


@dataclass(slots=True, eq=False)
class TimedRequest:
    number: int
    sid: messages.StreamId
    adapter: AdapterRef | None
    prompt_tokens: int
    output_tokens: int
    arrived: float
    sequence: Sequence | None = None
    started: float = 0.0
    came_from: messages.Tier = messages.Tier.GPU
    slot_wait_s: float = 0.0


@dataclass(slots=True)
class WorkerTotals:
    """What a worker has done so far."""

    loads: int = 0
    cold_loads: int = 0


class SimWorker:
    """`lengths` says how many tokens a request has in and out; `send_data` and `send_control` reach
    the gateway at once.
    """

    def __init__(
        self,
        worker: messages.WorkerId,
        facts: WorkerFacts,
        timing: Timing,
        agenda: Agenda,
        lengths: Callable[[str], tuple[int, int]],
        send_control: Callable[[bytes, bytes], None],
        send_data: Callable[[bytes, bytes], None],
    ) -> None:
        self.id, self.epoch = worker, 1
        self.peer = messages.identity(worker, self.epoch)
        self.facts, self._timing, self._agenda, self._lengths = facts, timing, agenda, lengths
        self._send_control, self._send_data = send_control, send_data
        keeps = VllmResidency if facts.kept_by_vllm else Residency
        self.residency = keeps(facts.slots, facts.slots + facts.cpu_adapters)
        self.engine = TimedEngine(timing, agenda, self)
        self.tally = WorkerTotals()
        self.alive = True
        self.on_load: Callable[[AdapterRef, messages.Tier], None] | None = None
        self._jobs: dict[int, TimedRequest] = {}
        self._by_sid: dict[messages.StreamId, TimedRequest] = {}
        self._started = 0
        self._on_disk: set[AdapterRef] = set()
        self._origin: dict[AdapterRef, messages.Tier] = {}  # of adapters that are fetched
        self._int_id = self._last_sid = self._seq = 0
        self._times = LoadTimes()
        self._requests = 0
        self._prepared_until = 0.0
        self._heartbeat_due = False

    def join(self) -> None:
        """Says hello, attaches its data socket, and sends heartbeats from now on."""
        self._heartbeat()
        self._send_data(self.peer, messages.encode(messages.Attach(self.id, self.epoch)))
        self._agenda.after(self.facts.heartbeat_s, self._heartbeat_for_ever)

    def die(self) -> None:
        """Without a word."""
        self.alive = False

    # ---- from the gateway ------------------------------------------------------------------------

    def receive(self, data: bytes) -> None:
        if not self.alive:
            return
        message = messages.decode_gateway_data(data)
        if isinstance(message, messages.Cancel):
            self._cancel(message.sid)
        elif isinstance(message, messages.Generate):
            self._take(message)

    def _take(self, message: messages.Generate) -> None:
        prompt_tokens, output_tokens = self._lengths(message.request_id)
        job = TimedRequest(
            message.sid,
            message.sid,
            message.adapter,
            prompt_tokens,
            output_tokens,
            self._agenda.now,
        )
        self._jobs[job.number] = self._by_sid[job.sid] = job
        self._last_sid = job.sid
        if message.adapter is None:
            self._start(job)
        else:
            self._perform(self.residency.want(job.number, message.adapter, self._agenda.now))

    def _cancel(self, sid: messages.StreamId) -> None:
        job = self._by_sid.get(sid)
        if job is not None:
            if job.sequence is not None:
                self.engine.abort(job.sequence)
            self._forget(job)

    # ---- acting on instructions ------------------------------------------------------------------

    def _perform(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Fetch(adapter):
                    self._fetch(adapter)
                case Swap():
                    self._swap(instruction)
                case Start(number, _, came_from, slot_wait_s):
                    job = self._jobs[number]
                    job.came_from, job.slot_wait_s = came_from, slot_wait_s
                    self._start(job)
                case Reject(number, code, message, retryable):
                    job = self._jobs[number]
                    self._tell(
                        messages.Step([], [], [messages.Refused(job.sid, code, message, retryable)])
                    )
                    self._forget(job)

    def _fetch(self, adapter: AdapterRef) -> None:
        tier = (
            messages.Tier.DISK
            if self.facts.disk_warm or adapter in self._on_disk
            else messages.Tier.REMOTE
        )
        self._origin[adapter] = tier
        fetch_s = self._timing.fetch_s(tier, self.facts.adapter_bytes)
        if tier is messages.Tier.REMOTE:
            self._times.fetched(fetch_s)
        self._agenda.after(fetch_s, self._prepare, adapter)
        self._heartbeat_soon()

    def _prepare(self, adapter: AdapterRef) -> None:
        if not self.facts.disk_warm:
            self._on_disk.add(adapter)
        if not self._timing.prepare_s:
            self._prepared(adapter)
            return
        now = self._agenda.now
        self._prepared_until = max(now, self._prepared_until) + self._timing.prepared_in_s(
            self.facts.adapter_bytes
        )
        self._times.prepared(self._origin[adapter], 0.0, self._prepared_until - now)
        self._agenda.at(self._prepared_until, self._prepared, adapter)

    def _prepared(self, adapter: AdapterRef) -> None:
        if not self.alive:
            return
        self._int_id += 1
        loaded = Loaded(adapter, self._int_id, NOWHERE, self.facts.rank, self.facts.adapter_bytes)
        self._perform(self.residency.fetched(loaded, self._origin.pop(adapter), self._agenda.now))

    def _swap(self, swap: Swap) -> None:
        seconds = sum(
            self._timing.load_from_s(self.residency.came_from(a.ref), a.size_bytes)
            for a in swap.enter
        )
        self.engine.load(seconds, lambda: self._swapped(swap, seconds))

    def _swapped(self, swap: Swap, stall_s: float) -> None:
        if not self.alive:
            return
        self._times.swapped(stall_s, [adapter.size_bytes for adapter in swap.enter])
        for adapter in swap.enter:
            origin = self.residency.came_from(adapter.ref)
            self.tally.loads += 1
            self.tally.cold_loads += origin is not messages.Tier.CPU
            if self.on_load is not None:
                self.on_load(adapter.ref, origin)
        self._perform(self.residency.swapped({}, self._agenda.now))
        self._heartbeat_soon()

    def _start(self, job: TimedRequest) -> None:
        job.started = self._agenda.now
        job.sequence = Sequence(job.number, job.prompt_tokens, job.output_tokens)
        self._started += 1
        self._requests += 1
        self.engine.add(job.sequence)

    def _forget(self, job: TimedRequest) -> None:
        del self._jobs[job.number], self._by_sid[job.sid]
        self._started -= job.sequence is not None
        if job.adapter is not None:
            self._perform(self.residency.finish(job.number, self._agenda.now))

    # ---- to the gateway --------------------------------------------------------------------------

    def on_step(self, first: list[Sequence], last: list[Sequence]) -> None:
        """One message for all that a step brought: a head for each first token, an END for each
        last.
        """
        if not self.alive:
            return
        frames: list[messages.Frame] = [
            (s.number, OK_SSE, b"", b"") for s in first if s.number in self._jobs
        ]
        done = []
        for sequence in last:
            job = self._jobs.get(sequence.number)
            if job is None:
                continue
            frames.append((job.sid, messages.END, b"", b""))
            wait_s = job.started - job.arrived
            was_loaded = job.came_from is not messages.Tier.GPU
            load_s = wait_s - job.slot_wait_s if was_loaded else 0.0
            done.append(
                messages.Done(
                    job.sid, job.prompt_tokens, job.output_tokens, wait_s, load_s, job.came_from
                )
            )
            self._forget(job)
        self._tell(messages.Step(frames, done))

    def _tell(self, step: messages.Step) -> None:
        self._send_data(self.peer, messages.encode(step))

    def _heartbeat_for_ever(self) -> None:
        if self.alive:
            self._heartbeat()
            self._perform(self.residency.tick(self._agenda.now))
            self._agenda.after(self.facts.heartbeat_s, self._heartbeat_for_ever)

    def _heartbeat_soon(self) -> None:
        if not self._heartbeat_due:
            self._heartbeat_due = True
            self._agenda.after(self._timing.heartbeat_soon_s, self._heartbeat_if_due)

    def _heartbeat_if_due(self) -> None:
        if self._heartbeat_due and self.alive:
            self._heartbeat()

    def _heartbeat(self) -> None:
        self._heartbeat_due = False
        self._seq += 1
        facts, engine, times = self.facts, self.engine, self._times
        heartbeat = messages.Heartbeat(
            worker=self.id,
            epoch=self.epoch,
            seq=self._seq,
            base=facts.base,
            state=messages.WorkerState.SERVING,
            capacity=facts.capacity,
            slots=facts.slots,
            running=self._started,
            waiting=len(self._jobs) - self._started,
            yours=len(self._jobs),
            acked=self._last_sid,
            kv_usage=engine.tokens_held / TOKENS_OF_CACHE,
            adapters=self.residency.states(self._agenda.now, times.load_s),
            prefill_tokens_per_s=engine.rates.prefill_tokens_per_s,
            step_s=engine.rates.step_s,
            load_s=times.load_s,
            stall_s=times.stall_s,
            load_bytes=round(times.load_bytes),
            fetch_s=times.fetch_s,
            host=self.id,
            tasks=TASKS,
            max_model_len=MAX_MODEL_LEN,
            adapter_loads=dict(self.residency.loads),
            adapter_evictions=dict(self.residency.evictions),
            engine_requests=self._requests,
            stalled_s=times.stalled_s,
        )
        self._send_control(self.peer, messages.encode(heartbeat))
