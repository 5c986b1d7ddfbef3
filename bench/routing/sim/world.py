"""Pure. One run: the production dispatcher, fleet, policy and admission in virtual time, simulated
workers behind it, a workload in front.

Everything between gateway and workers is the production wire format, encoded and decoded; only
sockets, clocks and engines are simulated.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from bench.load.workload import PlannedRequest
from bench.routing.sim.agenda import Agenda
from bench.routing.sim.production import LEASE_S, build_dispatcher, worker_facts
from bench.routing.sim.timing import Timing
from bench.routing.sim.worker import HEARTBEAT_S, SimWorker, WorkerFacts
from gateway.dispatch.dispatcher import Dispatcher
from gateway.dispatch.request import (
    ClientRequest,
    InFlightRequest,
    RequestedModel,
    estimated_tokens,
)
from shared.adapters.identity import AdapterRef, StoredAdapter, StoredFile
from shared.errors import LoraplexError
from shared.link import messages
from shared.link.sockets import SendResult

TICK_S = 0.2
"""As in gateway/__main__.py."""
BYTES_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class Join:
    """More workers from `at_s` on."""

    at_s: float
    workers: int


@dataclass(frozen=True, slots=True)
class Loss:
    """Workers that are gone at `at_s`, with all they had: connections break, as when a process is
    killed.
    """

    at_s: float
    workers: int


@dataclass(frozen=True, slots=True)
class World:
    """Everything about a run but its requests."""

    policy: str
    workers: int
    adapters: int
    seed: int
    timing: Timing = field(default_factory=Timing)
    facts: WorkerFacts = field(default_factory=lambda: WorkerFacts("base"))
    events: tuple[Join | Loss, ...] = ()
    max_queued: int = 1_000_000
    queue_timeout_s: float = 600.0


@dataclass(slots=True, eq=False)
class SimOutcome:
    """How one request went. Times are seconds of virtual time; `ttft_s` is None if no first token
    came, `tier` None if it did not finish. `load_s` is what it waited for its adapter at its
    worker. `expected_s` is what the policy expected of its first token once it was sent.
    """

    request: PlannedRequest
    ttft_s: float | None = None
    sent_s: float = 0.0
    ended_s: float | None = None
    failed: str | None = None
    tier: messages.Tier | None = None
    worker: str = ""
    ends: int = 0
    load_s: float = 0.0
    expected_s: float = 0.0


@dataclass(frozen=True, slots=True)
class LoadSeen:
    """One load into a GPU slot."""

    at_s: float
    worker: str
    adapter: str
    tier: messages.Tier


@dataclass(slots=True)
class SimRun:
    outcomes: list[SimOutcome]
    loads: list[LoadSeen]
    ended_s: float = 0.0
    given_up: bool = False


GiveUp: TypeAlias = Callable[[float, Sequence[SimOutcome]], bool]


class _SimClient:
    """The Sink of one request."""

    __slots__ = ("_inflight", "_outcome", "_sim")

    def __init__(self, sim: Simulation, outcome: SimOutcome) -> None:
        self._sim, self._outcome = sim, outcome
        self._inflight: InFlightRequest | None = None

    def of(self, inflight: InFlightRequest) -> None:
        self._inflight = inflight

    def comment(self, text: bytes) -> None: ...

    def head(self, status: int, sse: bool, data: bytes, end: bool) -> None:
        sim, outcome = self._sim, self._outcome
        outcome.ttft_s = sim.agenda.now - outcome.request.at_s + sim.world.timing.outside_s
        if end:
            self._end()

    def more(self, data: bytes, end: bool) -> bool:
        if end:
            self._end()
        return True

    def fail(self, error: LoraplexError) -> None:
        self._outcome.failed = error.code
        self._end()

    def _end(self) -> None:
        outcome, inflight = self._outcome, self._inflight
        outcome.ends += 1
        outcome.ended_s = self._sim.agenda.now
        if inflight is not None:
            outcome.sent_s = inflight.t_sent
            if inflight.done is not None:
                outcome.tier, outcome.load_s = inflight.done.tier, inflight.done.load_s
            if inflight.choice is not None:
                outcome.worker = inflight.choice.worker.id
                if inflight.choice.cost is not None:
                    outcome.expected_s = inflight.choice.cost.ttft_s
            # they know each other, and runs are made without the garbage collector
            self._inflight = None
        self._sim.open -= 1
        self._sim.request_ended()


class _Wires:
    """The dispatcher's Transport: what is sent arrives `link_s` later."""

    def __init__(self, agenda: Agenda, link_s: float) -> None:
        self._agenda, self._link_s = agenda, link_s
        self.workers: dict[bytes, SimWorker] = {}

    def send_data(self, peer: bytes, data: bytes) -> SendResult:
        worker = self.workers.get(peer)
        if worker is None or not worker.alive:
            return SendResult.GONE
        self._agenda.after(self._link_s, worker.receive, data)
        return SendResult.OK

    def welcome(self, peer: bytes) -> messages.Welcome:
        return messages.Welcome("g0", "virtual", LEASE_S, HEARTBEAT_S)

    def forget(self, peer: bytes) -> None:
        """What the simulated link has lost is lost: it has no channels."""

    def send_control(self, peer: bytes, data: bytes) -> SendResult:
        # Welcome and Farewell: the simulated worker needs neither
        return SendResult.OK if peer in self.workers else SendResult.GONE


