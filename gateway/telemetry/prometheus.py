"""Shell. Every Prometheus series of the gateway. Labels are bounded: base models from the config,
fixed sets of words, live workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from gateway.fleet.fleet import Fleet
from gateway.supervisor.autoscaling.reports import ModelStatus
from gateway.telemetry.counters import CounterSet, Distribution, Snapshot
from gateway.telemetry.ended_request import EndedRequest
from gateway.telemetry.recorder import Recorder
from shared.link.messages import EVICTIONS, Tier, WorkerState

TTFT_BUCKETS_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10, 30, 60)
DURATION_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 40, 80, 160, 320, 640)
ADAPTER_LABELS = 200
"""Adapters that get a series of their own in each gateway process, first come; the rest is summed
under `_other`.
"""
USAGE_LABELS = 500
"""The same for what a key used of an adapter."""
OTHER = "_other"
TENANT_LABELS = {"key", "adapter", "adapter_name", "alias"}
"""Labels whose values tell one tenant of others."""

COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "requests": ("Requests ended, by how they ended.", ("base", "outcome")),
    "adapter_requests": ("Requests ended, by adapter.", ("base", "adapter")),
    "dispatched": ("Requests given to a worker, by the reason of the choice.", ("base", "reason")),
    "error_responses": ("Errors answered by the gateway itself, by code.", ("code",)),
    "prompt_tokens": ("Prompt tokens of ended requests.", ("base",)),
    "output_tokens": ("Output tokens of ended requests.", ("base",)),
    "undecodable_messages": ("Messages from workers that were dropped.", ("socket",)),
    "retries": ("Requests sent to another worker before their first byte.", ()),
    "internal_errors": ("Requests that failed because code of the gateway raised.", ()),
    "reservation_repairs": ("Reservations and requests that had lost each other.", ()),
    "streams_moved": (
        "Answers that another worker continued, by what ended the one before.",
        ("reason",),
    ),
    "streams_lost": (
        "Answers that broke off, by why no other worker could continue them.",
        ("reason",),
    ),
    "link_gaps": ("Times that a message from a worker was missing and asked for again.", ()),
    "link_resent": ("Messages that were sent to a worker again.", ()),
    "slow_readers": ("Clients cut off because they did not read.", ()),
    "adapter_version_changes": (
        "New adapter versions: switched to, refused, or not ready yet.",
        ("base", "outcome"),
    ),
    "alias_requests": (
        "Requests by alias and the share that answered.",
        ("base", "alias", "adapter", "outcome"),
    ),
    "usage_requests": ("Requests that used tokens, by key.", ("key", "base", "adapter")),
    "usage_prompt_tokens": ("Prompt tokens, by key.", ("key", "base", "adapter")),
    "usage_output_tokens": (
        "Output tokens by key, also of answers whose client left.",
        ("key", "base", "adapter"),
    ),
    "alias_rollbacks": ("Shares of aliases that were rolled back.", ("base", "alias")),
}
DISTRIBUTIONS: dict[str, tuple[str, tuple[str, ...], Sequence[float]]] = {
    "ttft_seconds": (
        "Time from a request's arrival to its first bytes.",
        ("base", "cold"),
        TTFT_BUCKETS_S,
    ),
    "queue_seconds": ("Time from a request's arrival to its dispatch.", ("base",), TTFT_BUCKETS_S),
    "request_seconds": ("Time from a request's arrival to its end.", ("base",), DURATION_BUCKETS_S),
}
GAUGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "queue_depth": ("Requests that wait for a worker in one gateway process.", ("base", "process")),
    "ongoing_requests": (
        "Requests of one gateway process that wait or run: the load that scaling looks at.",
        ("base", "process"),
    ),
}
BOUNDS = {name: bounds for name, (_, _, bounds) in DISTRIBUTIONS.items()}
WITHOUT_LABELS = [(name,) for name, (_, labels) in COUNTERS.items() if not labels]
FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class Watched:
    """What is counted only when somebody asks for the metrics.

    By base model: `queued` counts the requests in the queue, `refused` the adapters whose newest
    version is not served, `skipped` the folders of the store that are none, by reason.
    """

    fleet: Fleet | None = None
    queued: Mapping[str, Callable[[], int]] = field(default_factory=dict)
    refused: Mapping[str, Callable[[], int]] = field(default_factory=dict)
    skipped: Mapping[str, Callable[[], Mapping[str, int]]] = field(default_factory=dict)


NOTHING_WATCHED = Watched()


class Metrics:
    """One process's numbers, counted by the dispatcher and the API; gauges are read off the fleet
    at scrape time. `recorder` remembers the last hour of it; `clock` is the dispatcher's.
    """

    def __init__(
        self,
        process: str = "g0",
        watched: Watched = NOTHING_WATCHED,
        recorder: Recorder | None = None,
        clock: Callable[[], float] = float,
    ) -> None:
        self.process = process
        self.recorder = Recorder() if recorder is None else recorder
        self._clock = clock
        self._watched = watched
        self._counters = CounterSet(BOUNDS)
        self._aliases: set[tuple[str, str, str]] = set()
        self._adapters: set[tuple[str, str]] = set()
        self._usage: set[tuple[str, str, str]] = set()
        self._scaling: Callable[[], Mapping[str, ModelStatus]] = dict
        self._of_base: dict[str, tuple[Distribution, Distribution, Distribution, Distribution]] = {}
        for key in WITHOUT_LABELS:
            self._counters.count(key, 0)

    def watch_scaling(self, scaling: Callable[[], Mapping[str, ModelStatus]]) -> None:
        """`scaling` is what the supervisor has said last of each base model."""
        self._scaling = scaling

    # ---- counting --------------------------------------------------------------------------------

    def dispatched(self, base: str, reason: str) -> None:
        self._counters.count(("dispatched", base, reason))

    def undecodable(self, socket: str) -> None:
        self._counters.count(("undecodable_messages", socket))

    def error(self, code: str) -> None:
        self._counters.count(("error_responses", code))
        self.recorder.error(code, self._clock())

    def retried(self) -> None:
        self._counters.count(("retries",))

    def internal_error(self) -> None:
        self._counters.count(("internal_errors",))

    def repaired(self, count: int) -> None:
        self._counters.count(("reservation_repairs",), count)

    def moved(self, reason: str) -> None:
        self._counters.count(("streams_moved", reason))

    def lost(self, reason: str) -> None:
        self._counters.count(("streams_lost", reason))

    def link_gap(self) -> None:
        self._counters.count(("link_gaps",))

    def link_resent(self, messages: int) -> None:
        self._counters.count(("link_resent",), messages)

    def slow_reader(self) -> None:
        self._counters.count(("slow_readers",))

    def version_change(self, base: str, outcome: str) -> None:
        """`outcome`: switched, refused or failed."""
        self._counters.count(("adapter_version_changes", base, outcome))

    def alias_request(self, base: str, alias: str, adapter: str, failed: bool) -> None:
        if (base, alias, adapter) not in self._aliases:
            if len(self._aliases) >= ADAPTER_LABELS:
                alias = adapter = OTHER
            self._aliases.add((base, alias, adapter))
        self._counters.count(("alias_requests", base, alias, adapter, "failed" if failed else "ok"))

    def alias_rollback(self, base: str, alias: str) -> None:
        self._counters.count(
            (
                "alias_rollbacks",
                base,
                alias if any(a[:2] == (base, alias) for a in self._aliases) else OTHER,
            )
        )

    def used(
        self, key: str, base: str, adapter: str, prompt_tokens: int, output_tokens: int
    ) -> None:
        of = (key, base, adapter)
        if of not in self._usage:
            if len(self._usage) < USAGE_LABELS:
                self._usage.add(of)
            else:
                of = (OTHER, base, OTHER)
        count = self._counters.count
        count(("usage_requests", *of))
        count(("usage_prompt_tokens", *of), prompt_tokens)
        count(("usage_output_tokens", *of), output_tokens)

    def refused(self, ended: EndedRequest) -> None:
        """A request that the dispatcher did not let in; its answer counts as an error."""
        self.recorder.refused(ended)

    def finished(self, ended: EndedRequest) -> None:
        self.recorder.ended(ended)
        base, done, start = ended.base, ended.done, ended.t_start
        count = self._counters.count
        series = self._of_base.get(base)
        if series is None:
            of = self._counters.distribution
            keys = (
                ("request_seconds", base),
                ("queue_seconds", base),
                ("ttft_seconds", base, "yes"),
                ("ttft_seconds", base, "no"),
            )
            series = self._of_base[base] = (of(keys[0]), of(keys[1]), of(keys[2]), of(keys[3]))
        duration, queue, ttft_cold, ttft_warm = series
        count(("requests", base, ended.outcome))
        duration.observe(ended.t_end - start)
        if ended.t_sent:
            queue.observe(ended.t_sent - start)
        if ended.t_head:
            (ttft_cold if done is not None and done.load_s > 0 else ttft_warm).observe(
                ended.t_head - start
            )
        if done is not None:
            count(("prompt_tokens", base), done.prompt_tokens)
            count(("output_tokens", base), done.output_tokens)
        if ended.adapter is not None and ended.outcome == FINISHED:
            count(("adapter_requests", base, self._adapter_label(base, ended.adapter)))

    # ---- telling ---------------------------------------------------------------------------------

    def value(self, name: str, labels: Mapping[str, str]) -> float | None:
        """One series of this process, as a scrape would show it."""
        return self._registry([self.snapshot()], {}).get_sample_value(name, dict(labels))

    def snapshot(self) -> Snapshot:
        gauges = [
            (("queue_depth", base, self.process), float(depth()))
            for base, depth in self._watched.queued.items()
        ]
        if self._watched.fleet is not None:
            own = self._watched.fleet.own_requests()
            gauges += [
                (("ongoing_requests", base, self.process), float(depth() + own.get(base, 0)))
                for base, depth in self._watched.queued.items()
            ]
        return self._counters.snapshot(self.process, gauges)

    def restore(self, before: Snapshot) -> None:
        """Goes on where an earlier life of this process ended, so that no counter ever falls."""
        self._counters.add(before)
        self._adapters |= {
            (key[1], key[2])
            for key in self._counters.counters
            if key[0] == "adapter_requests" and key[2] != OTHER
        }
        self._usage |= {
            (key[1], key[2], key[3])
            for key in self._counters.counters
            if key[0] == "usage_requests" and key[1] != OTHER
        }

    def render(
        self, snapshots: Sequence[Snapshot], answered: Mapping[str, bool], *, tenants: bool = True
    ) -> bytes:
        """The sum of what all gateway processes counted; `answered` says of each whether its part
        is of now. Without `tenants` it has no series that tells one tenant of others.
        """
        registry = self._registry(snapshots, answered)
        return generate_latest(registry if tenants else WithoutTenants(registry))

    def _registry(
        self, snapshots: Sequence[Snapshot], answered: Mapping[str, bool]
    ) -> CollectorRegistry:
        registry = CollectorRegistry()
        registry.register(ProcessCollector(snapshots, answered))
        if self._watched.fleet is not None:
            registry.register(FleetCollector(self._watched.fleet))
        registry.register(VersionCollector(self._watched.refused, self._watched.skipped))
        registry.register(ScalingCollector(self._scaling()))
        return registry

    def _adapter_label(self, base: str, adapter: str) -> str:
        if (base, adapter) in self._adapters:
            return adapter
        if len(self._adapters) < ADAPTER_LABELS:
            self._adapters.add((base, adapter))
            return adapter
        return OTHER


class WithoutTenants(CollectorRegistry):
    """A registry without the series that tell one tenant of others."""

    def __init__(self, whole: CollectorRegistry) -> None:
        super().__init__()
        self._whole = whole

    def collect(self) -> Iterable[Metric]:
        for family in self._whole.collect():
            if all(TENANT_LABELS.isdisjoint(sample.labels) for sample in family.samples):
                yield family


class ProcessCollector(Collector):
    """What the gateway processes counted: counters and histograms summed, gauges one by one."""

    def __init__(self, snapshots: Sequence[Snapshot], answered: Mapping[str, bool]) -> None:
        self._snapshots = snapshots
        self._answered = answered

    def collect(self) -> Iterable[Metric]:
        total = CounterSet(BOUNDS)
        served = GaugeMetricFamily(
            "loraplex_gateway_requests",
            "Requests that ended in one gateway process.",
            labels=["process"],
        )
        for snapshot in self._snapshots:
            total.add(snapshot)
            served.add_metric(
                [snapshot.process],
                sum(value for key, value in snapshot.counters if key[0] == "requests"),
            )
        yield from _counters(total)
        yield from _distributions(total)
        for name, (text, labels) in GAUGES.items():
            gauge = GaugeMetricFamily(f"loraplex_{name}", text, labels=labels)
            for key, value in (
                row
                for s in self._snapshots
                if self._answered.get(s.process, True)
                for row in s.gauges
                if row[0][0] == name
            ):
                gauge.add_metric(key[1:], value)
            yield gauge
        yield served
        up = GaugeMetricFamily(
            "loraplex_gateway_process_up",
            "0 for a gateway process that did not tell its numbers in time: they are its last.",
            labels=["process"],
        )
        for process, answered in self._answered.items():
            up.add_metric([process], float(answered))
        yield up


def _counters(total: CounterSet) -> Iterable[Metric]:
    families = {
        name: CounterMetricFamily(f"loraplex_{name}", text, labels=labels)
        for name, (text, labels) in COUNTERS.items()
    }
    for key, value in total.counters.items():
        if key[0] in families:
            families[key[0]].add_metric(key[1:], value)
    return families.values()


def _distributions(total: CounterSet) -> Iterable[Metric]:
    families = {
        name: HistogramMetricFamily(f"loraplex_{name}", text, labels=labels)
        for name, (text, labels, _) in DISTRIBUTIONS.items()
    }
    for key, found in total.distributions.items():
        below, buckets = 0, []
        for bound, count in zip((*found.bounds, float("inf")), found.counts, strict=True):
            below += count
            buckets.append((str(float(bound)) if bound < float("inf") else "+Inf", below))
        families[key[0]].add_metric(key[1:], buckets, found.total)
    return families.values()


LEVELS = {Tier.GPU: "gpu", Tier.CPU: "cpu"}


class FleetCollector(Collector):
    """Gauges of the fleet as this process sees it at the scrape; workers that left leave no stale
    series.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterable[Metric]:
        names = ["worker", "base"]
        up = GaugeMetricFamily(
            "loraplex_worker_up", "1 for every worker with a valid lease.", labels=[*names, "state"]
        )
        load = GaugeMetricFamily("loraplex_worker_load", "Requests on the worker.", labels=names)
        capacity = GaugeMetricFamily(
            "loraplex_worker_capacity", "Requests that the worker takes at once.", labels=names
        )
        slots = GaugeMetricFamily(
            "loraplex_worker_slots", "Adapter slots of the worker.", labels=names
        )
        used = GaugeMetricFamily(
            "loraplex_worker_adapters",
            "Adapters that the worker holds, by tier.",
            labels=[*names, "tier"],
        )
        kv = GaugeMetricFamily(
            "loraplex_worker_kv_usage_ratio", "Share of the KV cache in use.", labels=names
        )
        loads = CounterMetricFamily(
            "loraplex_adapter_loads_total",
            "Adapters that a worker has brought into a slot, by the tier that they came from.",
            labels=[*names, "tier"],
        )
        evictions = CounterMetricFamily(
            "loraplex_adapter_evictions_total",
            "Adapters that have left a tier of a worker, by the reason.",
            labels=[*names, "tier", "reason"],
        )
        for w in self._fleet:
            at = [w.id, w.beat.base]
            for tier in ("cpu", "disk", "remote"):
                loads.add_metric([*at, tier], w.beat.adapter_loads.get(tier, 0))
            for what in EVICTIONS:
                number = w.beat.adapter_evictions.get(what, 0)
                evictions.add_metric([*at, *what.split(":")], number)
            state = w.beat.state
            if state is WorkerState.SERVING and not w.routable:
                # it beats, but its data link is not there (yet): nothing can be sent to it
                state = WorkerState.JOINING
            up.add_metric([*at, state.name.lower()], 1)
            load.add_metric(at, w.load)
            capacity.add_metric(at, w.beat.capacity)
            slots.add_metric(at, w.beat.slots)
            kv.add_metric(at, w.beat.kv_usage)
            tiers = [a.tier.name.lower() for a in w.beat.adapters]
            for tier in ("gpu", "cpu", "disk"):
                used.add_metric([*at, tier], tiers.count(tier))
        return [up, load, capacity, slots, used, kv, loads, evictions, *self._residency()]

    def _residency(self) -> Iterable[Metric]:
        """In the names that vLLM is about to give them (vllm-project/vllm issue 51433), so that
        other schedulers can read them; with the worker besides.
        """
        names = ["worker", "model_name"]
        loaded = GaugeMetricFamily(
            "vllm:lora_adapter_loaded",
            "1 for each adapter in a slot (gpu) or in host memory (cpu) of a worker.",
            labels=[*names, "adapter_name", "level", "pinned", "rank"],
        )
        count = GaugeMetricFamily(
            "vllm:num_gpu_loaded_lora_adapters", "Adapters in a worker's slots.", labels=names
        )
        most = GaugeMetricFamily(
            "vllm:max_gpu_lora_adapters", "Adapter slots of a worker.", labels=names
        )
        for w in self._fleet:
            at = [w.id, w.beat.base]
            count.add_metric(at, len(w.loaded))
            most.add_metric(at, w.beat.slots)
            there = [a for a in w.beat.adapters if a.tier in LEVELS and not a.loading]
            versions = {(a.name, a.tier): a for a in sorted(there, key=lambda a: a.pinned)}
            for a in sorted(versions.values(), key=lambda a: a.tier)[:ADAPTER_LABELS]:
                pinned = "true" if a.pinned else "false"
                loaded.add_metric([*at, a.name, LEVELS[a.tier], pinned, str(a.rank)], 1)
        return [loaded, count, most]


