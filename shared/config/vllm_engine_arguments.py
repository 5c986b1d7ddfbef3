"""Pure. vLLM's arguments as its parser declares them, and what is wrong with the values that a
configuration gives them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeGuard

import msgspec

from shared.config import vllm_server_arguments
from shared.config.section import nearest, shown

NO_LONGER: Mapping[str, str] = {
    "device": "vLLM finds its device itself",
    "disable_async_output_proc": "vLLM processes outputs beside its steps",
    "disable_log_requests": "vLLM logs none unless it is asked to",
    "long_lora_scaling_factors": "vLLM has no such adapters any more",
    "lora_extra_vocab_size": "an adapter adds no tokens to vLLM's vocabulary any more",
    "multi_step_stream_outputs": "vLLM streams every step",
    "num_lookahead_slots": "vLLM finds them itself",
    "num_scheduler_steps": "vLLM schedules every step",
    "preemption_mode": "vLLM computes a request again that had to leave",
    "scheduler_delay_factor": "vLLM's scheduler does not wait",
    "swap_space": "vLLM computes a request again that had to leave",
    "use_v2_block_manager": "vLLM has one",
    "worker_use_ray": "there is no Ray here",
}
"""Arguments that vLLM no longer has but that old files still contain -> what to do."""
_OVERRIDES = "set engine_kwargs.hf_overrides: {rope_parameters: ...}"
_SPECULATIVE = "set engine_kwargs.speculative_config, a mapping"
_STRUCTURED = "set engine_kwargs.structured_outputs_config: {backend: ...}"
REPLACED: Mapping[str, str] = {
    "task": "set engine_kwargs.runner: pooling for an embedding model, else leave it out",
    "rope_scaling": _OVERRIDES,
    "rope_theta": _OVERRIDES,
    "speculative_model": _SPECULATIVE,
    "num_speculative_tokens": _SPECULATIVE,
    "speculative_draft_tensor_parallel_size": _SPECULATIVE,
    "guided_decoding_backend": _STRUCTURED,
    "guided_decoding_disable_fallback": _STRUCTURED,
    "enable_reasoning": "engine_kwargs.reasoning_parser alone says it now; remove it",
    "override_pooler_config": "set engine_kwargs.pooler_config",
    "max_seq_len_to_capture": "set engine_kwargs.max_cudagraph_capture_size",
    "cuda_graph_sizes": "set engine_kwargs.cudagraph_capture_sizes",
    "disable_mm_preprocessor_cache": "set engine_kwargs.mm_processor_cache_gb: 0",
    "qlora_adapter_name_or_path": "put the adapter into lora_config.dynamic_lora_loading_path",
    "enable_prompt_adapter": "vLLM serves no prompt adapters any more; remove it",
    "max_prompt_adapters": "vLLM serves no prompt adapters any more; remove it",
    "compilation_config.level": "set engine_kwargs.compilation_config.mode",
    "enable_lora_bias": "vLLM serves no biases of adapters any more; remove it",
}
"""Arguments that vLLM no longer has and on which answers depend -> what takes their place."""
_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "text": "text",
    "list": "a list",
    "mapping": "a mapping of keys",
}
_NUMBERS = ("int", "float")
_FORMS: Mapping[str, type | tuple[type, ...]] = {
    "bool": bool,
    "text": str,
    "list": (list, tuple),
    "mapping": Mapping,
}
_PLUGINS = {"tool_call_parser": "tool_parser_plugin", "reasoning_parser": "reasoning_parser_plugin"}
"""Arguments to whose choices a plugin may add -> the argument that names the plugin."""
_MANY_CHOICES = 12
FILES = ("chat_template", "tool_parser_plugin", "reasoning_parser_plugin")
"""Arguments that name a file."""


class Argument(msgspec.Struct, frozen=True):
    """One argument of vLLM. `choices` are all allowed values and `keys` those of a mapping; empty
    if vLLM does not name them. A number is at least `least`, more than `above`, at most `most` and
    less than `below`, where vLLM says so.
    """

    kind: Literal["int", "float", "bool", "text", "list", "mapping", "any"] = "any"
    choices: tuple[str, ...] = ()
    keys: dict[str, Argument] = {}
    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None


class KnownArguments(msgspec.Struct, frozen=True):
    """The arguments of one version of vLLM."""

    version: str
    arguments: dict[str, Argument]


read_known_arguments = msgspec.json.Decoder(KnownArguments).decode


def names_file(value: object) -> TypeGuard[str]:
    """Whether a value of one of FILES is a file's name. A template may also be given as text."""
    return isinstance(value, str) and "{" not in value and "\n" not in value


