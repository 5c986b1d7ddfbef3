"""Pure. Checks an adapter's `adapter_config.json`, and reads from it what the other checks need.

Raises InvalidAdapter with the first failure, as shared/adapters/checks.py does. It is stricter than
PEFT and vLLM where those would guess.
"""

from __future__ import annotations

import math
import re
import re._parser as re_parser  # type: ignore[import-not-found]
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from shared.adapters.base_layers import endings
from shared.adapters.identity import CONFIG_FILE
from shared.adapters.strict_json import parse_object, shown
from shared.errors import InvalidAdapter

# Fields of PEFT's LoraConfig that change what the weights mean. vLLM 0.32 refuses or ignores them
# (vllm/lora/peft_helper.py).
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
# With other values (PiSSA, OLoRA, CorDA, LoftQ), PEFT changes the base's own weights when it loads
# the adapter. vLLM does not.
CONVERTIBLE = ("LOHA", "LOKR", "ADALORA")
CONVERT_IT = "`loraplex adapters convert FOLDER` makes a plain LoRA of it."
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
HEAD, EMBEDDING = "lm_head", "embed_tokens"
MAX_PATTERNS = 1000
MAX_LAYERS_PATTERNS = 16
"""A model has one or two lists of layers. All of these are tried with each layer's name."""
MAX_PATTERN_CHARACTERS = 300
MAX_REPEATS = 2
"""Unbounded repetitions (`.*`) in one expression. Each multiplies the time of a failing match by
the length of the name, about 60 characters.
"""
MAX_REPEATS_IN_ALL = 16
# bounded repetitions in one expression, such as `?` and `{2}`: a name has few digits
MAX_SHORT_REPEATS = 4
MAX_WAYS = 32
"""Ways to choose among alternatives of which several match the same text, as in `(.|[^x])(.|[^x])`,
and among lengths of bounded repetitions. A match that fails tries them all, and gives the
interpreter to no other thread meanwhile.
"""
MAX_WAYS_IN_ALL = 4 * MAX_PATTERNS  # most are names, with one each; a number of digits has three
DIGITS_IN_A_ROW = 3


@dataclass(frozen=True, slots=True)
class ModulePatterns:
    """PEFT's `rank_pattern` or `alpha_pattern`. The first expression that matches the end of a
    module's name, beginning after a dot, gives the value.
    """

    pairs: tuple[tuple[re.Pattern[str], float], ...] = ()

    def value(self, module: str) -> float | None:
        """The module's value; None if no expression matches."""
        return next((value for pattern, value in self.pairs if pattern.match(module)), None)


@dataclass(frozen=True, slots=True)
class CoveredModules:
    """Which modules PEFT adapts by this config. It leaves out the tensors of all others.

    `targets` and `excluded`: module names or their endings, or an expression for a whole name.
    None: an expression that is not evaluated here (`all-linear`, or too costly). `layers`: the
    numbers of the layers, None for all. `begin` finds a layer's number.
    """

    targets: frozenset[str] | re.Pattern[str] | None
    excluded: frozenset[str] | re.Pattern[str] | None = frozenset()
    layers: frozenset[int] | None = None
    begin: tuple[re.Pattern[str], ...] = ()

    def __contains__(self, module: str) -> bool:
        if self.excluded is not None and _matches(self.excluded, module):
            return False
        if self.targets is None:
            return True
        if not _matches(self.targets, module):
            return False
        if self.layers is None or isinstance(self.targets, re.Pattern) or module in self.targets:
            return True
        found = next(filter(None, (b.match(module) for b in self.begin)), None)
        return found is not None and int(found[1]) in self.layers


def _matches(names: frozenset[str] | re.Pattern[str], module: str) -> bool:
    if isinstance(names, re.Pattern):
        return names.fullmatch(module) is not None
    return any(end in names for end in endings(module))


@dataclass(frozen=True, slots=True)
class PeftLoraConfig:
    """What the checks need of the config. `parameters`: what `target_parameters` names, or their
    endings, for example `mlp.experts.down_proj`. PEFT itself writes `down_proj` there if the layers
    of experts are among `target_modules`. `tied`: the head has the embedding's adapter.
    """

    rank: int
    alpha: float
    rank_stabilised: bool
    covered: CoveredModules
    parameters: frozenset[str]
    ranks: ModulePatterns
    alphas: ModulePatterns
    tied: bool = False

    def rank_of(self, module: str) -> int:
        return int(self.ranks.value(_parameter(module)) or self.rank)

    def scaling_of(self, module: str) -> float:
        rank = self.rank_of(module)
        return (self.alphas.value(_parameter(module)) or self.alpha) / (
            math.sqrt(rank) if self.rank_stabilised else rank
        )

    def covers(self, module: str) -> bool:
        """Whether the config names the module. PEFT leaves out the tensors of any other."""
        if module in self.covered or (self.tied and module.rpartition(".")[2] == HEAD):
            return True
        return any(e in self.parameters for e in endings(_whole_parameter(module)))

    def is_read_alike(self, module: str) -> bool:
        """Whether the engine finds the same rank and scaling as PEFT, which looks for a layer that
        is adapted as a parameter (`mlp.gate.weight`) under the parameter's name.
        """
        if module in self.covered:
            return True
        names = (_parameter(module), _whole_parameter(module))
        return all(len({p.value(name) for name in names}) == 1 for p in (self.ranks, self.alphas))


