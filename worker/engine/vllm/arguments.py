"""Shell. vLLM's arguments: those of `vllm serve` for one model, and all that vLLM knows, as JSON.

`loraplex check` uses a stored copy of the JSON for vLLM 0.32 (shared/config/vllm_arguments.json).
If another version is installed, it runs this module in a process of its own:

    python -m worker.engine.vllm.arguments
"""

from __future__ import annotations

import argparse
import collections.abc
import dataclasses
import enum
import importlib
import json
import logging
import sys
import types
import typing
from typing import Any

from shared.config import vllm_server_arguments
from shared.config.llm import LLMConfig
from shared.config.vllm_engine_arguments import NO_LONGER
from shared.errors import ConfigError
from worker.engine.vllm.lora import slot_count

log = logging.getLogger("loraplex.engine")

HOST_PLACES = 240
"""Adapters in host memory beside those in slots. vLLM bounds their count only."""

KINDS = {int: "int", float: "float"}
BY_TYPE = {
    int: "int",
    float: "float",
    bool: "bool",
    str: "text",
    list: "list",
    set: "list",
    dict: "mapping",
}
BOUNDS = {"ge": "least", "gt": "above", "le": "most", "lt": "below"}
TYPED = {
    "human_readable_int": "int",
    "human_readable_int_or_auto": "any",
    "nullable_kvs": "any",
}


def serve_args(model: LLMConfig) -> Any:
    """The arguments of `vllm serve` for a model config: vLLM's defaults, the config's
    engine_kwargs, and what Loraplex decides.

    Raises:
        ConfigError: vLLM refuses the combination.
    """
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    server = server_arguments()
    args = server.make_arg_parser(FlexibleArgumentParser()).parse_args([])
    try:
        for key, value in _wanted(model).items():
            if key in vllm_server_arguments.EVERY or key in NO_LONGER:
                continue
            default: Any = getattr(args, key, None)
            if isinstance(value, dict) and hasattr(default, "__dataclass_fields__"):
                # vLLM's app reads its fields. Some defaults are no values that vLLM takes, so the
                # others are not handed over.
                value = type(default)(**value)
            setattr(args, key, value)
        server.validate_parsed_serve_args(args)
    except (TypeError, ValueError) as exc:
        raise ConfigError(f"vLLM refuses the engine_kwargs of `{model.model_id}`: {exc}") from exc
    return args


def server_arguments() -> Any:
    """vLLM's module with the arguments of its own server. vLLM 0.33 has moved it."""
    try:
        return importlib.import_module("vllm.entrypoints.common.cli_args")
    except ModuleNotFoundError:
        return importlib.import_module("vllm.entrypoints.launchers.cli_args")


def _wanted(model: LLMConfig) -> dict[str, Any]:
    kwargs = model.engine_kwargs
    wanted = {
        "disable_fastapi_docs": True,
        "use_tqdm_on_load": False,
        **kwargs,
        "model": model.model_source,
        "served_model_name": [model.model_id],
    }
    if model.model_loading_config.tokenizer_source:
        wanted.setdefault("tokenizer", model.tokenizer_source)
    if model.uses_lora:
        slots = model.given_max_loras or _slots_by_memory(model) or model.max_loras
        wanted |= {"enable_lora": True, "max_loras": slots}
        # vLLM's default, as many as slots, would make every eviction a reload from disk. Residency
        # bounds the bytes of what is kept.
        wanted.setdefault("max_cpu_loras", slots + HOST_PLACES)
        # accept both forms that PEFT writes for a mixture of experts
        wanted.setdefault("enable_mixed_moe_lora_format", not wanted.get("enable_moe_shared_loras"))
        wanted.setdefault(
            "worker_extension_cls", "worker.engine.vllm.worker_extension.AdapterSlots"
        )
    if wanted.get("distributed_executor_backend") == "ray":
        del wanted["distributed_executor_backend"]  # `loraplex check` warns of it
    if kwargs.get("tensor_parallel_size", 1) * kwargs.get("pipeline_parallel_size", 1) > 1:
        from worker.engine.vllm.executor import SafeMultiprocExecutor

        # the class itself: of one that is named vLLM does not see that it can do pipelines
        wanted.setdefault("distributed_executor_backend", SafeMultiprocExecutor)
    return wanted


def _slots_by_memory(model: LLMConfig) -> int | None:
    """As many as the GPU has room for. None without a GPU, or where the model's config cannot be
    read; then vLLM itself says what is wrong with it.
    """
    from vllm.platforms import current_platform
    from vllm.transformers_utils.config import get_config

    if not current_platform.is_cuda():
        return None
    trusted = bool(model.engine_kwargs.get("trust_remote_code", False))
    try:
        config = get_config(model.model_source, trusted).to_dict()
    except (OSError, ValueError) as exc:
        log.info("slots are not chosen by memory", extra={"reason": str(exc)[:200]})
        return None
    rank = int(model.engine_kwargs.get("max_lora_rank") or slot_count.DEFAULT_RANK)
    one = slot_count.slot_bytes(config, rank)
    if not one:
        return None
    pinned = len(model.lora_config.pin) if model.lora_config else 0
    fitting = slot_count.slots_that_fit(current_platform.get_device_total_memory(), one)
    slots = max(fitting, pinned + 1)  # one must stay for the others
    log.info("slots chosen by memory", extra={"slots": slots, "slot_bytes": one, "rank": rank})
    return slots


