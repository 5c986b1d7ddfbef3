"""Shell. What it costs to count one request, beside prometheus_client's own counters."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Histogram

from bench.micro.conftest import PerUnit
from gateway.dispatch.lifecycle import Event
from gateway.dispatch.request import Flight
from gateway.routing.policy import Reason
from gateway.telemetry.prometheus import DURATION_BUCKETS_S, TTFT_BUCKETS_S, Metrics
from shared.adapters.identity import AdapterRef, StoredAdapter
from shared.errors import LoraplexError
from shared.link import messages as wire


class Nowhere:
    """A Sink."""

    def comment(self, text: bytes) -> None: ...
    def head(self, status: int, sse: bool, data: bytes, end: bool) -> None: ...
    def fail(self, error: LoraplexError) -> None: ...
    def more(self, data: bytes, end: bool) -> bool:
        return True


def test_plain_numbers(per_unit: PerUnit) -> None:
    per_unit(_plain(_flight()), 1, "request")


def test_prometheus_client_with_its_children_kept(per_unit: PerUnit) -> None:
    per_unit(_prometheus(_flight()), 1, "request")


def _flight() -> Flight:
    ref = AdapterRef("base", "adapter", "0" * 16)
    flight = Flight("base", ref, StoredAdapter("adapter", "0" * 16, ()), "/v1/completions", "r", b"{}", Nowhere())
    for event in (Event.DISPATCHED, Event.HEAD, Event.END):
        flight.life.on(event)
    flight.t_start, flight.t_sent, flight.t_head, flight.t_end = 1.0, 1.001, 1.12, 3.0
    flight.done = wire.Done(1, 100, 64)
    return flight


def _plain(flight: Flight) -> Callable[[], None]:
    metrics = Metrics()

    def call() -> None:
        metrics.dispatched("base", Reason.RESIDENT)
        metrics.finished(flight)

    return call


def _prometheus(flight: Flight) -> Callable[[], None]:
    """The same numbers as counters and histograms of prometheus_client whose labelled children were asked for once."""
    registry = CollectorRegistry()
    dispatched = Counter("dispatched", "x", ["base", "reason"], registry=registry).labels("base", "resident")
    requests = Counter("requests", "x", ["base", "outcome"], registry=registry).labels("base", "finished")
    of_adapter = Counter("adapter_requests", "x", ["base", "adapter"], registry=registry).labels("base", "adapter")
    prompt, output = (Counter(name, "x", ["base"], registry=registry).labels("base") for name in ("prompt", "output"))
    duration = Histogram("duration", "x", ["base"], buckets=DURATION_BUCKETS_S, registry=registry).labels("base")
    queue, ttft = (Histogram(name, "x", ["base"], buckets=TTFT_BUCKETS_S, registry=registry).labels("base") for name in ("queue", "ttft"))

    def call() -> None:
        dispatched.inc()
        requests.inc()
        duration.observe(flight.t_end - flight.t_start)
        queue.observe(flight.t_sent - flight.t_start)
        ttft.observe(flight.t_head - flight.t_start)
        if flight.done:
            prompt.inc(flight.done.prompt_tokens)
            output.inc(flight.done.output_tokens)
        of_adapter.inc()

    return call