def _parameter(module: str) -> str:
    """The name that PEFT's patterns are matched with. Fused experts have two tensors: the inner one
    (`base_layer`) belongs to `gate_up_proj`, the outer one to `down_proj`.
    """
    if module.endswith(".experts.base_layer"):
        return module.removesuffix("base_layer") + "gate_up_proj"
    return module + ".down_proj" if module.endswith(".experts") else module


def _whole_parameter(module: str) -> str:
    """The name of the parameter that an adapter of `target_parameters` changes."""
    found = _parameter(module)
    return found if found != module else f"{module}.weight"


def check_config(raw: bytes, max_rank: int) -> PeftLoraConfig:
    """Checks the bytes of an `adapter_config.json`.

    Raises:
        InvalidAdapter: config, incomplete, duplicate_key, type, rank, alpha, unsupported, pattern,
            target.
    """
    config = parse_object(raw, CONFIG_FILE, "config", if_cut="incomplete")
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        hint = f" {CONVERT_IT}" if kind in CONVERTIBLE else ""
        raise InvalidAdapter(
            f"The adapter is of type {shown(kind)}; only LORA is served.{hint}", "type"
        )
    rank = _rank(config.get("r"), "r", max_rank)
    alpha = _alpha(config.get("lora_alpha"), "lora_alpha")
    _check_features(config)
    ranks = _patterns(config, "rank_pattern", lambda value, key: _rank(value, key, max_rank))
    alphas = _patterns(config, "alpha_pattern", _alpha)
    parameters = frozenset(_names(config.get("target_parameters"), "target_parameters"))
    covered = _covered(config, bool(parameters))
    return PeftLoraConfig(
        rank,
        alpha,
        bool(config.get("use_rslora")),
        covered,
        parameters,
        ranks,
        alphas,
        bool(config.get("ensure_weight_tying")),
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
            "Convert the adapter with PEFT's path_initial_model_for_weight_conversion, or: "
            f"{CONVERT_IT}",
            "unsupported",
        )
    if config.get("use_rslora") not in (None, True, False):
        raise InvalidAdapter(
            f"`use_rslora` must be true or false, not {shown(config['use_rslora'])}.", "config"
        )


def _patterns(
    config: Mapping[str, Any], name: str, number: Callable[[Any, str], float]
) -> ModulePatterns:
    """vLLM evaluates these expressions on the way to its step loop. So only those pass whose time
    cannot explode.
    """
    found = config.get(name)
    if found is None:
        return ModulePatterns()
    if not isinstance(found, dict) or len(found) > MAX_PATTERNS:
        raise InvalidAdapter(
            f"{shown(name)} must be an object of at most {MAX_PATTERNS} entries.", "pattern"
        )
    pairs, repeats, ways = [], 0.0, 0
    for key, value in found.items():
        repeats += (cost := _cost(key))
        if cost <= MAX_REPEATS:
            ways += _ways(re_parser.parse(key))
        if cost > MAX_REPEATS or repeats > MAX_REPEATS_IN_ALL or ways > MAX_WAYS_IN_ALL:
            raise InvalidAdapter(
                f"The pattern {shown(key)} in {shown(name)} is no expression that is evaluated: "
                "it is too long, or repeats too much.",
                "pattern",
            )
        pairs.append((re.compile(whole_pattern(key)), number(value, key)))
    return ModulePatterns(tuple(pairs))


_UNCLEAR = re.compile(r"\[\^?\[|\[[^\]]*(?:--|&&|~~|\|\|)")
"""Sets of characters that Python warns of, because it may read them in another way some day. The
warning cannot be caught: `warnings.catch_warnings` is of the whole process, and adapters are
checked in threads. Warnings of others became errors, and could stay so for good.
"""


def _cost(pattern: str) -> float:
    """How many unbounded repetitions an expression has. Infinite if it is not a valid expression,
    or has something whose time could explode.
    """
    if not pattern or len(pattern) > MAX_PATTERN_CHARACTERS or _UNCLEAR.search(pattern):
        return math.inf
    try:
        parsed = re_parser.parse(pattern)
        re.compile(whole_pattern(pattern))
    except (re.error, RecursionError, OverflowError, Warning):
        return math.inf
    long, short = _repeats(parsed, inside=False)
    return long if short <= MAX_SHORT_REPEATS and _ways(parsed) <= MAX_WAYS else math.inf