class VersionCollector(Collector):
    """As this process sees it: each switches on its own."""

    def __init__(
        self,
        refused: Mapping[str, Callable[[], int]],
        skipped: Mapping[str, Callable[[], Mapping[str, int]]],
    ) -> None:
        self._refused, self._skipped = refused, skipped

    def collect(self) -> Iterable[Metric]:
        gauge = GaugeMetricFamily(
            "loraplex_adapters_refused",
            "Adapters whose newest version is invalid while an older one is served.",
            labels=["base"],
        )
        for base, count in self._refused.items():
            gauge.add_metric([base], count())
        skipped = GaugeMetricFamily(
            "loraplex_adapters_skipped",
            "Folders of the store that are left out, by reason.",
            labels=["base", "reason"],
        )
        for base, counts in self._skipped.items():
            for reason, number in counts().items():
                skipped.add_metric([base, reason], number)
        return [gauge, skipped]


class ScalingCollector(Collector):
    """The supervisor's numbers; nothing where nobody scales."""

    def __init__(self, models: Mapping[str, ModelStatus]) -> None:
        self._models = models

    def collect(self) -> Iterable[Metric]:
        workers = GaugeMetricFamily(
            "loraplex_workers",
            "Workers of this machine: wanted, serving, starting and draining.",
            labels=["base", "state"],
        )
        for base, status in self._models.items():
            for state in ("wanted", "serving", "starting", "draining"):
                workers.add_metric([base, state], getattr(status, state))
        return [workers]
