"""Pure. What an adapter's `adapter_config.json` may say, and what of it the other checks need.

Raises InvalidAdapter with the first failure, as shared/adapters/checks.py does. Stricter than PEFT
and vLLM where either would guess.
"""

from __future__ import annotations

import math
import re
import re._parser as re_parser  # type: ignore[import-not-found]
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from shared.adapters.base_layers import endings
from shared.adapters.identity import CONFIG_FILE
from shared.adapters.strict_json import parse_object, shown
from shared.errors import InvalidAdapter

# Parts of PEFT's PeftLoraConfig that change what the weights mean and that vLLM 0.32 refuses or
# ignores (vllm/lora/peft_helper.py).
_UNSUPPORTED = (
    "use_dora",
    "modules_to_save",
    "lora_bias",
    "alora_invocation_tokens",
    "layer_replication",
    "use_qalora",
    "use_bdlora",
    "trainable_token_indices",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
# Other values (PiSSA, OLoRA, CorDA, LoftQ) change the base's own weights when PEFT loads the
# adapter, which vLLM does not.
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
MAX_PATTERNS = 1000
MAX_PATTERN_CHARACTERS = 300
MAX_REPEATS = 2
"""Without an upper bound (`.*`) in one expression: each multiplies the time of a failing match by
the length of the name, some 60 characters.
"""
MAX_REPEATS_IN_ALL = 16
MAX_SHORT_REPEATS = 4  # in one expression, such as `?` and `{2}`; of digits, a name has few


@dataclass(frozen=True, slots=True)
class Patterns:
    """PEFT's `rank_pattern` or `alpha_pattern`: the first that matches the end of a module's name,
    from a dot on, gives the value.
    """

    pairs: tuple[tuple[re.Pattern[str], float], ...] = ()

    def value(self, module: str) -> float | None:
        return next((value for pattern, value in self.pairs if pattern.match(module)), None)


@dataclass(frozen=True, slots=True)
class PeftLoraConfig:
    """`targets`: module names or their endings, None where the config has an expression instead.
    `parameters`: what `target_parameters` names, such as `mlp.experts.down_proj`.
    """

    rank: int
    alpha: float
    rank_stabilised: bool
    targets: frozenset[str] | None
    parameters: tuple[str, ...]
    ranks: Patterns
    alphas: Patterns

    def rank_of(self, module: str) -> int:
        return int(self.ranks.value(_parameter(module)) or self.rank)

    def scaling_of(self, module: str) -> float:
        rank = self.rank_of(module)
        return (self.alphas.value(_parameter(module)) or self.alpha) / (
            math.sqrt(rank) if self.rank_stabilised else rank
        )

    def covers(self, module: str) -> bool:
        """Whether the config names the module; PEFT leaves tensors of any other out."""
        if self.targets is None or any(e in self.targets for e in endings(module)):
            return True
        owner = module.removesuffix(".base_layer")
        owners = {p.rpartition(".")[0] for p in self.parameters}
        return any(e in owners for e in endings(owner))


def _parameter(module: str) -> str:
    """The name that PEFT's patterns are matched with: of the two tensors of fused experts the inner
    one (`base_layer`) is of `gate_up_proj`, the outer one of `down_proj`.
    """
    if module.endswith(".experts.base_layer"):
        return module.removesuffix("base_layer") + "gate_up_proj"
    return module + ".down_proj" if module.endswith(".experts") else module


def check_config(raw: bytes, max_rank: int) -> PeftLoraConfig:
    """From the bytes of `adapter_config.json`.

    Raises:
        InvalidAdapter: config, duplicate_key, type, rank, alpha, unsupported, pattern, target.
    """
    config = parse_object(raw, CONFIG_FILE, "config")
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise InvalidAdapter(f"The adapter is of type {shown(kind)}; only LORA is served.", "type")
    rank = _rank(config.get("r"), "r", max_rank)
    alpha = _alpha(config.get("lora_alpha"), "lora_alpha")
    _check_features(config)
    ranks = _patterns(config, "rank_pattern", lambda value, key: _rank(value, key, max_rank))
    alphas = _patterns(config, "alpha_pattern", _alpha)
    parameters = _names(config.get("target_parameters"), "target_parameters")
    targets = _targets(config.get("target_modules"), bool(parameters))
    return PeftLoraConfig(
        rank, alpha, bool(config.get("use_rslora")), targets, parameters, ranks, alphas
    )


def _rank(value: Any, key: str, max_rank: int) -> int:
    if type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is not int or value < 1:
        raise InvalidAdapter(
            f"{shown(key)} must be a whole number of at least 1, not {shown(value)}.", "rank"
        )
    if value > max_rank:
        raise InvalidAdapter(
            f"Rank {shown(value)} ({shown(key)}) is greater than this server's "
            f"max_lora_rank {max_rank}.",
            "rank",
        )
    return value


def _alpha(value: Any, key: str) -> float:
    number = (
        float(value)
        if type(value) is float or (type(value) is int and value.bit_length() < 64)
        else math.nan
    )
    if not (math.isfinite(number) and number > 0):
        raise InvalidAdapter(
            f"{shown(key)} must be a finite number above 0, not {shown(value)}.", "alpha"
        )
    return number


def _check_features(config: Mapping[str, Any]) -> None:
    for key in _UNSUPPORTED:
        if config.get(key):
            raise InvalidAdapter(f"{shown(key)} is not supported.", "unsupported")
    if config.get("bias", "none") != "none":
        raise InvalidAdapter(
            f"`bias` {shown(config['bias'])} is not supported; only `none` is.", "unsupported"
        )
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        raise InvalidAdapter(
            f"`init_lora_weights` {shown(init)} changes the base model's own weights. "
            "Convert the adapter with PEFT's "
            "path_initial_model_for_weight_conversion.",
            "unsupported",
        )
    if config.get("use_rslora") not in (None, True, False):
        raise InvalidAdapter(
            f"`use_rslora` must be true or false, not {shown(config['use_rslora'])}.", "config"
        )


def _patterns(
    config: Mapping[str, Any], name: str, number: Callable[[Any, str], float]
) -> Patterns:
    """vLLM evaluates these expressions beside its step loop, so only those pass whose time cannot
    explode.
    """
    found = config.get(name)
    if found is None:
        return Patterns()
    if not isinstance(found, dict) or len(found) > MAX_PATTERNS:
        raise InvalidAdapter(
            f"{shown(name)} must be an object of at most {MAX_PATTERNS} entries.", "pattern"
        )
    pairs, repeats = [], 0.0
    for key, value in found.items():
        repeats += (cost := _cost(key))
        if cost > MAX_REPEATS or repeats > MAX_REPEATS_IN_ALL:
            raise InvalidAdapter(
                f"The pattern {shown(key)} in {shown(name)} is no expression that is evaluated: "
                "it is too long, or repeats too much.",
                "pattern",
            )
        pairs.append((re.compile(_whole(key)), number(value, key)))
    return Patterns(tuple(pairs))


def _cost(pattern: str) -> float:
    """How many repetitions without a bound there are in an expression; infinite for one that is
    none, or has anything whose time could explode.
    """
    if not pattern or len(pattern) > MAX_PATTERN_CHARACTERS:
        return math.inf
    try:
        with warnings.catch_warnings(action="error"):
            parsed = re_parser.parse(pattern)
            re.compile(_whole(pattern))
    except (re.error, RecursionError, OverflowError, Warning):
        return math.inf
    long, short = _repeats(parsed, inside=False)
    return long if short <= MAX_SHORT_REPEATS else math.inf


def _whole(pattern: str) -> str:
    """PEFT matches it with the end of a module's name, from a dot on."""
    return rf"(?:.*\.)?(?:{pattern})$"


def _repeats(parsed: Any, inside: bool) -> tuple[float, float]:
    """(without a bound, short ones). Nothing that repeats may hold a choice or a repetition."""
    long = short = 0.0
    for op, value in parsed:
        name = str(op)
        parts: list[tuple[Any, bool]] = []
        if name in ("MAX_REPEAT", "MIN_REPEAT") and not inside:
            _, most, repeated = value
            digits = [(str(o), str(v)) for o, v in repeated] == _DIGITS
            short += most <= MAX_SHORT_REPEATS or digits
            long += most > MAX_SHORT_REPEATS and not digits
            parts = [(repeated, True)]
        elif name == "SUBPATTERN":
            parts = [(value[-1], inside)]
        elif name == "BRANCH" and not inside:
            parts = [(branch, inside) for branch in value[1]]
        elif name not in ("LITERAL", "NOT_LITERAL", "ANY", "IN", "AT"):
            return math.inf, math.inf
        for part, within in parts:
            more = _repeats(part, within)
            long, short = long + more[0], short + more[1]
    return long, short


_DIGITS = [(str(op), str(value)) for op, value in re_parser.parse(r"\d")]


def _names(found: Any, key: str) -> tuple[str, ...]:
    if found is None or found == "":
        return ()
    if not isinstance(found, list) or not all(isinstance(t, str) and t for t in found):
        raise InvalidAdapter(f"{shown(key)} must be a list of names.", "target")
    return tuple(found)


def _targets(found: Any, optional: bool) -> frozenset[str] | None:
    """Names of modules that the base lacks are no fault: the tensors say what was trained."""
    if isinstance(found, str) and found:
        return None  # an expression or `all-linear`: the tensors say what it stood for
    if optional and not found:
        return frozenset()
    names = _names(found, "target_modules")
    if not names:
        raise InvalidAdapter(
            "`target_modules` must be a list of module names (at least one) or an expression.",
            "target",
        )
    return frozenset(names)