def wrong_arguments(
    kwargs: Mapping[str, Any], known: Mapping[str, Argument]
) -> Iterator[tuple[str, str]]:
    """(key, what is wrong) for each key of `engine_kwargs` that vLLM would refuse. A key inside a
    mapping is `compilation_config.mode`.
    """
    for key, value in kwargs.items():
        if key in NO_LONGER or key in vllm_server_arguments.EVERY:
            continue
        if key not in known and key in REPLACED:
            yield key, f"vLLM has no such engine argument any more; {REPLACED[key]}"
        elif key not in known:
            match = nearest(key, known)
            more = f"; did you mean '{match}'?" if match else "; remove it"
            yield key, f"vLLM has no such engine argument{more}"
        elif value is not None and not (key in _PLUGINS and kwargs.get(_PLUGINS[key])):
            problem = _wrong_value(value, known[key]) or _out_of_bounds(value, known[key])
            if problem is not None and (key, value) != ("distributed_executor_backend", "ray"):
                yield key, problem
            elif known[key].keys and isinstance(value, Mapping):
                yield from _wrong_keys(key, value, known[key].keys)
    if kwargs.get("enable_auto_tool_choice") and not kwargs.get("tool_call_parser"):
        yield (
            "enable_auto_tool_choice",
            "needs engine_kwargs.tool_call_parser, which says how this model writes its calls",
        )


def _wrong_keys(
    key: str, value: Mapping[str, Any], known: Mapping[str, Argument]
) -> Iterator[tuple[str, str]]:
    for name, part in value.items():
        inner = f"{key}.{name}"
        if name in known:
            problem = _wrong_part(part, known[name]) or _out_of_bounds(part, known[name])
            if problem is not None:
                yield inner, problem
            continue
        match = nearest(name, known)
        hint = REPLACED.get(inner) or (f"did you mean '{match}'?" if match else "remove it")
        yield inner, f"vLLM's {key} has no such key; {hint}"


def _wrong_part(value: object, argument: Argument) -> str | None:
    """The same as `_wrong_value` inside of a mapping. There vLLM takes a number as text, and an
    enumeration by its names in any case.
    """
    if argument.kind in _NUMBERS and not isinstance(value, int | float | None):
        if not isinstance(value, str) or _number(value) is None:
            return f"expected {_WORDS[argument.kind]}, got {shown(value)}"
    elif isinstance(value, str) and argument.choices:
        taken = {"auto", *(choice.lower() for choice in argument.choices)}
        return None if value.lower() in taken else _no_choice(value, argument.choices)
    return None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _wrong_value(value: object, argument: Argument) -> str | None:
    if argument.kind != "any" and not _fits(value, argument.kind):
        return f"expected {_WORDS[argument.kind]}, got {shown(value)}"
    if argument.choices and argument.kind in ("any", "text") and value not in argument.choices:
        return _no_choice(value, argument.choices)
    return None


def _no_choice(value: object, choices: Sequence[str]) -> str:
    match = nearest(value, choices) if isinstance(value, str) else None
    if len(choices) <= _MANY_CHOICES:
        return f"{shown(value)} is none of {', '.join(choices)}"
    hint = f"did you mean '{match}'?" if match else f"there are {', '.join(choices)}"
    return f"{shown(value)} is not known to vLLM; {hint}"


def _out_of_bounds(value: object, argument: Argument) -> str | None:
    """What vLLM itself would refuse only once it makes its configuration, or later."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    a = argument
    wrong = (
        (a.least is not None and value < a.least)
        or (a.above is not None and value <= a.above)
        or (a.most is not None and value > a.most)
        or (a.below is not None and value >= a.below)
    )
    if not wrong:
        return None
    words = (("at least", a.least), ("above", a.above), ("at most", a.most), ("below", a.below))
    bounds = [f"{word} {bound:g}" for word, bound in words if bound is not None]
    return f"expected a number {' and '.join(bounds)}, got {value:g}"


def _fits(value: object, kind: str) -> bool:
    if kind in _FORMS:
        return isinstance(value, _FORMS[kind])
    if isinstance(value, bool):
        return False
    return isinstance(value, int) or (kind == "float" and isinstance(value, float))
