"""Shell. What vLLM itself refuses of models' engine_kwargs, before anything is started. `loraplex
check` runs this module in a process of its own:

    python -m worker.engine.vllm.boot.refusals < MODELS

MODELS is a JSON list of model configs. vLLM makes its whole configuration from each, as a worker
does at its start, in milliseconds. It reads the model's config.json and no weights, and uses no
GPU. The process cannot reach the network. The answer is the last line of stdout.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
from jinja2 import TemplateError, TemplateSyntaxError
from pydantic import ValidationError

from shared.config.llm import LLMConfig
from shared.config.vllm.refusals import Devices, Refusal, RefusalScope, VllmVerdict
from shared.config.vllm_engine_arguments import names_file
from shared.errors import ConfigError
from shared.runtime.process import count_gpus, follow_parent
from worker.engine.factory import VLLM_CPU_ENV, VLLM_ENV
from worker.engine.vllm.app.server_environment import remove_variables

OFFLINE = {"HF_HUB_OFFLINE": "1", "VLLM_USE_MODELSCOPE": "False", "VLLM_LOGGING_LEVEL": "CRITICAL"}
STAND_IN = Path(__file__).with_name("any_model")
"""A model that bounds no length, for what vLLM says without the real one."""
RAISED = ("value_error", "assertion_error")
"""Pydantic's types of errors that a function of vLLM raised. All others come from a field's own
type and bounds.
"""
CONSULTED = {"current_platform", "hf_config", "hf_text_config", "model_config"}
"""By these names vLLM's functions look at the host and at the model."""


def main() -> int:
    follow_parent()
    remove_variables(os.environ)
    environment = VLLM_ENV if count_gpus() else VLLM_ENV | VLLM_CPU_ENV
    os.environ.update(environment | os.environ | OFFLINE)
    models = msgspec.json.decode(sys.stdin.buffer.read(), type=tuple[LLMConfig, ...])
    sys.addaudithook(_refuse_connections)
    for wrong in _wrong_variables():
        sys.exit(wrong)
    _choose_platform()
    verdicts = [verdict(model) for model in models]
    sys.stdout.write("\n" + msgspec.json.encode(verdicts).decode() + "\n")
    return 0


def _refuse_connections(event: str, args: tuple[Any, ...]) -> None:
    if event == "socket.getaddrinfo" or (event == "socket.connect" and isinstance(args[1], tuple)):
        raise ConnectionRefusedError("`loraplex check` asks vLLM without a network")


def _wrong_variables() -> Iterator[str]:
    """vLLM reads its variables where it needs them, and does not name the one that it refuses."""
    import vllm.envs

    for name in sorted(vllm.envs.environment_variables.keys() & os.environ.keys()):
        try:
            getattr(vllm.envs, name)
        except Exception as exc:  # each variable has a function of its own
            yield f"the environment's {name}: {exc}"


def _choose_platform() -> None:
    """A build of vLLM for GPUs knows no platform on a host without any."""
    import vllm.platforms

    if not vllm.platforms.current_platform.device_type:
        from vllm.platforms.cpu import CpuPlatform

        vllm.platforms.current_platform = CpuPlatform()


def verdict(model: LLMConfig) -> VllmVerdict:
    """What vLLM refuses of a model. Each refusal that a key has caused is looked behind: the key is
    left out, and vLLM is asked again.
    """
    elsewhere, devices = _is_elsewhere(model.model_source), _devices(model.gpus_per_worker)
    bare = None if elsewhere else _refusal_of(model, {})
    here = not elsewhere and not _is_absence(bare)
    kwargs, found = dict(model.engine_kwargs), []
    if not here:
        model = _with_source(model, str(STAND_IN))
    while (exc := _refusal_of(model, kwargs)) is not None:
        of_model = here and bare is not None and _words(bare) == _words(exc)
        keys = () if of_model else tuple(_causes(model, kwargs, _words(exc)))
        alike = here and devices is Devices.WORKERS
        scope = _scope(exc, bool(keys), kwargs, alike=alike)
        # what else is wrong with the stand-in is not asked for
        if here or scope is not RefusalScope.HOST:
            found.append(Refusal(keys, _words(exc), scope))
        if not keys:
            break
        for key in keys:
            del kwargs[key]
    return VllmVerdict(tuple(found), here, devices)


def _devices(gpus: int) -> Devices:
    """Those of this host, compared with what a worker of so many GPUs has."""
    from vllm.platforms import cpu_platform_plugin, current_platform

    if current_platform.is_cpu() == (gpus == 0) and gpus <= count_gpus():
        return Devices.WORKERS
    return Devices.OTHER if count_gpus() or cpu_platform_plugin() is None else Devices.CPU


def _is_elsewhere(source: str) -> bool:
    """Whether the model can only be on another host, or in a bucket."""
    return "://" in source or (Path(source).is_absolute() and not Path(source).exists())


def _scope(
    exc: BaseException, caused: bool, kwargs: Mapping[str, Any], *, alike: bool
) -> RefusalScope:
    """Who refuses. `caused`: by keys of `kwargs`. `alike`: the workers have the same model and
    devices.
    """
    if _is_absence(exc):
        return RefusalScope.ABSENT
    everywhere = _is_broken(exc) or (
        caused and (_is_of_a_field(exc) or _is_of_these_values(exc, kwargs))
    )
    return RefusalScope.EVERYWHERE if alike or everywhere else RefusalScope.HOST


