"""Pure. vLLM's arguments as its parser declares them, and what is wrong with the values that a
configuration gives them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import msgspec

from shared.config import front_end
from shared.config.section import nearest, shown

NO_LONGER: Mapping[str, str] = {
    "device": "vLLM finds its device itself",
    "disable_log_requests": "vLLM logs none unless it is asked to",
    "use_v2_block_manager": "vLLM has one",
}
"""Arguments that vLLM had and files still have."""
_WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false"}
_PLUGINS = {"tool_call_parser": "tool_parser_plugin", "reasoning_parser": "reasoning_parser_plugin"}
"""Arguments whose choices a plugin may add to."""
_MANY_CHOICES = 12


class Argument(msgspec.Struct, frozen=True):
    """`choices`: all there is; empty where vLLM does not say."""

    kind: Literal["int", "float", "bool", "any"] = "any"
    choices: tuple[str, ...] = ()


class KnownArguments(msgspec.Struct, frozen=True):
    """Those of one version of vLLM."""

    version: str
    arguments: dict[str, Argument]


read_known_arguments = msgspec.json.Decoder(KnownArguments).decode


def wrong_arguments(
    kwargs: Mapping[str, Any], known: Mapping[str, Argument]
) -> Iterator[tuple[str, str]]:
    """(key, what is wrong) for each key of `engine_kwargs` that vLLM would not take."""
    for key, value in kwargs.items():
        if key in NO_LONGER or key in front_end.EVERY:
            continue
        if key not in known:
            match = nearest(key, known)
            more = f"; did you mean '{match}'?" if match else "; remove it"
            yield key, f"vLLM has no such engine argument{more}"
        elif value is not None and not (key in _PLUGINS and kwargs.get(_PLUGINS[key])):
            problem = _wrong_value(value, known[key])
            if problem is not None and (key, value) != ("distributed_executor_backend", "ray"):
                yield key, problem
    if kwargs.get("enable_auto_tool_choice") and not kwargs.get("tool_call_parser"):
        yield (
            "enable_auto_tool_choice",
            "needs engine_kwargs.tool_call_parser, which says how this model writes its calls",
        )


def _wrong_value(value: object, argument: Argument) -> str | None:
    if argument.kind != "any" and not _fits(value, argument.kind):
        return f"expected {_WORDS[argument.kind]}, got {shown(value)}"
    if argument.choices and isinstance(value, str) and value not in argument.choices:
        choices = argument.choices
        match = nearest(value, choices)
        if len(choices) <= _MANY_CHOICES:
            return f"{shown(value)} is none of {', '.join(choices)}"
        hint = f"did you mean '{match}'?" if match else f"there are {', '.join(choices)}"
        return f"{shown(value)} is not known to vLLM; {hint}"
    return None


def _fits(value: object, kind: str) -> bool:
    if kind == "bool":
        return isinstance(value, bool)
    if isinstance(value, bool):
        return False
    return isinstance(value, int) or (kind == "float" and isinstance(value, float))
