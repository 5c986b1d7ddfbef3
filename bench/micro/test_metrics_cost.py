"""Shell. What it costs to count one request, beside prometheus_client's own counters."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Histogram

from bench.micro.conftest import PerUnit
from gateway.dispatch.lifecycle import RequestEvent
from gateway.dispatch.request import InFlightRequest
from gateway.routing.policy import ChoiceReason
from gateway.telemetry.prometheus import DURATION_BUCKETS_S, TTFT_BUCKETS_S, Metrics
from shared.adapters.identity import AdapterRef, StoredAdapter
from shared.errors import LoraplexError
from shared.link import messages


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


def _flight() -> InFlightRequest:
    ref = AdapterRef("base", "adapter", "0" * 16)
    inflight = InFlightRequest(
        "base",
        ref,
        StoredAdapter("adapter", "0" * 16, ()),
        "/v1/completions",
        "r",
        b"{}",
        Nowhere(),
    )
    for event in (RequestEvent.DISPATCHED, RequestEvent.HEAD, RequestEvent.END):
        inflight.life.on(event)
    inflight.t_start, inflight.t_sent, inflight.t_head, inflight.t_end = 1.0, 1.001, 1.12, 3.0
    inflight.done = messages.Done(1, 100, 64)
    return inflight


def _plain(inflight: InFlightRequest) -> Callable[[], None]:
    metrics = Metrics()

    def call() -> None:
        metrics.dispatched("base", ChoiceReason.RESIDENT)
        metrics.finished(inflight)

    return call


def _prometheus(inflight: InFlightRequest) -> Callable[[], None]:
    """The same numbers as counters and histograms of prometheus_client whose labelled children were
    asked for once.
    """
    registry = CollectorRegistry()
    dispatched = Counter("dispatched", "x", ["base", "reason"], registry=registry).labels(
        "base", "resident"
    )
    requests = Counter("requests", "x", ["base", "outcome"], registry=registry).labels(
        "base", "finished"
    )
    of_adapter = Counter("adapter_requests", "x", ["base", "adapter"], registry=registry).labels(
        "base", "adapter"
    )
    prompt, output = (
        Counter(name, "x", ["base"], registry=registry).labels("base")
        for name in ("prompt", "output")
    )
    duration = Histogram(
        "duration", "x", ["base"], buckets=DURATION_BUCKETS_S, registry=registry
    ).labels("base")
    queue, ttft = (
        Histogram(name, "x", ["base"], buckets=TTFT_BUCKETS_S, registry=registry).labels("base")
        for name in ("queue", "ttft")
    )

    def call() -> None:
        dispatched.inc()
        requests.inc()
        duration.observe(inflight.t_end - inflight.t_start)
        queue.observe(inflight.t_sent - inflight.t_start)
        ttft.observe(inflight.t_head - inflight.t_start)
        if inflight.done:
            prompt.inc(inflight.done.prompt_tokens)
            output.inc(inflight.done.output_tokens)
        of_adapter.inc()

    return call
