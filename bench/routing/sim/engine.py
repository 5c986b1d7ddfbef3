"""Pure. A continuous-batching engine in virtual time: steps of a length given by the batch, prefill
inside them, loads between them.

No event per token: while the batch stays as it is, steps are all of one length, so the next moment
at which anything changes (a sequence ends, or the step during which a request or a load arrived) is
computed. A request costs about four events, however long its answer.

As in vLLM's V1 scheduler: decodes go first, what is left of the step's token budget prefills
waiting prompts first come first served, in chunks if need be; a load runs inside the loop, nothing
else moves meanwhile, and between two loads there is a step if there is work. A step is scheduled
while the one before it runs, so what comes meanwhile is in the next but one.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from bench.routing.sim.agenda import Agenda
from bench.routing.sim.timing import Timing
from worker.engine.step_rates import StepRates

HAIR = 1e-9
"""Of a step: a sum of steps may miss a boundary by rounding."""


@dataclass(slots=True, eq=False)
class Sequence:
    """One request in the engine. `number` is the caller's name for it."""

    number: int
    prompt_tokens: int
    output_tokens: int
    unread_tokens: int = 0  # of the prompt
    arrived: float = 0.0
    last_step: int = 0  # the step that yields its last token, once it decodes
    aborted: bool = False


class Listener(Protocol):
    """Hears what steps and loads brought, at the moment they end."""

    def on_step(self, first: list[Sequence], last: list[Sequence]) -> None:
        """Sequences that got their first token and that got their last; one with a single token is
        in both.
        """
        ...


class Doing(Enum):
    NOTHING = "nothing"
    DECODING = "decoding"  # many equal steps, up to the next change
    PREFILLING = "prefilling"  # one step
    LOADING = "loading"


