"""Pure. One model's autoscaler: takes the reports of the gateway processes, remembers them for the
length of its window, and decides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from gateway.supervisor.autoscaling import bottlenecks
from gateway.supervisor.autoscaling.decision import (
    ELAPSED_TOLERANCE_S,
    Decision,
    Wish,
    decide,
    rules_of,
)
from gateway.supervisor.autoscaling.load import LoadWindow
from gateway.supervisor.autoscaling.reports import ModelLoad, WorkerLoad
from shared.config.deployment import TARGET_SHARE, AutoscalingConfig

QUEUE = ""
"""The name of a gateway's queue among its series; workers have names of their own."""
SHORTEST_SILENCE_S = 10.0
"""A gateway process is forgotten after two intervals without a report, but not before this (Ray's
RAY_SERVE_MIN_HANDLE_METRICS_TIMEOUT_S).
"""


@dataclass
class AutoscalingContext:
    """What a policy of the user's is given: Ray's names, so that one written for Ray runs here."""

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


CustomPolicy: TypeAlias = Callable[[AutoscalingContext], tuple[float, dict[str, Any]]]


class Autoscaler:
    """Decides for one model. `capacity` is what a worker runs at once as far as the config tells;
    workers that serve know better.
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
        self._wish = Wish()
        self._scaled_at: dict[int, float] = {}
        self._requests = LoadWindow(config.look_back_period_s, config.aggregation_function)
        self._amounts = LoadWindow(config.look_back_period_s, config.aggregation_function)
        self._loads: dict[str, ModelLoad] = {}
        self._heard: dict[str, float] = {}

    @property
    def silence_s(self) -> float:
        return max(2 * self._config.metrics_interval_s, SHORTEST_SILENCE_S)

    def hear(self, process: str, load: ModelLoad, now: float) -> None:
        self._heard[process] = now
        self._loads[process] = load
        counts = {name: float(worker.requests) for name, worker in load.workers.items()}
        self._requests.record(process, {QUEUE: float(load.queued), **counts}, now)
        for name, amount in bottlenecks.measure(self._loads.values()).items():
            self._amounts.record(name, {name: amount}, now)

    def forget(self, process: str) -> None:
        """The process has ended: what it had counts no more."""
        self._heard.pop(process, None)
        self._loads.pop(process, None)
        self._requests.forget(process)

    def serving(self) -> dict[str, WorkerLoad]:
        """The workers that serve, as told by the processes that are heard of."""
        return bottlenecks.workers_of(self._loads.values())

    def decide(self, now: float, running: list[str]) -> Decision:
        """`running`: the workers that serve and stay."""
        for process, at in list(self._heard.items()):
            if now - at + ELAPSED_TOLERANCE_S >= self.silence_s:
                self.forget(process)
        ongoing = self._requests.value(now, {QUEUE, *running})
        serving = [load for name, load in self.serving().items() if name in running]
        amounts = {
            name: self._amounts.value(now, {name})
            for name in (bottlenecks.ADAPTERS, bottlenecks.KV, bottlenecks.BACKLOG_S)
        }
        slots = min((load.slots for load in serving), default=0)
        desired = None
        if self._policy is not None and (running or ongoing <= 0):
            desired = self._ask_policy(self._policy, now, running, ongoing)
        decision, self._wish = decide(
            self.rules,
            self._wish,
            now,
            running=len(running),
            wanted=self.wanted,
            ongoing=ongoing,
            target_ongoing=self.target_ongoing(serving),
            desired=desired,
            needs=bottlenecks.needs(self._config.bottlenecks, amounts, slots),
        )
        if decision.wanted != self.wanted:
            self._scaled_at[1 if decision.wanted > self.wanted else -1] = now
        self.wanted = decision.wanted
        return decision

    def target_ongoing(self, serving: list[WorkerLoad]) -> float:
        """The configured one, else a share of what a worker runs at once."""
        if self._config.target_ongoing_requests is not None:
            return self._config.target_ongoing_requests
        capacity = min((load.capacity for load in serving if load.capacity), default=self._capacity)
        return max(1.0, TARGET_SHARE * capacity)

    def _ask_policy(
        self, policy: CustomPolicy, now: float, running: list[str], ongoing: float
    ) -> float:
        desired, self._policy_state = policy(
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
                config=self._config,
                policy_state=dict(self._policy_state),
                last_scale_up_time=self._scaled_at.get(1),
                last_scale_down_time=self._scaled_at.get(-1),
            )
        )
        return float(desired)
