"""Pure. `deployment_config`: how many workers there are, how many requests each takes, and how they
scale. Names and defaults are Ray Serve's (2.60).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from shared.config.llm_sections import Positive, Seconds, SecondsOrNone
from shared.config.section import Finding, Section, shown

MAX_WORKERS = 1000
"""Of one model, to begin with. Each is a process of this machine; more is a slip of the pen."""
Count = Annotated[int, Meta(ge=0, le=MAX_WORKERS)]
Factor = Annotated[float, Meta(gt=0)]

# Ray LLM's default of max_ongoing_requests and target_ongoing_requests. It means "never full" and
# "never scale".
UNLIMITED_REQUESTS = 1_000_000_000
TARGET_SHARE = 0.7
"""The default target, as a share of the requests that a worker runs at once. The rest is room for
requests that come while another worker starts. Knative's container-concurrency-target-percentage is
70, too.
"""
# Ray Serve's own defaults under `num_replicas: auto`
_AUTO = {"max_replicas": 100, "target_ongoing_requests": 2.0}


class BackpressureConfig(Section, frozen=True, kw_only=True):
    """How the gateway answers when a queue is full."""

    status_code: Literal[503, 429] = 503
    retry_after_s: SecondsOrNone | None = None


_RAYS_POLICIES = {
    f"ray.serve.autoscaling_policy.{name}"
    for name in ("default_autoscaling_policy", "replica_queue_length_autoscaling_policy")
}
_IMPORT_PATH = re.compile(r"[A-Za-z_][\w.]*[.:][A-Za-z_]\w*")


class AutoscalingPolicy(Section, frozen=True, kw_only=True):
    """A user's own scaling function, as `module:function` or `module:Class`. A class is
    instantiated once with `policy_kwargs`. Only `loraplex serve` imports it.
    """

    policy_function: str | None = None
    policy_kwargs: dict[str, Any] = msgspec.field(default_factory=dict)

    @classmethod
    def prepare(cls, given: dict[str, Any]) -> dict[str, Any]:
        function = given.get("policy_function")
        if callable(function):  # settings are sent to child processes as text
            given["policy_function"] = f"{function.__module__}:{function.__qualname__}"
        elif isinstance(function, str) and function.replace(":", ".") in _RAYS_POLICIES:
            given["policy_function"] = None  # Ray's own default, which is also ours
        return given

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> Iterator[Finding]:
        function = values.get("policy_function")
        if function is not None and _IMPORT_PATH.fullmatch(function) is None:
            yield Finding(
                ("policy_function",),
                f"expected module:function or module:Class, got {shown(function)}",
            )


class BottleneckConfig(Section, frozen=True, kw_only=True):
    """Other reasons to want more workers, besides the number of requests. This is ours, not Ray's.
    Each may be null, which switches it off.

    `slots`: the share of all adapter slots that adapters in flight or waiting may fill. `kv_usage`:
    the mean KV cache usage of the workers (0 to 1). `ttft_s`: how many seconds of prompt tokens may
    wait for their prefill.
    """

    slots: Annotated[float, Meta(gt=0, le=4)] | None = 1.0
    kv_usage: Annotated[float, Meta(gt=0, le=1)] | None = 0.9
    ttft_s: Seconds | None = None


class AutoscalingConfig(Section, frozen=True, kw_only=True):
    """Between which bounds the number of workers moves, and how fast. The defaults are those of Ray
    LLM deployments, with one exception. Ray LLM's `target_ongoing_requests` of 1e9 never scales; if
    it is not set here, `LLMConfig.target_ongoing_requests` derives it from what a worker runs at
    once. `bottlenecks` is ours; null makes it scale as Ray does.
    """

    min_replicas: Count = 1
    initial_replicas: Count | None = None
    max_replicas: Positive = 1
    target_ongoing_requests: Factor | None = None
    metrics_interval_s: Seconds = 10.0
    look_back_period_s: Seconds = 30.0
    smoothing_factor: Factor = 1.0
    upscale_smoothing_factor: Factor | None = None
    downscale_smoothing_factor: Factor | None = None
    upscaling_factor: Factor | None = None
    downscaling_factor: Factor | None = None
    downscale_delay_s: SecondsOrNone = 600.0
    downscale_to_zero_delay_s: SecondsOrNone | None = None
    upscale_delay_s: SecondsOrNone = 30.0
    aggregation_function: Literal["mean", "max", "min"] = "mean"
    policy: AutoscalingPolicy | None = None
    bottlenecks: BottleneckConfig | None = msgspec.field(default_factory=BottleneckConfig)

    @property
    def scales(self) -> bool:
        """Whether the bounds leave a choice."""
        return self.min_replicas < self.max_replicas

    # Ray's names: scaling policies call these three

    def get_upscaling_factor(self) -> float:
        """The factor on each step up. Ray's precedence among the old and new names holds."""
        return self.upscaling_factor or self.upscale_smoothing_factor or self.smoothing_factor

    def get_downscaling_factor(self) -> float:
        """The factor on each step down, with the same precedence."""
        return self.downscaling_factor or self.downscale_smoothing_factor or self.smoothing_factor

    def get_target_ongoing_requests(self) -> float | None:
        """The given number. None: it is derived. A policy always gets the number that holds."""
        return self.target_ongoing_requests

    @classmethod
    def prepare(cls, given: dict[str, Any]) -> dict[str, Any]:
        if isinstance(given.get("aggregation_function"), str):
            given["aggregation_function"] = given["aggregation_function"].lower()
        return given

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> Iterator[Finding]:
        low, first, high = (
            values.get(name) for name in ("min_replicas", "initial_replicas", "max_replicas")
        )
        if low is not None and high is not None and low > high:
            yield Finding(
                ("min_replicas",),
                f"{low} is more than max_replicas ({high}); raise max_replicas or lower it",
                other=("max_replicas",),
            )
        if first is not None and low is not None and first < low:
            yield Finding(
                ("initial_replicas",),
                f"{first} is less than min_replicas ({low}); raise it or lower min_replicas",
                other=("min_replicas",),
            )
        if first is not None and high is not None and first > high:
            yield Finding(
                ("initial_replicas",),
                f"{first} is more than max_replicas ({high}); lower it or raise max_replicas",
                other=("max_replicas",),
            )
        target = values.get("target_ongoing_requests")
        room = low is not None and high is not None and low < high
        if room and target is not None and target >= UNLIMITED_REQUESTS:
            yield Finding(
                ("target_ongoing_requests",),
                f"{target:.0f} per worker never asks for another worker; leave it out to derive "
                "it from what a worker runs at once",
                "warning",
            )
        look_back_s, interval_s = (
            values.get(name) for name in ("look_back_period_s", "metrics_interval_s")
        )
        if look_back_s is not None and interval_s is not None and look_back_s <= interval_s:
            yield Finding(
                ("look_back_period_s",),
                f"{look_back_s:g} is not longer than metrics_interval_s ({interval_s:g}): the "
                "average may be of one moment; raise it",
                "warning",
                other=("metrics_interval_s",),
            )