class TimedEngine:
    """Call `add`, `abort` and `load`; hear `listener.on_step` and each load's own callback."""

    def __init__(self, timing: Timing, agenda: Agenda, listener: Listener) -> None:
        self._timing, self._agenda, self._listener = timing, agenda, listener
        self._waiting: deque[Sequence] = deque()
        self._decoding: list[tuple[int, int, Sequence]] = []  # heap by last step
        self._chunks: list[tuple[Sequence, int]] = []  # what the present step prefills
        self._loads: deque[tuple[float, Callable[[], None]]] = deque()
        self._doing = Doing.NOTHING
        self._steps = 0  # done
        self._since = 0.0  # when the present steps, step or load began
        self._step_s = 0.0  # of the present steps
        self._until_step = 0  # if DECODING: the step at whose end something changes
        self._wake = 0  # number of the event that counts; earlier ones are void
        self._scheduled = 0.0  # when the step that begins next was scheduled
        self._busy = False  # since before the present step
        self._load_s = 0.0  # of loads since the last step
        self.decoding = 0
        self.tokens_held = 0
        self.rates = StepRates()
        self.loading_s = self.busy_s = 0.0  # totals

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def add(self, sequence: Sequence) -> None:
        sequence.unread_tokens, sequence.arrived = sequence.prompt_tokens, self._agenda.now
        self._waiting.append(sequence)
        if self.decoding < self._timing.max_sequences:
            self._disturb()

    def load(self, seconds: float, done: Callable[[], None]) -> None:
        """Stalls everything for `seconds` as soon as the present step is over."""
        self._loads.append((seconds, done))
        self._disturb()

    def abort(self, sequence: Sequence) -> None:
        """The sequence yields nothing more; it leaves the batch at the next boundary that finds
        it.
        """
        if sequence.aborted:
            return
        sequence.aborted = True
        if sequence in self._waiting:
            self._waiting.remove(sequence)
            return
        if sequence.last_step:
            self._disturb()
            self._decoding = [entry for entry in self._decoding if entry[2] is not sequence]
            heapq.heapify(self._decoding)
            self.decoding -= 1
            self.tokens_held -= sequence.prompt_tokens + sequence.output_tokens

    def _disturb(self) -> None:
        """Something arrived: idle engines begin, decoding ones look up after the step that runs
        now.
        """
        if self._doing is Doing.NOTHING:
            self._scheduled, self._busy = self._agenda.now, False
            self._begin(may_load=True)
        elif self._doing is Doing.DECODING:
            ran = max(1, math.ceil((self._agenda.now - self._since) / self._step_s - HAIR))
            if self._steps + ran < self._until_step:
                self._until_step = self._steps + ran
                self._set_alarm(self._since + ran * self._step_s)

    def _set_alarm(self, when: float) -> None:
        self._wake += 1
        self._agenda.at(max(when, self._agenda.now), self._on_alarm, self._wake)

    def _begin(self, *, may_load: bool) -> None:
        """At a boundary: what next?"""
        self._since = self._agenda.now
        if self._loads and (may_load or not (self._waiting or self._decoding)):
            self._doing = Doing.LOADING
            self._set_alarm(self._since + self._loads[0][0])
        elif self._may_prefill():
            self._doing = Doing.PREFILLING
            self._set_alarm(self._since + self._pack())
        elif self._decoding:
            self._doing = Doing.DECODING
            self._step_s = self._timing.step_s(self.decoding)
            # With a full house and a queue, still the first end is the next change.
            room = self.decoding < self._timing.max_sequences
            soon = self._loads or (self._waiting and room)
            self._until_step = self._steps + 1 if soon else self._decoding[0][0]
            self._set_alarm(self._since + (self._until_step - self._steps) * self._step_s)
        else:
            self._doing = Doing.NOTHING

    def _may_prefill(self) -> bool:
        if not self._waiting or self.decoding >= self._timing.max_sequences:
            return False
        # without a sequence that decodes nothing is scheduled ahead
        if not self._timing.scheduled_ahead or not self._decoding:
            self._scheduled = self._agenda.now
        return self._waiting[0].arrived <= self._scheduled

    def _pack(self) -> float:
        """Fills one step with prompts; returns how long it takes."""
        budget, tokens = self._timing.step_tokens - self.decoding, 0
        self._chunks = []
        for sequence in self._waiting:
            full = self.decoding + len(self._chunks) >= self._timing.max_sequences
            if full or tokens >= budget or sequence.arrived > self._scheduled:
                break
            chunk = min(sequence.unread_tokens, budget - tokens)
            self._chunks.append((sequence, chunk))
            tokens += chunk
        self._step_s = self._timing.prefill_step_s(self.decoding + len(self._chunks), tokens)
        for sequence, chunk in self._chunks:
            sequence.unread_tokens -= chunk
            if not sequence.unread_tokens:
                self._waiting.popleft()
        return self._step_s

    def _on_alarm(self, wake: int) -> None:
        if wake != self._wake:
            return
        self.busy_s += self._agenda.now - self._since
        if self._doing is Doing.LOADING:
            seconds, done = self._loads.popleft()
            self.loading_s += seconds
            self._load_s += seconds
            # Whom `done` starts is in the next step; a load that it asks for waits for the end of
            # that step.
            self._doing = Doing.LOADING
            done()
            self._scheduled = self._agenda.now
            self._begin(may_load=False)
            return
        first: list[Sequence] = []
        if self._doing is Doing.DECODING:
            ran = self._until_step - self._steps
            self._measure(ran)
            self._steps = self._until_step
            self._scheduled = self._agenda.now - self._step_s
        else:
            self._steps += 1
            self._measure(1)
            self._scheduled = self._since
            first = self._prefilled()
        last = self._ended()
        if first or last:
            self._listener.on_step(first, last)
        self._begin(may_load=True)

    def _measure(self, steps: int) -> None:
        """As vLLM's steps are measured: from one end of a step to the next, so with the load before
        it. The first step after a rest has no beginning.
        """
        load_s, self._load_s = self._load_s, 0.0
        tokens = sum(
            sequence.prompt_tokens for sequence, _ in self._chunks if not sequence.unread_tokens
        )
        if self._busy:
            took_s = self._step_s + load_s
            if tokens:
                self.rates.prefill(took_s, tokens)
            else:
                self.rates.steps(took_s)
                self.rates.steps(self._step_s, steps - 1)
        self._busy = True

    def _prefilled(self) -> list[Sequence]:
        """The prompts that the step has read to the end, each with its first token."""
        first = []
        for sequence, _ in self._chunks:
            if sequence.unread_tokens or sequence.aborted:
                continue
            first.append(sequence)
            sequence.last_step = self._steps + sequence.output_tokens - 1
            heapq.heappush(self._decoding, (sequence.last_step, sequence.number, sequence))
            self.decoding += 1
            self.tokens_held += sequence.prompt_tokens + sequence.output_tokens
        self._chunks = []
        return first

    def _ended(self) -> list[Sequence]:
        last = []
        while self._decoding and self._decoding[0][0] <= self._steps:
            sequence = heapq.heappop(self._decoding)[2]
            self.decoding -= 1
            self.tokens_held -= sequence.prompt_tokens + sequence.output_tokens
            last.append(sequence)
        return last
