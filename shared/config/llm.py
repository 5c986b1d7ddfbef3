"""Pure. The model configuration (`LLMConfig`, with Ray Serve LLM's names) and the settings of a
whole file.

It accepts everything that Ray's Python API accepts: `LLMConfig(model_loading_config={...},
lora_config=dict(...), ...)`. Semantics and defaults were checked against Ray 2.60
(ray/llm/_internal/serve/core/configs/llm_config.py, ray/serve/config.py).
"""

from __future__ import annotations

import os
import os.path
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import msgspec
from msgspec import Struct

from shared.config.deployment import (
    TARGET_SHARE,
    UNLIMITED_REQUESTS,
    AutoscalingConfig,
    AutoscalingPolicy,
    BackpressureConfig,
    BottleneckConfig,
    DeploymentConfig,
)
from shared.config.engine import LORA_RANKS, SimTiming, engine_findings, sim_timing
from shared.config.gateway import GatewayConfig, LinkConfig
from shared.config.llm_sections import (
    DEFAULT_MAX_LORAS,
    AcceleratorConfig,
    LoraConfig,
    ModelLoadingConfig,
    StoreConfig,
    Text,
)
from shared.config.section import Finding, Section, shown
from shared.config.vllm_engine_arguments import Argument, wrong_arguments

__all__ = [
    "DEFAULT_MAX_LORAS",
    "LORA_RANKS",
    "TARGET_SHARE",
    "UNLIMITED_REQUESTS",
    "AcceleratorConfig",
    "AutoscalingConfig",
    "AutoscalingPolicy",
    "BackpressureConfig",
    "BottleneckConfig",
    "DeploymentConfig",
    "GatewayConfig",
    "LLMConfig",
    "LinkConfig",
    "LoraConfig",
    "ModelLoadingConfig",
    "Settings",
    "SimTiming",
    "StoreConfig",
    "engine_kwargs_problems",
]

USUAL_MAX_NUM_SEQS = 256
"""vLLM's default of max_num_seqs for a server, on all but the largest GPUs."""

_PLACEMENT = (
    "workers run on this machine, each with the GPUs that its tensor and pipeline "
    "parallel sizes ask for"
)

EngineName = Literal["vLLM", "sim"]
_ENGINES = {"vllm": "vLLM", "sim": "sim"}