_PLACEMENT = (
    "workers run on this machine, and each gets the GPUs that its tensor and pipeline "
    "parallel sizes ask for"
)
_HEALTH = "a worker's heartbeats are its health check (gateway.heartbeat_s, gateway.lease_s)"
_ROLLOUT = "workers are replaced one at a time"


class DeploymentConfig(Section, frozen=True, kw_only=True):
    """The options of Ray's `@serve.deployment`. Those that mean nothing here are accepted with a
    warning.
    """

    IGNORED: ClassVar[Mapping[str, str]] = {
        "name": "workers are named after the model id",
        "user_config": "there is no user class to configure",
        "ray_actor_options": _PLACEMENT,
        "placement_group_bundles": _PLACEMENT,
        "placement_group_strategy": _PLACEMENT,
        "placement_group_bundle_label_selector": _PLACEMENT,
        "max_replicas_per_node": _PLACEMENT,
        "gang_scheduling_config": _PLACEMENT,
        "deployment_actors": "there are no actors",
        "graceful_shutdown_timeout_s": "running requests may finish for gateway.drain_s",
        "graceful_shutdown_wait_loop_s": (
            "a worker stops when its last request ends, without polling"
        ),
        "health_check_period_s": _HEALTH,
        "health_check_timeout_s": _HEALTH,
        "max_constructor_retry_count": (
            "a worker that fails to start is retried with growing pauses"
        ),
        "rolling_update_percentage": _ROLLOUT,
        "max_surge_percent": _ROLLOUT,
        "request_router_config": "requests are routed by gateway.routing_policy",
        "logging_config": "logs are JSON lines; set gateway.log_level",
    }

    REFUSED: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(
            ("min_replicas", "initial_replicas", "max_replicas", "target_ongoing_requests"),
            "belongs in deployment_config.autoscaling_config",
        ),
        "max_concurrent_queries": "is called max_ongoing_requests by now",
    }

    num_replicas: Annotated[int, Meta(ge=1, le=MAX_WORKERS)] | Literal["auto"] | None = None
    autoscaling_config: AutoscalingConfig | None = None
    max_ongoing_requests: Positive = UNLIMITED_REQUESTS
    max_queued_requests: Annotated[int, Meta(ge=-1)] = -1
    backpressure_config: BackpressureConfig = msgspec.field(default_factory=BackpressureConfig)
    graceful_shutdown_timeout_s: SecondsOrNone | None = None
    name: str | None = None
    user_config: Any = None
    ray_actor_options: dict[str, Any] | None = None
    placement_group_bundles: list[dict[str, Any]] | None = None
    placement_group_strategy: str | None = None
    placement_group_bundle_label_selector: list[dict[str, Any]] | None = None
    max_replicas_per_node: Positive | None = None
    gang_scheduling_config: dict[str, Any] | None = None
    deployment_actors: list[Any] | None = None
    graceful_shutdown_wait_loop_s: SecondsOrNone | None = None
    health_check_period_s: Seconds | None = None
    health_check_timeout_s: Seconds | None = None
    max_constructor_retry_count: Positive | None = None
    rolling_update_percentage: Annotated[float, Meta(gt=0, le=1)] | None = None
    max_surge_percent: Annotated[int, Meta(ge=0, le=100)] | None = None
    request_router_config: dict[str, Any] | None = None
    logging_config: dict[str, Any] | None = None

    @property
    def workers(self) -> int:
        """How many workers to start with."""
        if isinstance(self.num_replicas, int):
            return self.num_replicas
        scaling = self.autoscaling_config
        if scaling is None:
            return 1
        return (
            scaling.min_replicas if scaling.initial_replicas is None else scaling.initial_replicas
        )

    @classmethod
    def prepare(cls, given: dict[str, Any]) -> dict[str, Any]:
        scaling = given.get("autoscaling_config")
        if given.get("num_replicas") == "auto" and (
            scaling is None or isinstance(scaling, Mapping)
        ):
            chosen = {key: value for key, value in (scaling or {}).items() if value is not None}
            given["autoscaling_config"] = {**(scaling or {}), **_AUTO, **chosen}
        return given

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> Iterator[Finding]:
        if (
            isinstance(values.get("num_replicas"), int)
            and values.get("autoscaling_config") is not None
        ):
            yield Finding(
                ("num_replicas",),
                "a fixed number and autoscaling_config exclude each other; keep one "
                "(or write num_replicas: auto)",
                other=("autoscaling_config",),
            )
