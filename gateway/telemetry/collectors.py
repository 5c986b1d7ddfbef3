"""Shell. Collectors for prometheus_client. Each turns one source into Prometheus series at a
scrape: the counts of all processes, the fleet, the adapter versions, and the supervisor's numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar

from gateway.fleet.fleet import Fleet
from gateway.supervisor.autoscaling.reports import ModelStatus
from gateway.telemetry import counters
from gateway.telemetry.counters import CounterSet, Snapshot
from gateway.telemetry.metric_definitions import (
    ADAPTER_LABELS,
    BOUNDS,
    COUNTERS,
    DISTRIBUTIONS,
    GAUGES,
)
from shared.link.messages import EVICTIONS, Tier

TENANT_LABELS = {"key", "adapter", "adapter_name", "alias", "gen_ai_request_model"}
"""Labels with values from which one tenant could learn of another."""


class WithoutTenants(CollectorRegistry):
    """The registry without the series that have one of TENANT_LABELS."""

    def __init__(self, whole: CollectorRegistry) -> None:
        super().__init__()
        self._whole = whole

    def collect(self) -> Iterable[Metric]:
        for family in self._whole.collect():
            if all(TENANT_LABELS.isdisjoint(sample.labels) for sample in family.samples):
                yield family


class ProcessCollector(Collector):
    """The counts of the gateway processes. Counters and histograms are summed; gauges are shown per
    process. `answered` says for each process whether its counts are current.
    """

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
    for key, count in total.counters.items():
        if key[0] in families:
            families[key[0]].add_metric(key[1:], count.total)
    return families.values()


def _distributions(total: CounterSet) -> Iterable[Metric]:
    families = {
        name: HistogramMetricFamily(series_name(name), text, labels=labels)
        for name, (text, labels, _) in DISTRIBUTIONS.items()
    }
    for key, found in total.distributions.items():
        below, buckets = 0, []
        bounds = [*(str(float(bound)) for bound in found.bounds), "+Inf"]
        for number, (bound, count) in enumerate(zip(bounds, found.counts, strict=True)):
            below += count
            exemplar = total.exemplars.get((key, number))
            known = () if exemplar is None else (_exemplar(exemplar),)
            buckets.append((bound, below, *known))
        families[key[0]].add_metric(key[1:], buckets, found.total)
    return families.values()


def _exemplar(of: counters.Exemplar) -> Exemplar:
    return Exemplar({"trace_id": of.trace_id}, of.value, of.at)


LEVELS = {Tier.GPU: "gpu", Tier.CPU: "cpu"}


class FleetCollector(Collector):
    """The fleet as this process sees it at the moment of the scrape. A worker that has left has no
    series any more.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterable[Metric]:
        yield from self._workers()
        yield from self._adapter_traffic()
        yield from self._residency()

    def _workers(self) -> Iterable[Metric]:
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
        for w in self._fleet:
            at = [w.id, w.heartbeat.base]
            up.add_metric([*at, w.shown_state.name.lower()], 1)
            load.add_metric(at, w.load)
            capacity.add_metric(at, w.heartbeat.capacity)
            slots.add_metric(at, w.heartbeat.slots)
            kv.add_metric(at, w.heartbeat.kv_usage)
            tiers = [a.tier.name.lower() for a in w.heartbeat.adapters]
            for tier in ("gpu", "cpu", "disk"):
                used.add_metric([*at, tier], tiers.count(tier))
        return [up, load, capacity, slots, used, kv]

    def _adapter_traffic(self) -> Iterable[Metric]:
        names = ["worker", "base"]
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
        begun = CounterMetricFamily(
            "loraplex_engine_requests_total",
            "Requests that a worker has given to its engine.",
            labels=names,
        )
        stalled = CounterMetricFamily(
            "loraplex_engine_stall_seconds_total",
            "Time for which the engine of a worker has stood still to take adapters into slots.",
            labels=names,
        )
        for w in self._fleet:
            at = [w.id, w.heartbeat.base]
            begun.add_metric(at, w.heartbeat.engine_requests)
            stalled.add_metric(at, w.heartbeat.stalled_s)
            for tier in ("cpu", "disk", "remote"):
                loads.add_metric([*at, tier], w.heartbeat.adapter_loads.get(tier, 0))
            for what in EVICTIONS:
                number = w.heartbeat.adapter_evictions.get(what, 0)
                evictions.add_metric([*at, *what.split(":")], number)
        return [begun, loads, evictions, stalled]

    def _residency(self) -> Iterable[Metric]:
        """The adapters that workers hold, under the names that vLLM plans for them
        (vllm-project/vllm issue 51433) so that other schedulers can read them. Each series also
        names the worker.
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
            at = [w.id, w.heartbeat.base]
            count.add_metric(at, len(w.loaded))
            most.add_metric(at, w.heartbeat.slots)
            there = [a for a in w.heartbeat.adapters if a.tier in LEVELS and not a.loading]
            versions = {(a.name, a.tier): a for a in sorted(there, key=lambda a: a.pinned)}
            for a in sorted(versions.values(), key=lambda a: a.tier)[:ADAPTER_LABELS]:
                pinned = "true" if a.pinned else "false"
                loaded.add_metric([*at, a.name, LEVELS[a.tier], pinned, str(a.rank)], 1)
        return [loaded, count, most]


class VersionCollector(Collector):
    """Adapters that are refused or skipped. Each process shows its own view, since each one
    switches versions by itself.
    """

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
    """The supervisor's numbers of workers, and the reason of its last decision on each model. Empty
    if no supervisor has reported. `from_zero` are the base models that may have no worker.
    """

    def __init__(self, models: Mapping[str, ModelStatus], from_zero: Iterable[str] = ()) -> None:
        self._models, self._from_zero = models, from_zero

    def collect(self) -> Iterable[Metric]:
        workers = GaugeMetricFamily(
            "loraplex_workers",
            "Workers of this machine: recommended, wanted, serving, starting and draining.",
            labels=["base", "state"],
        )
        requests = GaugeMetricFamily(
            "loraplex_scaling_requests",
            "What the decision on workers counts: requests ongoing, and the target of a worker.",
            labels=["base", "what"],
        )
        needs = GaugeMetricFamily(
            "loraplex_scaling_needs",
            "Workers that each other bottleneck needs.",
            labels=["base", "bottleneck"],
        )
        cause = GaugeMetricFamily(
            "loraplex_scaling_cause",
            "1 for what asks for the recommended number of workers.",
            labels=["base", "cause"],
        )
        held = GaugeMetricFamily(
            "loraplex_scaling_held_seconds",
            "For how much longer a delay holds the recommended number back.",
            labels=["base", "delay"],
        )
        for base, status in self._models.items():
            for state in ("recommended", "wanted", "serving", "starting", "draining"):
                workers.add_metric([base, state], getattr(status, state))
            requests.add_metric([base, "ongoing"], status.ongoing)
            requests.add_metric([base, "target"], status.target_ongoing)
            for bottleneck, count in status.needs.items():
                needs.add_metric([base, bottleneck], count)
            if status.cause:
                cause.add_metric([base, status.cause], 1)
            if status.held_by:
                held.add_metric([base, status.held_by], status.held_s)
        zero = GaugeMetricFamily(
            "loraplex_scales_to_zero",
            "1 for a base model that may have no worker, because a request starts one.",
            labels=["base"],
        )
        for base in sorted(self._from_zero):
            zero.add_metric([base], 1)
        return [workers, requests, needs, cause, held, zero]


def series_name(name: str) -> str:
    """OpenTelemetry's own series keep their names."""
    return name if name.startswith("gen_ai_") else f"loraplex_{name}"
