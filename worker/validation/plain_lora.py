"""Shell. Makes a plain LoRA of adapters that vLLM's kernels cannot serve, but arithmetic can turn
into one: LoHa, LoKr, AdaLoRA, and PiSSA or OLoRA that were saved unconverted.

Each module's change of the base, `B @ A`, is found as exact factors. If their rank is above the
bound, the smaller singular values are left out, and the error says what that costs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from shared.adapters.identity import CONFIG_FILE, WEIGHTS_FILE
from shared.adapters.peft_config import ModulePatterns, whole_pattern
from shared.errors import ConfigError

Tensors: TypeAlias = Mapping[str, torch.Tensor]
Factors: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""B (outputs x rank) and A (rank x inputs), in float32; the change of the base is B @ A."""
PREFIX = "base_model.model."
PARTS: Mapping[str, frozenset[str]] = {
    "LoHa": frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}),
    "LoKr": frozenset({"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"}),
    "AdaLoRA": frozenset({"lora_A", "lora_B", "lora_E"}),
    "PiSSA": frozenset({"lora_A", "lora_B"}),
    "OLoRA": frozenset({"lora_A", "lora_B"}),
}
"""All tensors that a module of each kind may have."""
RANDOM_START = re.compile(r"pissa_niter_\d+\Z")
NO_CHANGE = 1e-7
"""Of the largest singular value: smaller ones are rounding."""


@dataclass(frozen=True, slots=True)
class Converted:
    """`error`: of all modules, the largest part of its change that was lost (Frobenius norm)."""

    kind: str
    modules: int
    rank: int
    error: float


def to_plain_lora(
    folder: Path, out: Path, max_rank: int, base: Path | None = None, initial: Path | None = None
) -> Converted:
    """Writes a plain LoRA to `out`. `base` is the base model's folder, `initial` that of the
    adapter as its training began: PiSSA and OLoRA need one of the two.

    Raises ConfigError with the reason why it cannot be.
    """
    config = json.loads((folder / CONFIG_FILE).read_text())
    tensors = _weights(folder)
    kind, factors = _reader(config, base, initial)
    modules: dict[str, Factors] = {}
    error = 0.0
    for name, parts in _by_module(tensors).items():
        # a magnitude, a bias or a whole module: without it the answers would be others
        if beyond := parts.keys() - PARTS[kind]:
            raise ConfigError(f"{name} has {', '.join(sorted(beyond))}; a plain LoRA has no such.")
        try:
            modules[name], lost = _within(factors(name, parts), max_rank)
        except (KeyError, RuntimeError) as exc:
            raise ConfigError(f"{name} is no whole {kind} module: {exc}.") from exc
        error = max(error, lost)
    if not modules:
        raise ConfigError(f"{folder} has no weights of a {kind} adapter.")
    rank = max(a.shape[0] for _, a in modules.values())
    _write(out, config, modules, rank)
    return Converted(kind, len(modules), rank, error)


def convertible(config: Mapping[str, Any]) -> bool:
    """Whether it is something else than a plain LoRA, but can become one."""
    start = str(config.get("init_lora_weights", "")).lower()
    kind = str(config.get("peft_type", "")).upper()
    return kind in ("LOHA", "LOKR", "ADALORA") or (
        kind == "LORA" and start.startswith(("pissa", "olora"))
    )


def _reader(
    config: Mapping[str, Any], base: Path | None, initial: Path | None
) -> tuple[str, Callable[[str, Tensors], Factors]]:
    kind = str(config.get("peft_type", "")).upper()
    start = str(config.get("init_lora_weights", "")).lower()
    if config.get("layer_replication"):
        raise ConfigError(
            "layer_replication adds layers to the base, and an adapter cannot: serve a base that "
            "has them."
        )
    if kind == "LOHA":
        return "LoHa", lambda name, parts: _loha(parts, _alpha(config, name))
    if kind == "LOKR":
        return "LoKr", lambda name, parts: _lokr(parts, _alpha(config, name), _rank(config, name))
    if kind == "ADALORA":
        return "AdaLoRA", lambda name, parts: _adalora(parts, float(config["lora_alpha"]))
    if kind == "LORA" and start.startswith(("pissa", "olora")):
        before = _start_of(start, base, initial, config)
        label = "OLoRA" if start.startswith("olora") else "PiSSA"
        return label, lambda name, parts: _less_start(parts, before(name, parts), config, name)
    raise ConfigError(f"There is no conversion for an adapter of the type {kind or 'unknown'}.")