def _with_source(model: LLMConfig, folder: str) -> LLMConfig:
    loading = msgspec.structs.replace(
        model.model_loading_config, model_source=folder, tokenizer_source=None
    )
    return msgspec.structs.replace(model, model_loading_config=loading)


def _refusal_of(model: LLMConfig, kwargs: Mapping[str, Any]) -> BaseException | None:
    """What vLLM raises for a model with these engine_kwargs. None: it takes them.

    Raises ConfigError if the model's other sections need more of them.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext

    from worker.engine.vllm.arguments import serve_args

    lora = model.lora_config if kwargs.get("enable_lora") else None
    model = msgspec.structs.replace(model, engine_kwargs=dict(kwargs), lora_config=lora)
    try:
        args = serve_args(model)
        config = AsyncEngineArgs.from_cli_args(args).create_engine_config(
            UsageContext.OPENAI_API_SERVER
        )
        if "block_size" in kwargs:
            _choose_attention(config)
        _compile(args.chat_template)
    except Exception as exc:  # vLLM raises whatever its configuration, model or plugins raise
        return exc.__cause__ if isinstance(exc, ConfigError) and exc.__cause__ else exc
    return None


def _choose_attention(config: Any) -> None:
    """vLLM does so once the weights are loaded. Raises ValueError if no kernel takes the blocks.
    Whatever else it would say of the kernels is not asked for: it depends on the layers.
    """
    from vllm.config import set_current_vllm_config
    from vllm.v1.attention.selector import get_attn_backend
    from vllm.v1.worker.utils import select_common_block_size

    model, cache = config.model_config, config.cache_config
    cacheless = model.is_attention_free or model.attn_type == "encoder_only"
    if cacheless or model.is_hybrid or cache.kv_cache_dtype_skip_layers:
        return  # vLLM has no such cache for these, or changes the size

    def choose() -> Any:
        return get_attn_backend(
            model.get_head_size(), model.dtype, cache.cache_dtype, use_mla=model.use_mla
        )

    with set_current_vllm_config(config):
        try:
            backend = choose()
        except Exception as refused:  # each platform raises its own
            cache.user_specified_block_size = False
            try:
                choose()
            except Exception:
                return  # it is not for the size
            raise refused
        select_common_block_size(cache.block_size, [backend])


def _compile(template: str | None) -> None:
    """vLLM compiles a template at the first request, which is too late."""
    from transformers.utils import chat_template_utils

    if template is not None:
        text = Path(template).read_text("utf-8") if names_file(template) else template
        chat_template_utils._compile_jinja_template(text)


def _causes(model: LLMConfig, kwargs: Mapping[str, Any], words: str) -> Iterator[str]:
    """The keys without which vLLM says something else."""
    for key in kwargs:
        try:
            exc = _refusal_of(model, {k: v for k, v in kwargs.items() if k != key})
        except ConfigError:
            continue  # it cannot be left out
        if exc is None or _words(exc) != words:
            yield key


def _words(exc: BaseException) -> str:
    """vLLM's own, without the values that pydantic adds."""
    if isinstance(exc, ValidationError):
        errors = exc.errors(include_url=False, include_input=False, include_context=False)
        said = dict.fromkeys(e["msg"].removeprefix("Value error, ") for e in errors)
        inner = ".".join(map(str, errors[0]["loc"]))
        return (f"{inner}: " if inner else "") + " or ".join(said)
    if isinstance(exc, TemplateSyntaxError):
        return f"{exc.message} (line {exc.lineno} of the template)"
    return f"{type(exc).__name__}: {exc}" if isinstance(exc, KeyError) else str(exc)


def _chain(exc: BaseException | None) -> Iterator[BaseException]:
    """The exception, what pydantic holds inside of it, and what was being handled as it came."""
    while exc is not None:
        yield exc
        inner = None
        if isinstance(exc, ValidationError):
            inner = exc.errors()[0].get("ctx", {}).get("error")
        exc = inner if isinstance(inner, BaseException) else exc.__cause__ or exc.__context__


def _is_absence(exc: BaseException | None) -> bool:
    """A file is not on this host, or would have to be downloaded."""
    return any(isinstance(one, OSError) for one in _chain(exc)) and not _is_broken(exc)


def _is_broken(exc: BaseException | None) -> bool:
    """A file is here and is not JSON. Transformers says that with an OSError, too."""
    broken = json.JSONDecodeError | UnicodeDecodeError
    return any(isinstance(one, broken) for one in _chain(exc))


def _names_at(exc: BaseException) -> set[str]:
    """The names that the function uses which has raised."""
    raised = [one for one in _chain(exc) if not isinstance(one, ValidationError)]
    at = (raised[0] if raised else exc).__traceback__
    if at is None:
        return set()
    *_, (frame, _) = traceback.walk_tb(at)
    return {*frame.f_code.co_names}


def _is_of_a_field(exc: BaseException) -> bool:
    """The value is not of the type or within the bounds that vLLM's field has."""
    return isinstance(exc, ValidationError) and all(e["type"] not in RAISED for e in exc.errors())


def _is_of_these_values(exc: BaseException, kwargs: Mapping[str, Any]) -> bool:
    """It follows from the values that are given, from no default, and not from model or host."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    if isinstance(exc, TemplateError):
        return True
    mentioned = {*re.findall(r"[a-z][a-z0-9_]+", _words(exc).replace("-", "_"))}
    mentioned &= {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    return bool(mentioned) and mentioned <= kwargs.keys() and not _names_at(exc) & CONSULTED


if __name__ == "__main__":
    sys.exit(main())