class LLMConfig(Section, frozen=True, kw_only=True):
    """One base model, its adapters and its workers.

    Sections may be given as dicts. Raises ConfigError, with all problems at once, if it cannot
    work.
    """

    IGNORED: ClassVar[Mapping[str, str]] = {
        "runtime_env": "workers run in the environment of `loraplex`; install packages and export "
        "variables before starting it",
        "placement_group_config": _PLACEMENT,
        "resources_per_bundle": _PLACEMENT,
        "server_cls": "there is one kind of worker",
        "experimental_configs": (
            "they tune Ray's own request path; tokens are sent on as the engine makes them"
        ),
        "callback_config": "there is no Ray initialisation to hook into",
    }

    REFUSED: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(
            ("model_id", "model_source", "tokenizer_source"), "belongs in model_loading_config"
        ),
        **dict.fromkeys(
            ("enable_lora", "max_loras", "max_lora_rank", "max_model_len", "tensor_parallel_size"),
            "belongs in engine_kwargs",
        ),
        **dict.fromkeys(
            ("num_replicas", "autoscaling_config", "max_ongoing_requests"),
            "belongs in deployment_config",
        ),
    }

    model_loading_config: ModelLoadingConfig
    llm_engine: EngineName = "vLLM"
    engine_kwargs: dict[str, Any] = msgspec.field(default_factory=dict)
    runtime_env: dict[str, Any] | None = None
    accelerator_type: Text | None = None
    accelerator_config: AcceleratorConfig | None = None
    placement_group_config: dict[str, Any] | None = None
    resources_per_bundle: dict[str, Any] | None = None
    lora_config: LoraConfig | None = None
    deployment_config: DeploymentConfig = msgspec.field(default_factory=DeploymentConfig)
    server_cls: Any = None
    experimental_configs: dict[str, Any] = msgspec.field(default_factory=dict)
    log_engine_metrics: bool = True
    callback_config: Any = None

    if TYPE_CHECKING:
        # msgspec makes the constructor, and __post_init__ turns dicts into sections. This is what
        # it accepts.
        def __init__(
            self,
            *,
            model_loading_config: ModelLoadingConfig | Mapping[str, Any],
            llm_engine: str = "vLLM",
            engine_kwargs: Mapping[str, Any] = {},
            runtime_env: Mapping[str, Any] | None = None,
            accelerator_type: str | None = None,
            accelerator_config: AcceleratorConfig | Mapping[str, Any] | None = None,
            placement_group_config: Mapping[str, Any] | None = None,
            resources_per_bundle: Mapping[str, Any] | None = None,
            lora_config: LoraConfig | Mapping[str, Any] | None = None,
            deployment_config: DeploymentConfig | Mapping[str, Any] = ...,
            server_cls: object = None,
            experimental_configs: Mapping[str, Any] = {},
            log_engine_metrics: bool = True,
            callback_config: object = None,
        ) -> None: ...

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> LLMConfig:
        """The one model in a YAML file, as Ray reads it. Relative paths in it start at its folder.

        Raises ConfigError, one line per problem.
        """
        from shared.config.settings_file import app_from_args

        return app_from_args({"llm_configs": [os.fspath(path)]}).models[0]

    @property
    def model_id(self) -> str:
        return self.model_loading_config.model_id

    @property
    def model_source(self) -> str:
        """A Hugging Face id, a local folder, or a bucket."""
        source = self.model_loading_config.model_source
        return source if isinstance(source, str) else self.model_id

    @property
    def tokenizer_source(self) -> str:
        return self.model_loading_config.tokenizer_source or self.model_source

    @property
    def uses_lora(self) -> bool:
        """Whether the engine has adapter slots."""
        return bool(self.engine_kwargs.get("enable_lora", self.llm_engine == "sim"))

    @property
    def adapters_path(self) -> str | None:
        """The folder of the adapters: a bucket URL or a local path. None if the model takes no
        adapters.
        """
        return None if self.lora_config is None else self.lora_config.dynamic_lora_loading_path

    @property
    def given_max_loras(self) -> int | None:
        """Adapter slots per worker, if the config names their number: engine_kwargs.max_loras, else
        lora_config.max_num_adapters_per_replica.
        """
        slots = self.lora_config.max_num_adapters_per_replica if self.lora_config else None
        return self.engine_kwargs.get("max_loras") or slots

    @property
    def max_loras(self) -> int:
        """Adapter slots per worker: the given number, else Ray's 16. A worker with a GPU and no
        given number takes as many as its memory has room for.
        """
        return self.given_max_loras or DEFAULT_MAX_LORAS

    @property
    def workers(self) -> int:
        """Workers to start with: num_replicas, else initial_replicas, else min_replicas, else 1."""
        return self.deployment_config.workers

    @property
    def least_workers(self) -> int:
        """0 where a request may have to start the first one."""
        scaling = self.deployment_config.autoscaling_config
        return self.workers if scaling is None else scaling.min_replicas

    @property
    def runs_at_once(self) -> int:
        """How many requests one worker runs at once, as far as this file tells. Once it serves, the
        worker tells its own number.
        """
        engine = (
            self.sim.max_num_seqs
            if self.llm_engine == "sim"
            else int(self.engine_kwargs.get("max_num_seqs") or USUAL_MAX_NUM_SEQS)
        )
        return min(engine, self.deployment_config.max_ongoing_requests)

    @property
    def target_ongoing_requests(self) -> float | None:
        """Above this number of requests per worker, another worker is wanted. It is the given
        number, else TARGET_SHARE of `runs_at_once`. None if the number of workers is fixed.
        """
        scaling = self.deployment_config.autoscaling_config
        if scaling is None:
            return None
        if scaling.target_ongoing_requests is not None:
            return scaling.target_ongoing_requests
        return max(1.0, TARGET_SHARE * self.runs_at_once)

    @property
    def gpus_per_worker(self) -> int:
        """Tensor parallel size times pipeline parallel size. 0 for `accelerator_config: {kind:
        cpu}`. The simulated engine takes GPUs only with `{kind: gpu}`, to rehearse a machine.
        """
        usual = "cpu" if self.llm_engine == "sim" else "gpu"
        kind = usual if self.accelerator_config is None else self.accelerator_config.kind
        if kind == "cpu":
            return 0
        tensor, pipeline = (
            self.engine_kwargs.get(f"{kind}_parallel_size") or 1 for kind in ("tensor", "pipeline")
        )
        return int(tensor * pipeline)

    @property
    def sim(self) -> SimTiming:
        """The timing of the simulated engine. Valid only for llm_engine "sim"."""
        return sim_timing(self.engine_kwargs)

    @classmethod
    def prepare(cls, given: dict[str, Any]) -> dict[str, Any]:
        if isinstance(given.get("llm_engine"), str):
            given["llm_engine"] = _ENGINES.get(given["llm_engine"].lower(), given["llm_engine"])
        for name in ("server_cls", "callback_config"):
            if given.get(name) is not None:
                # not used, and a class cannot be sent to the worker processes
                given[name] = str(given[name])
        return given

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> Iterator[Finding]:
        yield from engine_findings(values)
        if values.get("log_engine_metrics") is False:
            text = "has no effect here: routing needs these figures"
            yield Finding(("log_engine_metrics",), text, "warning")
        yield from _named_with_their_model(values)
        deployment = values.get("deployment_config")
        scaling = deployment.autoscaling_config if deployment is not None else None
        if scaling is not None and scaling.scales and scaling.target_ongoing_requests is None:
            yield Finding(
                ("deployment_config", "autoscaling_config", "target_ongoing_requests"),
                "is not given, and Ray LLM's default (1e9) never scales; "
                f"{TARGET_SHARE:.0%} of what a worker runs at once holds (`loraplex check` says "
                "how many)",
                "warning",
            )