def _weights(folder: Path) -> Tensors:
    try:
        return {name: tensor.float() for name, tensor in load_file(folder / WEIGHTS_FILE).items()}
    except (OSError, SafetensorError) as exc:
        raise ConfigError(f"cannot read {folder / WEIGHTS_FILE}: {exc}") from exc


def _by_module(tensors: Tensors) -> dict[str, dict[str, torch.Tensor]]:
    """Module -> the last part of its tensors' names -> tensor."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, part = name.removesuffix(".weight").rpartition(".")
        found.setdefault(module, {})[part] = tensor
    return found


# ---- the kinds -----------------------------------------------------------------------------------


def _loha(p: Tensors, alpha: float) -> Factors:
    """(w1a @ w1b) * (w2a @ w2b), element by element: its factors are all products of a column of
    one with a column of the other.
    """
    rank = p["hada_w1_b"].shape[0]
    b = torch.einsum("oi,oj->oij", p["hada_w1_a"], p["hada_w2_a"]).flatten(1)
    a = torch.einsum("ik,jk->ijk", p["hada_w1_b"], p["hada_w2_b"]).flatten(0, 1)
    return b * (alpha / rank), a


def _lokr(p: Tensors, alpha: float, rank: int) -> Factors:
    """kron(w1, w2), of which each may be given as a product. The factors of a Kronecker product
    are the Kronecker products of the factors.
    """
    for part in ("lokr_w1_b", "lokr_w2_b"):
        rank = p[part].shape[0] if part in p else rank
    b1, a1 = _factors_of(p, "lokr_w1")
    b2, a2 = _factors_of(p, "lokr_w2")
    return torch.kron(b1, b2) * (alpha / rank), torch.kron(a1, a2)


def _factors_of(p: Tensors, name: str) -> Factors:
    if name not in p:
        return p[f"{name}_a"], p[f"{name}_b"]
    u, s, v = torch.linalg.svd(p[name], full_matrices=False)
    kept = s > NO_CHANGE * s.max().clamp(min=1e-30)
    return u[:, kept] * s[kept], v[kept]


def _adalora(p: Tensors, alpha: float) -> Factors:
    """PEFT divides by the rank that is left, plus 1e-5."""
    scale = alpha / (p["lora_A"].shape[0] + 1e-5)
    return p["lora_B"] * scale, p["lora_A"] * p["lora_E"]


def _less_start(p: Tensors, start: Factors, config: Mapping[str, Any], name: str) -> Factors:
    """Training took the adapter's start out of the base. On the base as it was, the change is the
    adapter less its start.
    """
    rank = p["lora_A"].shape[0]
    alpha = _alpha(config, name, "lora_alpha")
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    b = torch.cat([p["lora_B"] * scale, -start[0] * scale], dim=1)
    return b, torch.cat([p["lora_A"], start[1]])


def _start_of(
    start: str, base: Path | None, initial: Path | None, config: Mapping[str, Any]
) -> Callable[[str, Tensors], Factors]:
    """How the adapter began, in its own scale."""
    if initial is not None:
        began = _by_module(_weights(initial))

        def saved(name: str, parts: Tensors) -> Factors:
            if name not in began:
                raise ConfigError(f"{initial} has no {name}.")
            return began[name]["lora_B"], began[name]["lora_A"]

        return saved
    if RANDOM_START.match(start):
        raise ConfigError(
            f"init_lora_weights {start!r} began at random: give --initial FOLDER, the adapter as "
            "its training began."
        )
    if base is None:
        raise ConfigError(
            f"init_lora_weights {start!r} took the adapter's start out of the base: give --base "
            "FOLDER (the base model), or --initial FOLDER (the adapter as its training began)."
        )
    weights = _BaseWeights(base)

    def computed(name: str, parts: Tensors) -> Factors:
        rank = parts["lora_A"].shape[0]
        alpha = _alpha(config, name, "lora_alpha")
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        weight = weights.of(name)
        if start.startswith("olora"):
            q, r = torch.linalg.qr(weight)
            return q[:, :rank], r[:rank]
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        return u[:, :rank] * (s[:rank] / scale), v[:rank]

    return computed


class _BaseWeights:
    """The weights of a base model, one by one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        index = folder / "model.safetensors.index.json"
        try:
            self._files: Mapping[str, str] | None = (
                json.loads(index.read_text())["weight_map"] if index.exists() else None
            )
        except (OSError, ValueError, KeyError) as exc:
            raise ConfigError(f"--base: cannot read {index}: {exc}") from exc

    def of(self, module: str) -> torch.Tensor:
        name = module.removeprefix(PREFIX) + ".weight"
        file = "model.safetensors" if self._files is None else self._files.get(name, "")
        try:
            with safe_open(self._folder / file, "pt") as weights:
                return weights.get_tensor(name).float()
        except (OSError, SafetensorError) as exc:
            raise ConfigError(f"--base: {self._folder} has no {name} ({exc}).") from exc


