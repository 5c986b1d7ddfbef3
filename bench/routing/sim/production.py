"""Pure. The one place that knows how production puts a gateway together (gateway/app.py does
it with sockets).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from bench.routing.policies import COMPARED
from bench.routing.sim.agenda import Agenda
from bench.routing.sim.timing import Loader
from bench.routing.sim.worker import WorkerFacts
from gateway.dispatch.dispatcher import Dispatcher
from gateway.dispatch.queue.admission import Admission
from gateway.dispatch.request import InFlightRequest
from gateway.dispatch.settings import DispatchSettings, TimeAndChance
from gateway.dispatch.workers.outbox import Transport
from gateway.fleet.fleet import Fleet
from gateway.telemetry.ended_request import EndedRequest
from gateway.telemetry.prometheus import Metrics

STRICT = "ray-strict"
LEASE_S = 3.0
"""The production default."""
MAX_REQUESTS = 1_000_000
UNBOUNDED = 1_000_000
"""What a worker behind Ray takes at once: max_ongoing_requests of Ray Serve LLM is without a bound,
and requests queue in the engine.
"""


class NoMetrics(Metrics):
    """Counts nothing; a message that does not decode is a bug here."""

    def dispatched(self, base: str, reason: str) -> None:
        pass

    def finished(self, ended: EndedRequest) -> None:
        pass

    def undecodable(self, socket: str) -> None:
        raise AssertionError(f"the gateway could not decode what came on {socket}")


def policies() -> Sequence[str]:
    """Their names, those to compare with first."""
    return tuple(COMPARED)


def build_dispatcher(
    policy: str,
    max_queued: int,
    queue_timeout_s: float,
    transport: Transport,
    rng: random.Random,
    agenda: Agenda,
) -> Dispatcher:
    """A gateway on virtual time. Raises: KeyError if there is no such policy."""
    admission: Admission[InFlightRequest] = Admission(max_queued, queue_timeout_s)

    def call_at(when: float, call: Callable[[], None]) -> None:
        agenda.at(max(when, agenda.now), call)

    return Dispatcher(
        Fleet(LEASE_S),
        COMPARED[policy](),
        admission,
        transport,
        NoMetrics(),
        DispatchSettings(MAX_REQUESTS),
        TimeAndChance(agenda.clock, rng, call_at),
    )


def worker_facts(policy: str, facts: WorkerFacts) -> WorkerFacts:
    """What differs between policies on the worker's side."""
    return replace(facts, capacity=UNBOUNDED, kept_by_vllm=True) if policy == STRICT else facts


def loader_of(policy: str, loads: Loader) -> Loader:
    """Behind Ray it is vLLM that loads."""
    return "vllm" if policy == STRICT else loads
