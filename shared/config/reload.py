"""Pure. What a changed configuration file changes in a server that runs: which keys take effect at
once, and which only with a restart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from shared.config.llm import LLMConfig, Settings

GATEWAY_KEYS = (
    "max_body_bytes",
    "max_concurrent_requests",
    "max_queued_requests",
    "queue_timeout_s",
    "request_timeout_s",
    "slow_reader_bytes",
    "bounds",
    "resume",
    "resume_max_tokens",
    "resume_max_bytes",
    "private_prefix_cache",
    "allowed_origins",
    "allowed_hosts",
    "log_level",
    "drain_s",
    "kill_s",
)
"""Of the section `gateway`. A section named here takes effect as a whole."""
LORA_KEYS = ("pin", "preload", "aliases")
"""Of a model's `lora_config`, if it had one before."""
DEPLOYMENT_KEYS = (
    "num_replicas",
    "autoscaling_config",
    "max_ongoing_requests",
    "max_queued_requests",
    "backpressure_config",
)
"""Of a model's `deployment_config`. The numbers of workers are those of `loraplex serve`."""


@dataclass(frozen=True, slots=True)
class ReloadPlan:
    """`settings` hold from now on: the old ones with what can change. `changed` and `need_restart`
    are keys as the file has them, those of a model below its id.
    """

    settings: Settings
    changed: tuple[str, ...]
    need_restart: tuple[str, ...]


def plan(old: Settings, new: Settings) -> ReloadPlan:
    """Models are matched by their ids. A port of 0 is the one that was found for it."""
    if new.gateway.port == 0:
        port = msgspec.structs.replace(new.gateway, port=old.gateway.port)
        new = msgspec.structs.replace(new, gateway=port)
    models = tuple(
        model if (found := new.model(model.model_id)) is None else _model(model, found)
        for model in old.models
    )
    settings = msgspec.structs.replace(
        old,
        models=models,
        gateway=_with(old.gateway, new.gateway, GATEWAY_KEYS),
        places=new.places,
    )
    return ReloadPlan(
        settings, tuple(_differences(old, settings)), tuple(_differences(settings, new))
    )


def _model(old: LLMConfig, new: LLMConfig) -> LLMConfig:
    lora = old.lora_config
    if lora is not None and new.lora_config is not None:
        lora = _with(lora, new.lora_config, LORA_KEYS)
    deployment = _with(old.deployment_config, new.deployment_config, DEPLOYMENT_KEYS)
    if deployment.autoscaling_config is not None:
        # a policy is code: it is imported once, at the start
        before = old.deployment_config.autoscaling_config
        policy = None if before is None else before.policy
        scaling = msgspec.structs.replace(deployment.autoscaling_config, policy=policy)
        deployment = msgspec.structs.replace(deployment, autoscaling_config=scaling)
    return msgspec.structs.replace(old, lora_config=lora, deployment_config=deployment)


def _with(old: Any, new: Any, keys: tuple[str, ...]) -> Any:
    return msgspec.structs.replace(old, **{key: getattr(new, key) for key in keys})


def _differences(old: Settings, new: Settings) -> Iterator[str]:
    """The keys that differ."""
    yield from _paths(_plain(old.gateway), _plain(new.gateway), "gateway")
    before, after = ({m.model_id: _plain(m) for m in s.models} for s in (old, new))
    for model in dict.fromkeys((*before, *after)):
        if model in before and model in after:
            yield from _paths(before[model], after[model], model)
        else:
            yield model


def _paths(old: Any, new: Any, path: str) -> Iterator[str]:
    """Sections are looked into; what a user names (aliases, arguments) is told as one."""
    if old == new:
        return
    both = isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys()
    if not both or path.count(".") > 1:
        yield path
        return
    for key in old:
        yield from _paths(old[key], new[key], f"{path}.{key}")


def _plain(section: Any) -> Any:
    return msgspec.to_builtins(section)