# ---- config and output ---------------------------------------------------------------------------


def _alpha(config: Mapping[str, Any], module: str, key: str = "alpha") -> float:
    return float(_patterned(config.get("alpha_pattern"), module, config[key]))


def _rank(config: Mapping[str, Any], module: str) -> int:
    return int(_patterned(config.get("rank_pattern"), module, config["r"]))


def _patterned(patterns: Any, module: str, default: Any) -> Any:
    pairs = [(re.compile(whole_pattern(p)), value) for p, value in (patterns or {}).items()]
    found = ModulePatterns(tuple(pairs)).value(module.removeprefix(PREFIX))
    return default if found is None else found


def _within(factors: Factors, max_rank: int) -> tuple[Factors, float]:
    """The factors with the least rank that loses nothing, or else `max_rank`. And what is lost."""
    b, a = factors
    qb, rb = torch.linalg.qr(b.double())
    qa, ra = torch.linalg.qr(a.double().T)
    u, s, v = torch.linalg.svd(rb @ ra.T, full_matrices=False)
    total = float(s.norm())
    rank = max(1, min(max_rank, int((s > NO_CHANGE * s.max()).sum()))) if total else 1
    root = s[:rank].sqrt()
    lost = float(s[rank:].norm()) / total if total else 0.0
    return ((qb @ (u[:, :rank] * root)).float(), ((qa @ (v[:rank].T * root)).T).float()), lost


def _write(out: Path, config: Mapping[str, Any], modules: Mapping[str, Factors], rank: int) -> None:
    """All modules get the same rank; what is missing is zero."""
    tensors = {}
    for name, (b, a) in modules.items():
        missing = rank - a.shape[0]
        padded = torch.nn.functional.pad
        tensors[f"{name}.lora_A.weight"] = padded(a, (0, 0, 0, missing)).contiguous()
        tensors[f"{name}.lora_B.weight"] = padded(b, (0, missing)).contiguous()
    plain = {
        "peft_type": "LORA",
        "task_type": config.get("task_type"),
        "base_model_name_or_path": config.get("base_model_name_or_path"),
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({name.rpartition(".")[2] for name in modules}),
        "bias": "none",
        "fan_in_fan_out": bool(config.get("fan_in_fan_out")),
    }
    try:
        out.mkdir(parents=True, exist_ok=False)
        save_file(tensors, out / WEIGHTS_FILE, metadata={"format": "pt"})
        (out / CONFIG_FILE).write_text(json.dumps(plain, indent=1))
    except OSError as exc:
        raise ConfigError(f"cannot write {out}: {exc.strerror}") from exc
