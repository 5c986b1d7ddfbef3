"""Shell. What an event costs a gateway with a long queue: the production dispatcher, policy, fleet
and queue in the middle of a simulated run.

The run stops before each call in which the gateway looks at its queue, and only that call is timed.
The calls are arrivals, ends and heartbeats, as they come under load. With 500 adapters, 8 workers
run out of slots and 64 out of room. With 4,000 adapters, the 64 run out of slots.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from bench.load.workload import (
    Fixed,
    PlannedRequest,
    Poisson,
    UniformLength,
    Workload,
    Zipf,
    requests,
)
from bench.routing.sim.worker import WorkerFacts
from bench.routing.sim.world import Simulation, World
from gateway.routing.registry import DEFAULT
from shared.link import messages

CASES = [
    (workers, adapters, queued)
    for queued in (1_000, 10_000)
    for workers, adapters in ((8, 500), (64, 500), (64, 4_000))
]
CAPACITY = 64
RPS_PER_WORKER, CROWD_RPS = 5, 10_000
"""Less than what is served, and what comes as long as the queue is shorter than it should be."""
SETTLE_S = 8.0
"""Longer than the age at which requests claim slots, and until ends come one by one."""
CALLS = 3_000


class Stopping:
    """A run that stops before each call of its gateway."""

    def __init__(self, workers: int, adapters: int, queued: int) -> None:
        self._queued = queued
        self._load = Workload(
            Poisson(RPS_PER_WORKER * workers),
            Zipf(1.0),
            adapters,
            Fixed(128),
            UniformLength(32, 224),
            seed=1,
        )
        world = World(DEFAULT, workers, adapters, 1, facts=WorkerFacts("base", capacity=CAPACITY))
        self._sim = Simulation(world, self._requests())
        self._calls: deque[Callable[[], None]] = deque()
        self._gateway = self._sim.dispatcher
        self._gateway.submit = self._noting(self._gateway.submit)  # type: ignore[method-assign]
        inbox: Any = self._gateway.inbox
        inbox.on_control = self._noting(inbox.on_control)
        inbox.on_data = self._noting_all_but_first_tokens(inbox.on_data)
        self._sim.begin()
        while self._gateway.queued("base") < queued or self._sim.agenda.now < SETTLE_S:
            self.next()()

    def next(self) -> Callable[[], None]:
        """The next call of the gateway."""
        self._sim.agenda.run(lambda: not self._calls)
        return self._calls.popleft()

    def _noting(self, call: Callable[..., None]) -> Callable[..., None]:
        return lambda *arguments: self._calls.append(lambda: call(*arguments))

    def _noting_all_but_first_tokens(
        self, call: Callable[[bytes, bytes], None]
    ) -> Callable[[bytes, bytes], None]:
        noting = self._noting(call)

        def on_data(peer: bytes, data: bytes) -> None:
            message = messages.decode_worker_data(data)
            (call if isinstance(message, messages.Step) and not message.done else noting)(
                peer, data
            )

        return on_data

    def _requests(self) -> Iterator[PlannedRequest]:
        at_s = 0.0
        for request in requests(self._load):
            rate = (
                CROWD_RPS
                if self._gateway.queued("base") < self._queued
                else RPS_PER_WORKER * self._sim.world.workers
            )
            at_s = max(at_s, self._sim.agenda.now) + 1 / rate
            yield replace(request, at_s=at_s)


@pytest.mark.parametrize(("workers", "adapters", "queued"), CASES, ids=lambda number: f"{number:,}")
def test_event_with_a_long_queue(benchmark: Any, workers: int, adapters: int, queued: int) -> None:
    run = Stopping(workers, adapters, queued if benchmark.enabled else 20)
    benchmark.pedantic(lambda call: call(), setup=lambda: ((run.next(),), {}), rounds=CALLS)