def whole_pattern(pattern: str) -> str:
    """The expression as PEFT uses it: it must match the end of a module's name, beginning after a
    dot.
    """
    return rf"(?:.*\.)?(?:{pattern})$"


def _repeats(parsed: Any, inside: bool) -> tuple[float, float]:
    """(unbounded repetitions, bounded ones). Nothing that repeats may hold a choice or a
    repetition.
    """
    long = short = 0.0
    for op, value in parsed:
        name = str(op)
        parts: list[tuple[Any, bool]] = []
        if name in ("MAX_REPEAT", "MIN_REPEAT") and not inside:
            _, most, repeated = value
            digits = _is_digit(repeated)
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


def _ways(parsed: Any) -> int:
    """In how many ways an expression may match one text, at most, but for unbounded repetitions."""
    ways = 1
    for op, value in parsed:
        if str(op) == "SUBPATTERN":
            ways *= _ways(value[-1])
        elif str(op) == "BRANCH":
            ways *= _ways_of_one(value[1])
        elif str(op) in ("MAX_REPEAT", "MIN_REPEAT"):
            least, most, repeated = value
            ways *= DIGITS_IN_A_ROW if _is_digit(repeated) else _short(least, most)
    return ways


def _short(least: int, most: int) -> int:
    return most - least + 1 if most <= MAX_SHORT_REPEATS else 1


def _is_digit(repeated: Any) -> bool:
    return [(str(op), str(value)) for op, value in repeated] == _DIGITS


def _ways_of_one(alternatives: Any) -> int:
    """Of names, those match the same text that others begin with (`1` and `12`)."""
    names = [[value for _, value in a] for a in alternatives]
    if all(str(op) == "LITERAL" for a in alternatives for op, _ in a):
        return max(sum(one[: len(o)] == o for o in names) for one in names)
    return sum(map(_ways, alternatives))


_DIGITS = [(str(op), str(value)) for op, value in re_parser.parse(r"\d")]


def _names(found: Any, key: str) -> tuple[str, ...]:
    if found is None or found == "":
        return ()
    if not isinstance(found, list) or not all(isinstance(t, str) and t for t in found):
        raise InvalidAdapter(f"{shown(key)} must be a list of names.", "target")
    return tuple(found)


def _covered(config: Mapping[str, Any], optional: bool) -> CoveredModules:
    targets = _targets(config.get("target_modules"), optional)
    excluded = config.get("exclude_modules")
    without: frozenset[str] | re.Pattern[str] | None
    if isinstance(excluded, str) and excluded:
        without = _expression(excluded)
    else:
        without = frozenset(_names(excluded, "exclude_modules"))
    layers = config.get("layers_to_transform")
    numbers = layers if isinstance(layers, list) else [] if layers is None else [layers]
    if not all(type(n) is int for n in numbers):
        raise InvalidAdapter(
            f"`layers_to_transform` must be numbers of layers, not {shown(layers)}.", "target"
        )
    if not numbers:
        return CoveredModules(targets, without)
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    names = _names(patterns, "layers_pattern")
    if len(names) > MAX_LAYERS_PATTERNS:
        raise InvalidAdapter(
            f"`layers_pattern` must have at most {MAX_LAYERS_PATTERNS} entries.", "pattern"
        )
    begin = []
    for pattern in names:
        if _cost(pattern) > MAX_REPEATS:
            raise InvalidAdapter(f"`layers_pattern` {shown(pattern)} repeats too much.", "pattern")
        found = re.compile(rf"(?:^|.*?\.)(?:{pattern})\.(\d+)\.")
        if found.groups > 1:  # PEFT takes what the first one holds for the layer's number
            raise InvalidAdapter(f"`layers_pattern` {shown(pattern)} has a group.", "pattern")
        begin.append(found)
    return CoveredModules(targets, without, frozenset(numbers), tuple(begin))


def _targets(found: Any, optional: bool) -> frozenset[str] | re.Pattern[str] | None:
    """The module names, or an expression. A name that the base lacks is no fault, because the
    tensors show what was trained.
    """
    if isinstance(found, str) and found:
        return _expression(found)
    if optional and not found:
        return frozenset()
    names = _names(found, "target_modules")
    if not names:
        raise InvalidAdapter(
            "`target_modules` must be a list of module names (at least one) or an expression.",
            "target",
        )
    return frozenset(names)


def _expression(text: str) -> re.Pattern[str] | None:
    """None if it is not evaluated: the tensors show what it stands for."""
    if text.lower() == "all-linear" or _cost(text) > MAX_REPEATS:
        return None
    return re.compile(text)
