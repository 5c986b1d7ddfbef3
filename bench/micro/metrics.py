"""Shell. `python -m bench.micro.metrics`: what it costs to count one request, beside prometheus_client's own counters in the same minutes."""

from __future__ import annotations

import sys
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Histogram

from bench.micro.timing import best_us
from gateway.flight import Flight
from gateway.metrics import DURATION_BUCKETS_S, TTFT_BUCKETS_S, Metrics
from gateway.request import Event
from gateway.routing import Reason
from shared import wire
from shared.adapters import AdapterRef, StoredAdapter
from shared.errors import LoraplexError

REPETITIONS = 7


class Nowhere:
    """A Sink."""

    def comment(self, text: bytes) -> None: ...
    def head(self, status: int, sse: bool, data: bytes, end: bool) -> None: ...
    def fail(self, error: LoraplexError) -> None: ...
    def more(self, data: bytes, end: bool) -> bool:
        return True


def main() -> None:
    """The two take turns, so that what disturbs one disturbs the other."""
    flight = _flight()
    ways = {"plain numbers": _plain(flight), "prometheus_client, children kept": _prometheus(flight)}
    took: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(REPETITIONS):
        for name, call in ways.items():
            took[name].append(best_us(call))
    lines = ["| one request counted by | us, median (least - most) |", "|---|---|"]
    for name, of in took.items():
        lines.append(f"| {name} | {sorted(of)[len(of) // 2]:.2f} ({min(of):.2f} - {max(of):.2f}) |")
    sys.stdout.write("\n".join(lines) + "\n")


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


if __name__ == "__main__":
    main()
