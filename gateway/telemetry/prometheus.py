"""Shell. The metrics of one gateway process: methods that count, and the text that a scrape
gets.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics_text

from gateway.fleet.fleet import Fleet
from gateway.supervisor.autoscaling.reports import ModelStatus
from gateway.telemetry.collectors import (
    FleetCollector,
    ProcessCollector,
    ScalingCollector,
    VersionCollector,
    WithoutTenants,
)
from gateway.telemetry.counters import Count, CounterSet, Exemplar, SeriesKey, Snapshot
from gateway.telemetry.ended_request import EndedRequest
from gateway.telemetry.metric_definitions import (
    ADAPTER_LABELS,
    BOUNDS,
    COUNTERS,
    LOST_REASONS,
    OTHER,
    USAGE_LABELS,
)
from gateway.telemetry.recorder import Recorder
from gateway.telemetry.request_spans import operation

OPEN_METRICS = "application/openmetrics-text"
OPEN_METRICS_TYPE = f"{OPEN_METRICS}; version=1.0.0; charset=utf-8"
PLAIN_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SHOWN_AT_ONCE: list[SeriesKey] = [
    *((name,) for name, (_, labels) in COUNTERS.items() if not labels),
    *(("streams_lost", reason) for reason in LOST_REASONS),
]
FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class GaugeSources:
    """Callables for the numbers that are read only at a scrape.

    They are keyed by base model. `queued` counts the requests in the queue, and `demand` those that
    a worker is to be there for (see Admission.demand). `refused` counts the adapters with a newest
    version that is invalid. `skipped` counts the folders of the store that are no valid adapters,
    by reason. `tasks` counts the tasks on the event loop of the process.
    """

    fleet: Fleet | None = None
    queued: Mapping[str, Callable[[], int]] = field(default_factory=dict)
    demand: Mapping[str, Callable[[], int]] = field(default_factory=dict)
    refused: Mapping[str, Callable[[], int]] = field(default_factory=dict)
    skipped: Mapping[str, Callable[[], Mapping[str, int]]] = field(default_factory=dict)
    tasks: Callable[[], int] = int


NO_GAUGES = GaugeSources()


def _ttft_key(base: str, cold: bool, streamed: bool) -> SeriesKey:
    return "ttft_seconds", base, "yes" if cold else "no", "yes" if streamed else "no"


class ModelSeries:
    """The series of one base model that nearly every request changes."""

    __slots__ = (
        "duration",
        "finished",
        "output_tokens",
        "over_expected",
        "prompt_tokens",
        "queue",
        "ttft",
    )

    def __init__(self, counters: CounterSet, base: str) -> None:
        distribution = counters.distribution
        self.finished = counters.counter(("requests", base, FINISHED))
        self.duration = distribution(("request_seconds", base))
        self.queue = distribution(("queue_seconds", base))
        self.ttft = {
            of: distribution(_ttft_key(base, *of)) for of in product((True, False), repeat=2)
        }
        self.over_expected = distribution(("ttft_over_expected", base))
        self.prompt_tokens = counters.counter(("prompt_tokens", base))
        self.output_tokens = counters.counter(("output_tokens", base))


class UsageSeries:
    """What one key has used of one model."""

    __slots__ = ("output_tokens", "prompt_tokens", "requests")

    def __init__(self, counters: CounterSet, of: tuple[str, str, str]) -> None:
        self.requests = counters.counter(("usage_requests", *of))
        self.prompt_tokens = counters.counter(("usage_prompt_tokens", *of))
        self.output_tokens = counters.counter(("usage_output_tokens", *of))


class Metrics:
    """Counts what the dispatcher and the API report. `recorder` also keeps the last hour. `clock`
    must be the dispatcher's.
    """

    def __init__(
        self,
        process: str = "g0",
        gauge_sources: GaugeSources = NO_GAUGES,
        recorder: Recorder | None = None,
        clock: Callable[[], float] = float,
    ) -> None:
        self.process = process
        self.recorder = Recorder() if recorder is None else recorder
        self.gen_ai = False
        """Whether OpenTelemetry's own histograms are kept beside ours."""
        self.journal_bytes = 0
        """Set by the dispatcher."""
        self.live_listeners = 0
        """Set by the stream of the page at /ui."""
        self._clock = clock
        self._sources = gauge_sources
        self._counters = CounterSet(BOUNDS)
        self._aliases: set[tuple[str, str, str]] = set()
        self._adapters: set[tuple[str, str]] = set()
        self._usage: dict[tuple[str, str, str], UsageSeries] = {}
        self._keys: set[str] = set()
        self._of_key: dict[tuple[str, str], Count] = {}
        self._scaling: Callable[[], Mapping[str, ModelStatus]] = dict
        self._from_zero: Callable[[], Iterable[str]] = tuple
        self._of_base: dict[str, ModelSeries] = {}
        for key in SHOWN_AT_ONCE:
            self._counters.count(key, 0)

    def watch_scaling(
        self,
        scaling: Callable[[], Mapping[str, ModelStatus]],
        from_zero: Callable[[], Iterable[str]] = tuple,
    ) -> None:
        """`scaling` returns the supervisor's last report on each base model. `from_zero` returns
        the base models that may have no worker, because a request starts one.
        """
        self._scaling, self._from_zero = scaling, from_zero

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

    def moved(self, reason: str, away_from: str) -> None:
        """`away_from` is the worker that was lost, or gave the stream back."""
        self._counters.count(("streams_moved", reason))
        self.recorder.moved(away_from)

    def lost(self, reason: str) -> None:
        self._counters.count(("streams_lost", reason))

    def link_gap(self) -> None:
        self._counters.count(("link_gaps",))

    def link_resent(self, messages: int) -> None:
        self._counters.count(("link_resent",), messages)

    def slow_reader(self) -> None:
        self._counters.count(("slow_readers",))

    def config_reload(self, outcome: str) -> None:
        """`outcome` is `done` or `refused`."""
        self._counters.count(("config_reloads", outcome))

    def version_change(self, base: str, outcome: str) -> None:
        """`outcome` is `switched`, `refused` or `failed`."""
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

    def used(self, of: tuple[str, str, str], prompt_tokens: int, output_tokens: int) -> None:
        """`of` are the key, the base model and the adapter (empty: none)."""
        series = self._usage.get(of) or self._usage_of(of)
        series.requests.total += 1
        series.prompt_tokens.total += prompt_tokens
        series.output_tokens.total += output_tokens

    def _usage_of(self, of: tuple[str, str, str]) -> UsageSeries:
        """New series, or those of all others once there are too many."""
        if len(self._usage) >= USAGE_LABELS:
            return UsageSeries(self._counters, (OTHER, of[1], OTHER))
        series = self._usage[of] = UsageSeries(self._counters, of)
        return series

    def tokens(self, base: str, prompt_tokens: int, output_tokens: int) -> None:
        """What one request has used, whether or not its client saw the end."""
        series = self._series_of(base)
        series.prompt_tokens.total += prompt_tokens
        series.output_tokens.total += output_tokens

    def _series_of(self, base: str) -> ModelSeries:
        series = self._of_base.get(base)
        if series is None:
            series = self._of_base[base] = ModelSeries(self._counters, base)
        return series

    def refused(self, ended: EndedRequest, limit: str = "") -> None:
        """Records a request that was not let in. Its error is counted when it is answered. `limit`
        is the limit of its key that it has hit.
        """
        self.recorder.refused(ended)
        if ended.tenant:
            key = self._count_key(ended)
            if limit:
                self._counters.count(("limits_hit", key, limit))

    def finished(self, ended: EndedRequest) -> None:
        self.recorder.ended(ended)
        base, done, start = ended.base, ended.done, ended.t_start
        count = self._counters.count
        series = self._series_of(base)
        if ended.outcome == FINISHED:
            series.finished.total += 1
        else:
            count(("requests", base, ended.outcome))
        series.duration.observe(ended.t_end - start)
        if ended.t_sent:
            series.queue.observe(ended.t_sent - start)
        if ended.t_head and not ended.engine_status:
            cold = done is not None and done.load_s > 0
            series.ttft[cold, ended.streamed].observe(ended.t_head - start)
            # of one attempt, and where a client saw its first bytes: else another wait was expected
            if ended.cost is not None and ended.streamed and ended.attempts == 1:
                expected_s = ended.cost.ttft_s
                if expected_s > 0:
                    series.over_expected.observe((ended.t_head - ended.t_sent) / expected_s)
        if ended.adapter is not None and ended.outcome == FINISHED:
            count(("adapter_requests", base, self._adapter_label(base, ended.adapter)))
        if ended.tenant:
            of_key = self._of_key.get((ended.tenant, ended.outcome))
            if of_key is None:
                self._count_key(ended)
            else:
                of_key.total += 1
        if self.gen_ai:
            self._observe_gen_ai(ended)

    def _count_key(self, ended: EndedRequest) -> str:
        """Returns the label of the key."""
        key = ended.tenant
        if key not in self._keys:
            if len(self._keys) < USAGE_LABELS:
                self._keys.add(key)
            else:
                key = OTHER
        counter = self._counters.counter(("key_requests", key, ended.outcome))
        counter.total += 1
        if key is not OTHER:
            self._of_key[key, ended.outcome] = counter
        return key

    def _observe_gen_ai(self, ended: EndedRequest) -> None:
        """Only with traces. A request that is traced itself is noted as an exemplar, too."""
        base, done, traced = ended.base, ended.done, bool(ended.trace_id)

        def observe(key: SeriesKey, seconds: float) -> None:
            self._counters.distribution(key).observe(seconds)
            if traced:
                self._exemplify(key, seconds, ended.trace_id)

        adapter = None if ended.adapter is None else self._adapter_label(base, ended.adapter)
        labels = (operation(ended.path), base if adapter is None else f"{base}:{adapter}")
        duration_s = ended.t_end - ended.t_start
        observe(("gen_ai_server_request_duration_seconds", *labels), duration_s)
        if traced:
            self._exemplify(("request_seconds", base), duration_s, ended.trace_id)
        if not ended.t_head or ended.engine_status:
            return
        ttft_s = ended.t_head - ended.t_start
        if traced:
            cold = done is not None and done.load_s > 0
            self._exemplify(_ttft_key(base, cold, ended.streamed), ttft_s, ended.trace_id)
        if not ended.streamed:
            return
        observe(("gen_ai_server_time_to_first_token_seconds", *labels), ttft_s)
        if done is not None and done.output_tokens > 1:
            each_s = (ended.t_end - ended.t_head) / (done.output_tokens - 1)
            observe(("gen_ai_server_time_per_output_token_seconds", *labels), each_s)

    def _exemplify(self, key: SeriesKey, seconds: float, trace_id: str) -> None:
        self._counters.exemplify(key, Exemplar(trace_id, seconds, time.time()))

    # ---- reading ---------------------------------------------------------------------------------

    def value(self, name: str, labels: Mapping[str, str]) -> float | None:
        """The value of one series of this process, as a scrape would show it. None: there is no
        such series.
        """
        return self._registry([self.snapshot()], {}).get_sample_value(name, dict(labels))

    def snapshot(self) -> Snapshot:
        gauges: list[tuple[SeriesKey, float]] = [
            (("queue_depth", base, self.process), float(depth()))
            for base, depth in self._sources.queued.items()
        ]
        gauges.append((("gateway_tasks", self.process), float(self._sources.tasks())))
        gauges.append((("live_listeners", self.process), float(self.live_listeners)))
        gauges.append((("journal_bytes", self.process), float(self.journal_bytes)))
        if self._sources.fleet is not None:
            own = self._sources.fleet.own_requests()
            gauges += [
                (("ongoing_requests", base, self.process), float(demand() + own.get(base, 0)))
                for base, demand in self._sources.demand.items()
            ]
        return self._counters.snapshot(self.process, gauges)

    def restore(self, before: Snapshot) -> None:
        """Adds the counts of this process from before its restart, so that no counter ever
        falls. Names that have series count for the bounds as before.
        """
        self._counters.add(before)
        for counted in [*self._counters.counters]:
            match counted:
                case "adapter_requests", base, adapter if adapter != OTHER:
                    self._adapters.add((base, adapter))
                case "alias_requests", base, alias, adapter, _:
                    self._aliases.add((base, alias, adapter))
                case "key_requests", key, _ if key != OTHER:
                    self._keys.add(key)
                case "usage_requests", key, base, adapter if key != OTHER:
                    of = (key, base, adapter)
                    self._usage[of] = UsageSeries(self._counters, of)

    def render(
        self,
        snapshots: Sequence[Snapshot],
        answered: Mapping[str, bool],
        *,
        tenants: bool = True,
        exemplars: bool = False,
    ) -> bytes:
        """The scrape's text: the sum of the counts of all gateway processes.

        `answered` says for each process whether its counts are current. Without `tenants`, series
        from which one tenant could learn of another are left out. With `exemplars` the text is
        OpenMetrics, because Prometheus' own format has none.
        """
        registry = self._registry(snapshots, answered)
        shown = registry if tenants else WithoutTenants(registry)
        write: Callable[[Any], bytes]
        write = openmetrics_text if exemplars else generate_latest
        return write(shown)

    def _registry(
        self, snapshots: Sequence[Snapshot], answered: Mapping[str, bool]
    ) -> CollectorRegistry:
        registry = CollectorRegistry()
        registry.register(ProcessCollector(snapshots, answered))
        if self._sources.fleet is not None:
            registry.register(FleetCollector(self._sources.fleet))
        registry.register(VersionCollector(self._sources.refused, self._sources.skipped))
        registry.register(ScalingCollector(self._scaling(), self._from_zero()))
        return registry

    def _adapter_label(self, base: str, adapter: str) -> str:
        if (base, adapter) in self._adapters:
            return adapter
        if len(self._adapters) < ADAPTER_LABELS:
            self._adapters.add((base, adapter))
            return adapter
        return OTHER