def main() -> int:
    from vllm.version import __version__

    document = {"version": __version__, "arguments": arguments()}
    sys.stdout.write(json.dumps(document, sort_keys=True))
    return 0


def arguments() -> dict[str, dict[str, Any]]:
    """Argument name -> its description. `kind` is int, float, bool, text, list, mapping or any.
    `choices` are all allowed values and `keys` those of a mapping, if vLLM names them. So are the
    bounds of a number.
    """
    from vllm.config import SpeculativeConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = server_arguments().make_arg_parser(FlexibleArgumentParser())
    known = {action.dest: _described(action) for action in parser._actions}
    bounds = _bounds_by_name()
    known |= {name: {"kind": "any"} for name in vars(parser.parse_args([])) if name not in known}
    for field in dataclasses.fields(AsyncEngineArgs):
        if field.name in known:
            known[field.name] |= _typed(field.type) | bounds.get(field.name, {})
    known["speculative_config"]["keys"] = _keys(SpeculativeConfig)
    known["tool_call_parser"]["choices"] = sorted(ToolParserManager.list_registered())
    known["reasoning_parser"]["choices"] = sorted(ReasoningParserManager.list_registered())
    known["load_format"]["choices"] = sorted(_LOAD_FORMAT_TO_MODEL_LOADER)
    known["quantization"]["choices"] = sorted(QUANTIZATION_METHODS)
    del known["help"]
    return known


def _typed(hint: object) -> dict[str, Any]:
    """What a value in a file must be, by the type of vLLM's own field. A command line takes more:
    it reads `8k`, and JSON in text.
    """
    parts = typing.get_args(hint) if _is_union(hint) else (hint,)
    if any(typing.get_origin(part) is typing.Literal for part in parts):
        return {}  # the parser has its choices
    kinds = {_kind(part) for part in parts if part is not types.NoneType} - {"callable"}
    if len(kinds) != 1:
        return {"kind": "any"}
    (kind,) = kinds
    configs = [part for part in parts if dataclasses.is_dataclass(part)]
    return {"kind": kind, "keys": _keys(configs[0])} if configs else {"kind": kind}


def _is_union(hint: object) -> bool:
    return typing.get_origin(hint) in (types.UnionType, typing.Union)


def _kind(hint: Any) -> str:
    origin = typing.get_origin(hint) or hint
    if origin is collections.abc.Callable:
        return "callable"  # a file cannot hold one
    if dataclasses.is_dataclass(origin):
        return "mapping"
    return BY_TYPE.get(origin, "any") if isinstance(origin, type) else "any"


def _keys(config: Any) -> dict[str, dict[str, Any]]:
    return {f.name: _key(config, f.name) for f in dataclasses.fields(config) if f.init}


def _key(config: Any, name: str) -> dict[str, Any]:
    """One key of a mapping. Where vLLM turns a value into another before it looks at it, only the
    names of an enumeration can be told.
    """
    field = getattr(config, "__pydantic_fields__", {}).get(name)
    if field is None:
        return {}
    hint = field.annotation
    parts = [p for p in (typing.get_args(hint) if _is_union(hint) else (hint,)) if p is not None]
    parts = [part for part in parts if part is not types.NoneType]
    if len(parts) == 1 and isinstance(parts[0], type) and issubclass(parts[0], enum.Enum):
        return {"choices": sorted(parts[0].__members__)}
    if name in _changed_before(config):
        return {}
    found: dict[str, Any] = _bounds(field)
    literals = [typing.get_args(p) for p in parts if typing.get_origin(p) is typing.Literal]
    if literals and len(literals) == len(parts):
        found["choices"] = sorted(str(choice) for some in literals for choice in some)
    elif (kind := _typed(hint).get("kind")) in KINDS.values():
        found["kind"] = kind
    return found


def _changed_before(config: Any) -> set[str]:
    """The fields whose values vLLM turns into others before it checks them."""
    validators = config.__pydantic_decorators__.field_validators.values()
    return {name for v in validators if v.info.mode != "after" for name in v.info.fields}


def _bounds_by_name() -> dict[str, dict[str, float]]:
    """Of vLLM's arguments: their names are those of the fields of its configuration. The draft of a
    speculative configuration has some of the same names.
    """
    import vllm.config

    found: dict[str, dict[str, float]] = {}
    for config in vars(vllm.config).values():
        if isinstance(config, type) and config is not vllm.config.SpeculativeConfig:
            for name, field in getattr(config, "__pydantic_fields__", {}).items():
                found.setdefault(name, {}).update(_bounds(field))
    return found


def _bounds(field: Any) -> dict[str, float]:
    """The bounds of a number, as pydantic has them."""
    return {
        word: getattr(one, theirs)
        for one in field.metadata
        for theirs, word in BOUNDS.items()
        if isinstance(getattr(one, theirs, None), int | float)
    }


def _described(action: argparse.Action) -> dict[str, Any]:
    if isinstance(action, argparse.BooleanOptionalAction) or action.const is True:
        return {"kind": "bool"}
    kind = KINDS.get(action.type, "") if isinstance(action.type, type) else ""
    kind = kind or TYPED.get(getattr(action.type, "__name__", ""), "any")
    described: dict[str, Any] = {"kind": "any" if action.nargs else kind}
    if action.choices and not action.nargs:
        described["choices"] = sorted(map(str, action.choices))
    return described


if __name__ == "__main__":
    sys.exit(main())