class Simulation:
    """Built for one run. `give_up(now, outcomes)` is asked at each arrival and may end the run
    early by returning True.
    """

    def __init__(
        self, world: World, requests: Iterable[PlannedRequest], give_up: GiveUp | None = None
    ) -> None:
        self.world = world
        self.agenda = Agenda()
        self.open = 0
        self._requests = iter(requests)
        self._give_up = give_up
        self._run = SimRun([], [])
        self._wires = _Wires(self.agenda, world.timing.link_s)
        rng = random.Random(f"{world.seed}/policy")
        self.dispatcher: Dispatcher = build_dispatcher(
            world.policy, world.max_queued, world.queue_timeout_s, self._wires, rng, self.agenda
        )
        self._facts = worker_facts(world.policy, world.facts)
        self._refs = [
            _adapter(world.facts.base, index, world.facts.adapter_bytes)
            for index in range(world.adapters)
        ]
        self._lengths: dict[str, tuple[int, int]] = {}
        self.workers: list[SimWorker] = []
        self._arriving = True

    def run(self) -> SimRun:
        """To the end of the last request (or until somebody gave up)."""
        self.begin()
        self.agenda.run(self._going)
        self._run.ended_s = self.agenda.now
        return self._run

    def begin(self) -> None:
        """What happens next is on the agenda from now on."""
        self._join(self.world.workers)
        for event in self.world.events:
            self.agenda.at(
                event.at_s, self._join if isinstance(event, Join) else self._lose, event.workers
            )
        self.agenda.after(TICK_S, self._tick)
        self._next()

    def _going(self) -> bool:
        return (self._arriving or self.open > 0) and not self._run.given_up

    # ---- events ----------------------------------------------------------------------------------

    def _next(self) -> None:
        request = next(self._requests, None)
        if request is None:
            self._arriving = False
        else:
            self.agenda.at(max(request.at_s, self.agenda.now), self._arrive, request)

    def _arrive(self, request: PlannedRequest) -> None:
        self._next()
        outcome = SimOutcome(request)
        self._run.outcomes.append(outcome)
        if self._give_up is not None and self._give_up(self.agenda.now, self._run.outcomes):
            self._run.given_up = True
            return
        request_id = str(request.index)
        self._lengths[request_id] = (request.prompt_tokens, request.output_tokens)
        ref, stored = (None, None) if request.adapter is None else self._refs[request.adapter]
        client = _SimClient(self, outcome)
        body = _body(request)
        inflight = InFlightRequest(
            ClientRequest("/v1/completions", request_id, body, estimated_tokens(body)),
            RequestedModel(self.world.facts.base, ref, stored),
            client,
        )
        client.of(inflight)
        self.open += 1
        try:
            self.dispatcher.submit(inflight)
        except LoraplexError as refusal:
            client.fail(refusal)

    def request_ended(self) -> None:
        """For those who send the next one then."""

    def _tick(self) -> None:
        self.dispatcher.tick()
        self.agenda.after(TICK_S, self._tick)

    def _join(self, number: int) -> None:
        for _ in range(number):
            worker = SimWorker(
                f"w{len(self.workers):04}",
                self._facts,
                self.world.timing,
                self.agenda,
                self._lengths.__getitem__,
                self.dispatcher.inbox.on_control,
                self.dispatcher.inbox.on_data,
            )
            worker.on_load = self._watch(worker.id)
            self.workers.append(worker)
            self._wires.workers[worker.peer] = worker
            # Workers do not send heartbeats in step.
            self.agenda.after(
                self._facts.heartbeat_s * (len(self.workers) * 0.618 % 1.0)
                if self.agenda.now
                else 0.0,
                self._joins,
                worker,
            )

    def _joins(self, worker: SimWorker) -> None:
        worker.join()
        view = self.dispatcher.fleet.get(worker.id)
        if view is not None and self.world.facts.disk_warm:
            # what lies on a host's disk was fetched for somebody, and the gateway remembers it
            for ref, _ in self._refs:
                self.dispatcher.fleet.cached(view, ref)

    def _watch(self, worker: str) -> Callable[[AdapterRef, messages.Tier], None]:
        return lambda adapter, tier: self._run.loads.append(
            LoadSeen(self.agenda.now, worker, adapter.name, tier)
        )

    def _lose(self, number: int) -> None:
        for worker in [w for w in self.workers if w.alive][:number]:
            worker.die()


def simulate(
    world: World, requests: Sequence[PlannedRequest], give_up: GiveUp | None = None
) -> SimRun:
    """The run of these requests (in order of arrival) in this world. The same arguments give the
    same run.
    """
    return Simulation(world, requests, give_up).run()


def adapter_name(index: int) -> str:
    return f"a{index:05}"


def _adapter(base: str, index: int, size_bytes: int) -> tuple[AdapterRef, StoredAdapter]:
    name, digest = adapter_name(index), f"{index:016x}"
    return AdapterRef(base, name, digest), StoredAdapter(
        name, digest, (StoredFile("adapter_model.safetensors", size_bytes, "1"),)
    )


def _body(request: PlannedRequest) -> bytes:
    """As long as a prompt of so many tokens is, and like no other from its first bytes on: nothing
    to gain from prefix affinity.
    """
    head = b'{"prompt": "%d ' % request.index
    return head.ljust(BYTES_PER_TOKEN * request.prompt_tokens, b".")
