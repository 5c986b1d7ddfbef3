"""Shell. Every Prometheus series of the gateway. Labels are bounded: base models from the config, fixed sets of words, live workers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gateway.fleet import Fleet
from gateway.flight import Flight
from gateway.request import Phase
from gateway.routing import Reason

TTFT_BUCKETS_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10, 30, 60)
DURATION_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 40, 80, 160, 320, 640)
ADAPTER_LABELS = 200
"""Adapters that get a series of their own, first come; the rest is summed under `_other`."""


class Metrics:
    """Counters are written by the dispatcher and the API; gauges are read off the fleet at scrape time."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels: dict[str, Any] = {"registry": self.registry, "namespace": "loraplex"}
        self._requests = Counter("requests_total", "Requests ended, by how they ended.", ["base", "outcome"], **labels)
        self._adapter_requests = Counter("adapter_requests_total", "Requests ended, by adapter.", ["base", "adapter"], **labels)
        self._dispatched = Counter(
            "dispatched_total", "Requests given to a worker, by the reason of the choice.", ["base", "reason"], **labels
        )
        self._errors = Counter("error_responses_total", "Errors answered by the gateway itself, by code.", ["code"], **labels)
        self._ttft = Histogram(
            "ttft_seconds", "Time from a request's arrival to its first bytes.", ["base", "cold"], buckets=TTFT_BUCKETS_S, **labels
        )
        self._queue = Histogram(
            "queue_seconds", "Time from a request's arrival to its dispatch.", ["base"], buckets=TTFT_BUCKETS_S, **labels
        )
        self._duration = Histogram(
            "request_seconds", "Time from a request's arrival to its end.", ["base"], buckets=DURATION_BUCKETS_S, **labels
        )
        self._prompt = Counter("prompt_tokens_total", "Prompt tokens of ended requests.", ["base"], **labels)
        self._output = Counter("output_tokens_total", "Output tokens of ended requests.", ["base"], **labels)
        self._undecodable = Counter("undecodable_messages_total", "Messages from workers that were dropped.", ["socket"], **labels)
        self.retries = Counter("retries_total", "Requests sent to another worker before their first byte.", **labels)
        self.slow_readers = Counter("slow_readers_total", "Clients cut off because they did not read.", **labels)
        self._version_changes = Counter(
            "adapter_version_changes_total", "New adapter versions: switched to, refused, or not ready yet.", ["base", "outcome"], **labels
        )
        self._alias_requests = Counter(
            "alias_requests_total", "Requests by alias and the share that answered.", ["base", "alias", "adapter", "outcome"], **labels
        )
        self._alias_rollbacks = Counter("alias_rollbacks_total", "Shares of aliases that were rolled back.", ["base", "alias"], **labels)
        self._adapters: set[tuple[str, str]] = set()
        self._aliases: set[tuple[str, str, str]] = set()
        # labels() costs several times as much as counting: every child is asked for once.
        self._of_reason: dict[tuple[str, Reason], Any] = {}
        self._of_base: dict[str, tuple[Any, ...]] = {}
        self._of_outcome: dict[tuple[str, Phase], Any] = {}

    def watch(self, fleet: Fleet, depth: Mapping[str, Callable[[], int]]) -> None:
        """Registers the gauges; `depth` maps each base model to a function that counts its queue."""
        self.registry.register(FleetCollector(fleet, depth))

    def dispatched(self, base: str, reason: Reason) -> None:
        child = self._of_reason.get((base, reason))
        if child is None:
            child = self._of_reason[base, reason] = self._dispatched.labels(base, reason.value)
        child.inc()

    def undecodable(self, socket: str) -> None:
        self._undecodable.labels(socket).inc()

    def error(self, code: str) -> None:
        self._errors.labels(code).inc()

    def version_change(self, base: str, outcome: str) -> None:
        """`outcome`: switched, refused or failed."""
        self._version_changes.labels(base, outcome).inc()

    def alias_request(self, base: str, alias: str, adapter: str, failed: bool) -> None:
        if (base, alias, adapter) not in self._aliases:
            if len(self._aliases) >= ADAPTER_LABELS:
                alias = adapter = "_other"
            self._aliases.add((base, alias, adapter))
        self._alias_requests.labels(base, alias, adapter, "failed" if failed else "ok").inc()

    def alias_rollback(self, base: str, alias: str) -> None:
        self._alias_rollbacks.labels(base, alias if any(a[:2] == (base, alias) for a in self._aliases) else "_other").inc()

    def watch_versions(self, refused: Mapping[str, Callable[[], int]]) -> None:
        """Registers a gauge; `refused` maps each base model to a function that counts the adapters whose newest version is not served."""
        self.registry.register(VersionCollector(refused))

    def finished(self, flight: Flight) -> None:
        base, phase = flight.base, flight.life.phase
        outcome = self._of_outcome.get((base, phase))
        if outcome is None:
            outcome = self._of_outcome[base, phase] = self._requests.labels(base, phase.value)
        outcome.inc()
        series = self._of_base.get(base)
        if series is None:
            series = self._of_base[base] = (
                self._duration.labels(base),
                self._queue.labels(base),
                self._ttft.labels(base, "yes"),
                self._ttft.labels(base, "no"),
                self._prompt.labels(base),
                self._output.labels(base),
            )
        duration, queue, ttft_cold, ttft_warm, prompt, output = series
        duration.observe(flight.t_end - flight.t_start)
        if flight.t_sent:
            queue.observe(flight.t_sent - flight.t_start)
        done = flight.done
        if flight.t_head:
            (ttft_cold if done and done.load_s > 0 else ttft_warm).observe(flight.t_head - flight.t_start)
        if done:
            prompt.inc(done.prompt_tokens)
            output.inc(done.output_tokens)
        if flight.adapter is not None and flight.life.phase is Phase.FINISHED:
            self._adapter_requests.labels(base, self._adapter_label(base, flight.adapter.name)).inc()

    def render(self) -> bytes:
        return generate_latest(self.registry)

    def _adapter_label(self, base: str, adapter: str) -> str:
        if (base, adapter) in self._adapters:
            return adapter
        if len(self._adapters) < ADAPTER_LABELS:
            self._adapters.add((base, adapter))
            return adapter
        return "_other"