def _named_with_their_model(values: Mapping[str, Any]) -> Iterator[Finding]:
    """Adapters to pin or preload that are written as requests name them."""
    loading, lora = values.get("model_loading_config"), values.get("lora_config")
    if loading is None or lora is None:
        return
    prefix = f"{loading.model_id}:"
    for key in ("preload", "pin"):
        for n, name in enumerate(getattr(lora, key)):
            if name.startswith(prefix):
                text = (
                    f"{shown(name)} names the model, too; a folder of just this name is looked "
                    f"for. Write {shown(name.removeprefix(prefix))} for the model's adapter"
                )
                yield Finding(("lora_config", key, n), text, "warning")


class Settings(Struct, frozen=True, kw_only=True):
    """A whole configuration file. It is plain data that is sent to worker processes as JSON.

    `source` is the file, or what built it. `warnings` are lines for the log. `places` maps a key
    (`llm_configs[0].engine_kwargs.max_loras`) to `file:line`, for checks that come later.
    """

    models: tuple[LLMConfig, ...]
    gateway: GatewayConfig = msgspec.field(default_factory=GatewayConfig)
    source: str = ""
    warnings: tuple[str, ...] = ()
    places: dict[str, str] = msgspec.field(default_factory=dict)
    model_paths: tuple[str, ...] = ()
    """Where each of `models` stands in the file, for example `llm_configs[0]`."""

    def model(self, model_id: str) -> LLMConfig | None:
        return next((model for model in self.models if model.model_id == model_id), None)


def engine_kwargs_problems(settings: Settings, known: Mapping[str, Argument]) -> list[str]:
    """One line for each engine_kwarg of a model that vLLM does not have, with its place:
    `file:line: key: what is wrong`. `known` are vLLM's own arguments.
    """
    lines = []
    for model, path in zip(settings.models, settings.model_paths, strict=True):
        if model.llm_engine == "sim":
            continue
        for key, text in wrong_arguments(model.engine_kwargs, known):
            dotted_key = f"{path}.engine_kwargs.{key}"
            lines.append(
                f"{settings.places.get(dotted_key, settings.source)}: {dotted_key}: {text}"
            )
    return lines
