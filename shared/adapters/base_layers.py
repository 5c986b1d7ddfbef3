"""Pure. The linear layers of a base model that adapters may change, with their shapes, from the
model's `config.json` alone.

Known architectures are computed here, so that checking an adapter needs neither torch nor a GPU;
for any other, or where the config leaves out what its class fills in, `shapes_from_config` answers
None and the caller builds the model without weights instead (worker/validation/base_model.py).
Output heads and embeddings are left out: adapters on them are not served.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

Shape: TypeAlias = tuple[int, int]
"""(outputs, inputs) of a linear layer, as torch stores its weight."""

# Names that tell families apart. Left out are those whose models are also published under another
# family's architecture (phi, yi, deepseek).
_FAMILIES = ("llama", "qwen", "mistral", "mixtral", "gemma", "falcon", "bloom", "pythia")
_NAME_PARTS = 2  # `organisation/model`; further up a path stands for somebody's folders


@dataclass(frozen=True, slots=True)
class BaseShapes:
    """What an adapter must fit. `modules`: full name without `base_model.model.` -> shape.
    `families`: what the base's names say it is.

    `renamed` are (old, new) beginnings of module names: older PEFT versions saved multi-modal
    models under names that have since moved.
    """

    modules: Mapping[str, Shape]
    families: frozenset[str] = frozenset()
    renamed: tuple[tuple[str, str], ...] = ()

    def canonical(self, module: str) -> str:
        for old, new in self.renamed:
            if module.startswith(old):
                return new + module[len(old) :]
        return module


def endings(module: str) -> Iterator[str]:
    """The names that PEFT's `target_modules` may call a module by: `a.b.c`, `b.c`, `c`."""
    yield module
    while "." in module:
        module = module.partition(".")[2]
        yield module


def families_in(name: str) -> frozenset[str]:
    """The model families that a model's name or the end of its path speaks of; empty where it
    cannot be told.
    """
    tail = "/".join(re.split(r"[/\\]+", name.rstrip("/\\"))[-_NAME_PARTS:]).lower()
    return frozenset(f for f in _FAMILIES if f in tail)


def families_of(config: Mapping[str, Any], source: str) -> frozenset[str]:
    """Of a base model: what its config and its own name say."""
    architectures = config.get("architectures") or ()
    names = [str(config.get("model_type", "")), *(str(a) for a in architectures), source]
    return frozenset().union(*(families_in(n) for n in names))


def shapes_from_config(config: Mapping[str, Any], source: str) -> BaseShapes | None:
    """From a parsed `config.json`; None for an architecture that is not known here or a config that
    leaves needed sizes out.
    """
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1:
        return None
    layer = _LAYERS.get(str(architectures[0]))
    sizes = _sizes(config) if layer is not None else None
    if layer is None or sizes is None:
        return None
    modules = {
        f"model.layers.{i}.{name}": shape
        for i in range(sizes.layers)
        for name, shape in layer(sizes)
    }
    return BaseShapes(modules, families_of(config, source))


@dataclass(frozen=True, slots=True)
class _Sizes:
    layers: int
    hidden: int
    inner: int
    queries: int  # heads x head size
    keys: int


def _sizes(config: Mapping[str, Any]) -> _Sizes | None:
    wanted = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
    layers, hidden, inner, heads = (config.get(k) for k in wanted)
    architecture = config["architectures"][0]
    key_heads = config.get("num_key_value_heads") or (
        heads if architecture in _KEY_HEADS_OPTIONAL else None
    )
    head = config.get("head_dim")
    if (
        head is None
        and isinstance(hidden, int)
        and isinstance(heads, int)
        and heads
        and architecture in _HEAD_DIM_OPTIONAL
    ):
        head = hidden // heads
    given = (layers, hidden, inner, heads, key_heads, head)
    numbers = [n for n in given if type(n) is int and n > 0]
    if len(numbers) < len(given):
        return None
    layers, hidden, inner, heads, key_heads, head = numbers
    return _Sizes(layers, hidden, inner, heads * head, key_heads * head)


def _separate(s: _Sizes) -> Iterator[tuple[str, Shape]]:
    yield "self_attn.q_proj", (s.queries, s.hidden)
    yield "self_attn.k_proj", (s.keys, s.hidden)
    yield "self_attn.v_proj", (s.keys, s.hidden)
    yield "self_attn.o_proj", (s.hidden, s.queries)
    yield "mlp.gate_proj", (s.inner, s.hidden)
    yield "mlp.up_proj", (s.inner, s.hidden)
    yield "mlp.down_proj", (s.hidden, s.inner)


def _fused(s: _Sizes) -> Iterator[tuple[str, Shape]]:
    yield "self_attn.qkv_proj", (s.queries + 2 * s.keys, s.hidden)
    yield "self_attn.o_proj", (s.hidden, s.queries)
    yield "mlp.gate_up_proj", (2 * s.inner, s.hidden)
    yield "mlp.down_proj", (s.hidden, s.inner)


_LAYERS = {
    "LlamaForCausalLM": _separate,
    "MistralForCausalLM": _separate,
    "Qwen2ForCausalLM": _separate,
    "Qwen3ForCausalLM": _separate,
    "GemmaForCausalLM": _separate,
    "Gemma2ForCausalLM": _separate,
    "Gemma3ForCausalLM": _separate,
    "Phi3ForCausalLM": _fused,
}
# Where the class in transformers derives the size from the others; elsewhere it has a constant of
# its own, which only the class knows.
_KEY_HEADS_OPTIONAL = frozenset({"LlamaForCausalLM", "Phi3ForCausalLM"})
_HEAD_DIM_OPTIONAL = frozenset(
    {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Phi3ForCausalLM"}
)
