"""Shell. What it costs to count one request, beside prometheus_client's own counters."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Histogram

from bench.micro.conftest import PerUnit
from gateway.telemetry.ended_request import EndedRequest
from gateway.telemetry.metric_definitions import DURATION_BUCKETS_S, TTFT_BUCKETS_S
from gateway.telemetry.prometheus import Metrics
from shared.link import messages


def test_plain_numbers(per_unit: PerUnit) -> None:
    per_unit(_plain(_ended()), 1, "request")


def test_prometheus_client_with_its_children_kept(per_unit: PerUnit) -> None:
    per_unit(_prometheus(_ended()), 1, "request")


def _ended() -> EndedRequest:
    done = messages.Done(1, 100, 64)
    return EndedRequest("base", "adapter", "finished", done, 1.0, 1.001, 1.12, 3.0)


def _plain(ended: EndedRequest) -> Callable[[], None]:
    metrics = Metrics()

    def call() -> None:
        metrics.dispatched("base", "resident")
        metrics.finished(ended)

    return call


def _prometheus(ended: EndedRequest) -> Callable[[], None]:
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
        duration.observe(ended.t_end - ended.t_start)
        queue.observe(ended.t_sent - ended.t_start)
        ttft.observe(ended.t_head - ended.t_start)
        if ended.done:
            prompt.inc(ended.done.prompt_tokens)
            output.inc(ended.done.output_tokens)
        of_adapter.inc()

    return call
