"""Pure. The autoscaler of one model. It collects the load reports of the gateway processes within
its window, and decides how many workers the model should have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from msgspec.structs import replace

from gateway.supervisor.autoscaling import bottlenecks
from gateway.supervisor.autoscaling.decision import (
    ELAPSED_TOLERANCE_S,
    PendingChange,
    ScalingDecision,
    Stay,
    decide,
    rules_of,
)
from gateway.supervisor.autoscaling.load_window import Aggregation, LoadWindow
from gateway.supervisor.autoscaling.reports import ModelLoad, WorkerLoad
from shared.config.deployment import TARGET_SHARE, AutoscalingConfig

QUEUE = ""
"""The series name of a gateway's queue. The other series have the names of workers."""
SHORTEST_SILENCE_S = 10.0
"""A gateway process is forgotten after two report intervals without a report, but not earlier than
this. It is Ray's RAY_SERVE_MIN_HANDLE_METRICS_TIMEOUT_S.
"""


@dataclass
class AutoscalingContext:
    """The argument of a user's scaling policy. It has Ray's field names, so a policy written for
    Ray runs here.
    """

    deployment_name: str
    current_num_replicas: int
    target_num_replicas: int
    running_replicas: list[str]
    total_num_requests: float
    total_queued_requests: float
    capacity_adjusted_min_replicas: int
    capacity_adjusted_max_replicas: int
    current_time: float
    config: AutoscalingConfig
    policy_state: dict[str, Any]
    last_scale_up_time: float | None = None
    last_scale_down_time: float | None = None
    app_name: str = ""
    aggregated_metrics: dict[str, Any] = field(default_factory=dict)
    raw_metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def total_running_requests(self) -> float:
        return max(0.0, self.total_num_requests - self.total_queued_requests)


PolicyAnswer: TypeAlias = tuple[float, dict[str, Any]] | None
"""The number of workers, and the state for the next call. None: there is no answer."""
CustomPolicy: TypeAlias = Callable[[AutoscalingContext], PolicyAnswer]


class Autoscaler:
    """Decides for one model. `capacity` is the number of requests that a worker runs at once
    according to the config. Workers that serve report their own number, which then counts.
    """

    def __init__(
        self,
        model: str,
        config: AutoscalingConfig,
        wanted: int,
        capacity: int,
        policy: CustomPolicy | None = None,
    ) -> None:
        self.rules = rules_of(config)
        self.wanted = self.rules.bounded(wanted)
        self._model = model
        self._config = config
        self._capacity = capacity
        self._policy = policy
        self._policy_state: dict[str, Any] = {}
        self._pending_change = PendingChange()
        self._scaled_at: dict[int, float] = {}
        self._requests, self._amounts = (LoadWindow(*_window(config)) for _ in range(2))
        self._loads: dict[str, ModelLoad] = {}
        self._last_report_at: dict[str, float] = {}

    def configure(self, config: AutoscalingConfig, capacity: int) -> None:
        """Other rules from now on. What was measured stays, unless it is measured otherwise now."""
        before = self._config
        self.rules, self._config, self._capacity = rules_of(config), config, capacity
        if _window(before) != _window(config):
            self._requests, self._amounts = (LoadWindow(*_window(config)) for _ in range(2))
        self.wanted = self.rules.bounded(self.wanted)

    @property
    def silence_s(self) -> float:
        return max(2 * self._config.metrics_interval_s, SHORTEST_SILENCE_S)

    def report(self, process: str, load: ModelLoad, now: float) -> None:
        """Takes the report of one gateway process."""
        self._last_report_at[process] = now
        self._loads[process] = load
        counts = {name: float(worker.requests) for name, worker in load.workers.items()}
        self._requests.record(process, {QUEUE: float(load.queued), **counts}, now)
        for name, amount in bottlenecks.measure(self._loads.values()).items():
            self._amounts.record(name, {name: amount}, now)

    def forget(self, process: str) -> None:
        """The process has ended, so its reports no longer count."""
        self._last_report_at.pop(process, None)
        self._loads.pop(process, None)
        self._requests.forget(process)

    def serving(self) -> dict[str, WorkerLoad]:
        """The workers that serve, according to the processes whose reports are recent."""
        return bottlenecks.workers_of(self._loads.values())

    def decide(self, now: float, running: list[str]) -> ScalingDecision:
        """The decision for `now`. `running` are the workers that serve and are not about to
        leave.
        """
        for process, at in list(self._last_report_at.items()):
            if now - at + ELAPSED_TOLERANCE_S >= self.silence_s:
                self.forget(process)
        ongoing = self._requests.value(now, {QUEUE, *running})
        serving = [load for name, load in self.serving().items() if name in running]
        amounts = {
            name: self._amounts.value(now, {name})
            for name in (bottlenecks.ADAPTERS, bottlenecks.KV, bottlenecks.BACKLOG_S)
        }
        slots = min((load.slots for load in serving), default=0)
        target = self.target_ongoing(serving)
        desired: float | Stay | None = None
        if self._policy is not None and (running or ongoing <= 0):
            desired = self._ask_policy(self._policy, now, running, ongoing, target)
        decision, self._pending_change = decide(
            self.rules,
            self._pending_change,
            now,
            running=len(running),
            wanted=self.wanted,
            ongoing=ongoing,
            target_ongoing=target,
            desired=desired,
            needs=bottlenecks.needs(self._config.bottlenecks, amounts, slots),
        )
        if decision.wanted != self.wanted:
            self._scaled_at[1 if decision.wanted > self.wanted else -1] = now
        self.wanted = decision.wanted
        return decision

    def target_ongoing(self, serving: list[WorkerLoad]) -> float:
        """Requests per worker to aim for: the configured number, or a share of what a worker runs
        at once.
        """
        if self._config.target_ongoing_requests is not None:
            return self._config.target_ongoing_requests
        capacity = min((load.capacity for load in serving if load.capacity), default=self._capacity)
        return max(1.0, TARGET_SHARE * capacity)

    def _ask_policy(
        self,
        policy: CustomPolicy,
        now: float,
        running: list[str],
        ongoing: float,
        target_ongoing: float,
    ) -> float | Stay:
        answer = policy(
            AutoscalingContext(
                deployment_name=self._model,
                current_num_replicas=len(running),
                target_num_replicas=self.wanted,
                running_replicas=running,
                total_num_requests=ongoing,
                total_queued_requests=self._requests.value(now, {QUEUE}),
                capacity_adjusted_min_replicas=self.rules.min_workers,
                capacity_adjusted_max_replicas=self.rules.max_workers,
                current_time=now,
                config=replace(self._config, target_ongoing_requests=target_ongoing),
                policy_state=dict(self._policy_state),
                last_scale_up_time=self._scaled_at.get(1),
                last_scale_down_time=self._scaled_at.get(-1),
            )
        )
        if answer is None:
            return "stay"
        desired, self._policy_state = answer
        return float(desired)


def _window(config: AutoscalingConfig) -> tuple[float, Aggregation]:
    return config.look_back_period_s, config.aggregation_function