class FleetCollector(Collector):
    """Gauges of the fleet as of the scrape; workers that left leave no stale series."""

    def __init__(self, fleet: Fleet, depth: Mapping[str, Callable[[], int]]) -> None:
        self._fleet = fleet
        self._depth = depth

    def collect(self) -> Iterable[Metric]:
        names = ["worker", "base"]
        up = GaugeMetricFamily("loraplex_worker_up", "1 for every worker with a valid lease.", labels=[*names, "state"])
        load = GaugeMetricFamily("loraplex_worker_load", "Requests on the worker.", labels=names)
        capacity = GaugeMetricFamily("loraplex_worker_capacity", "Requests that the worker takes at once.", labels=names)
        slots = GaugeMetricFamily("loraplex_worker_slots", "Adapter slots of the worker.", labels=names)
        used = GaugeMetricFamily("loraplex_worker_adapters", "Adapters that the worker holds, by tier.", labels=[*names, "tier"])
        kv = GaugeMetricFamily("loraplex_worker_kv_usage_ratio", "Share of the KV cache in use.", labels=names)
        for w in self._fleet:
            at = [w.id, w.beat.base]
            up.add_metric([*at, w.beat.state.name.lower()], 1)
            load.add_metric(at, w.load)
            capacity.add_metric(at, w.beat.capacity)
            slots.add_metric(at, w.beat.slots)
            kv.add_metric(at, w.beat.kv_usage)
            tiers = [a.tier.name.lower() for a in w.beat.adapters]
            for tier in ("gpu", "cpu", "disk"):
                used.add_metric([*at, tier], tiers.count(tier))
        queue = GaugeMetricFamily("loraplex_queue_depth", "Requests that wait for a worker.", labels=["base"])
        for base, depth in self._depth.items():
            queue.add_metric([base], depth())
        return [up, load, capacity, slots, used, kv, queue]


class VersionCollector(Collector):
    def __init__(self, refused: Mapping[str, Callable[[], int]]) -> None:
        self._refused = refused

    def collect(self) -> Iterable[Metric]:
        gauge = GaugeMetricFamily(
            "loraplex_adapters_refused", "Adapters whose newest version is invalid while an older one is served.", labels=["base"]
        )
        for base, count in self._refused.items():
            gauge.add_metric([base], count())
        return [gauge]
