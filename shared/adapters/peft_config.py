"""Pure. What an adapter's `adapter_config.json` may say, and what of it the other checks need.

Raises InvalidAdapter with the first failure, as shared/adapters/checks.py does. Stricter than PEFT
and vLLM where either would guess.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from shared.adapters.base_layers import BaseShapes, endings, families_in
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
    "target_parameters",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
# Other values (PiSSA, OLoRA, CorDA, LoftQ) change the base's own weights when PEFT loads the
# adapter, which vLLM does not.
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_PATTERN = re.compile(r"\^?(?:[A-Za-z0-9_.]|\\\.|\\d\+?){1,200}\Z")
_DIGITS = r"\d+"
MAX_DIGITS = 2  # each more multiplies the time of a failing match by the length of the name
MAX_PATTERNS = 1000


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
    `whole`: no layer that they name may lack.
    """

    rank: int
    alpha: float
    rank_stabilised: bool
    targets: frozenset[str] | None
    whole: bool
    ranks: Patterns
    alphas: Patterns

    def rank_of(self, module: str) -> int:
        return int(self.ranks.value(module) or self.rank)

    def scaling_of(self, module: str) -> float:
        rank = self.rank_of(module)
        return (self.alphas.value(module) or self.alpha) / (
            math.sqrt(rank) if self.rank_stabilised else rank
        )


def check_config(raw: bytes, max_rank: int, shapes: BaseShapes | None) -> PeftLoraConfig:
    """From the bytes of `adapter_config.json`.

    Raises:
        InvalidAdapter: config, duplicate_key, type, rank, alpha, unsupported, pattern, target,
            base.
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
    targets = _targets(config.get("target_modules"), shapes)
    _check_base(config.get("base_model_name_or_path"), shapes)
    whole = not any(
        config.get(k) not in (None, [], "")
        for k in ("layers_to_transform", "layers_pattern", "exclude_modules")
    )
    return PeftLoraConfig(
        rank, alpha, bool(config.get("use_rslora")), targets, whole, ranks, alphas
    )


def _rank(value: Any, key: str, max_rank: int) -> int:
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
    """vLLM evaluates these expressions inside its step loop, so only names with `.`, `^` and `\\d+`
    pass: nothing whose time could explode.
    """
    found = config.get(name)
    if found is None:
        return Patterns()
    if not isinstance(found, dict) or len(found) > MAX_PATTERNS:
        raise InvalidAdapter(
            f"{shown(name)} must be an object of at most {MAX_PATTERNS} entries.", "pattern"
        )
    pairs = []
    for key, value in found.items():
        if not _PATTERN.match(key) or key.count(_DIGITS) > MAX_DIGITS:
            raise InvalidAdapter(
                f"The pattern {shown(key)} in {shown(name)} is not a module name; "
                "other expressions are not evaluated.",
                "pattern",
            )
        pairs.append((re.compile(rf"(?:.*\.)?(?:{key})$"), number(value, key)))
    return Patterns(tuple(pairs))


def _targets(found: Any, shapes: BaseShapes | None) -> frozenset[str] | None:
    if isinstance(found, str) and found:
        return None  # an expression or `all-linear`: the tensors say what it stood for
    if not isinstance(found, list) or not found or not all(isinstance(t, str) and t for t in found):
        raise InvalidAdapter(
            "`target_modules` must be a list of module names (at least one) or an expression.",
            "target",
        )
    if shapes is not None:
        known = {ending for module in shapes.modules for ending in endings(module)}
        for target in sorted(found):
            if shapes.canonical(target) not in known:
                raise InvalidAdapter(
                    f"`target_modules` names {shown(target)}, which is no linear layer "
                    "of the base model.",
                    "target",
                )
    return frozenset(found)


def _check_base(found: Any, shapes: BaseShapes | None) -> None:
    """By family only: the same model is called by many names and paths; what else matters of a
    base, the shapes tell.
    """
    if shapes is None or not isinstance(found, str):
        return
    theirs = families_in(found)
    if theirs and shapes.families and not theirs & shapes.families:
        raise InvalidAdapter(
            "The adapter was trained on a model of the family "
            f"{'/'.join(sorted(theirs))}, the base model here is "
            f"{'/'.join(sorted(shapes.families))}.",
            "base",
        )
