"""Pure. What adapters may change in a base model: the names, shapes and kinds of its layers.

A worker reads them from its running engine (worker/engine/vllm/lora/layers.py). A check outside of
a worker builds the engine's own model class without weights, which takes seconds. For the usual
architectures `shapes_from_config` computes the same from `config.json` alone, and a test compares
the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

Shape: TypeAlias = tuple[int, int]
"""(outputs, inputs) of a linear layer, as torch stores its weight."""


def _same(module: str) -> str:
    return module


@dataclass(frozen=True, slots=True)
class BaseShapes:
    """What an adapter must fit. All names are the engine's; `rename` turns an adapter's name of a
    module into the engine's.

    `modules`: layer -> shape. Of experts whose weights are one tensor, it is the shape of one
    expert. `refused`: layer -> why no adapter may change it. `experts`: layer -> how many experts
    its tensors hold. `embeddings`: the layers that look tokens up. `ignored`: prefixes of names
    that the model itself leaves out, such as heads for speculation.
    """

    modules: Mapping[str, Shape]
    rename: Callable[[str], str] = _same
    refused: Mapping[str, str] = field(default_factory=dict)
    experts: Mapping[str, int] = field(default_factory=dict)
    embeddings: frozenset[str] = frozenset()
    ignored: tuple[str, ...] = ()

    def ignores(self, module: str) -> bool:
        """Whether the model leaves this module out."""
        return any(module.startswith(i) or f".{i}" in module for i in self.ignored)


def endings(module: str) -> Iterator[str]:
    """The names that PEFT's `target_modules` may call a module by: `a.b.c`, `b.c`, `c`."""
    yield module
    while "." in module:
        module = module.partition(".")[2]
        yield module


def shapes_from_config(config: Mapping[str, Any]) -> BaseShapes | None:
    """The shapes from a parsed `config.json`. None for an architecture that is not known here, or a
    config that leaves out a size whose default only the model's class knows.
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
    if architectures[0] not in _EMBEDDINGS_ADAPTED:
        return BaseShapes(modules)
    words = config.get("vocab_size")
    if type(words) is not int or words < 1:
        return None
    modules |= {_EMBEDDING: (sizes.hidden, words), "lm_head": (words, sizes.hidden)}
    return BaseShapes(modules, embeddings=frozenset({_EMBEDDING}))


_EMBEDDING = "model.embed_tokens"
# Architectures in which vLLM has LoRA layers for the token embedding and the head.
_EMBEDDINGS_ADAPTED = frozenset({"LlamaForCausalLM", "Qwen3ForCausalLM", "Phi3ForCausalLM"})


@dataclass(frozen=True, slots=True)
class _Sizes:
    layers: int
    hidden: int
    inner: int
    queries: int  # number of heads x size of a head
    keys: int


def _sizes(config: Mapping[str, Any]) -> _Sizes | None:
    wanted = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
    layers, hidden, inner, heads = (config.get(k) for k in wanted)
    architecture = config["architectures"][0]
    key_heads = config.get("num_key_value_heads") or (
        heads if architecture in _KEY_HEADS_OPTIONAL else None
    )
    head = None if architecture in _HEAD_DIM_IGNORED else config.get("head_dim")
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
# Architectures whose class in transformers derives the number of key heads from other sizes. In the
# others it is a constant that only the class knows.
_KEY_HEADS_OPTIONAL = frozenset({"LlamaForCausalLM", "Phi3ForCausalLM"})
_HEAD_DIM_IGNORED = frozenset({"Qwen2ForCausalLM"})  # vLLM's class ignores it
_HEAD_DIM_OPTIONAL = frozenset(
    {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Phi3ForCausalLM"}
)
