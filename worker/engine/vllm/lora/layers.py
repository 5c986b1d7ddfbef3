"""Shell. What adapters may change in a model as vLLM has built it: the names, shapes and kinds of
its LoRA layers, read from vLLM's own objects.

vLLM applies an adapter's tensors by name and leaves out any that it has no layer for, without a
word. So the checks take the names from here: from the running engine (`registered`), or from the
same class built without weights (worker/engine/vllm/lora/offline.py). A few layers are registered
and yet not served right; they are refused with the reason.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shared.adapters.base_layers import BaseShapes, Shape

MLA_COPY = (
    "vLLM's attention (MLA) works with its own copies of this layer's weight, which adapters do "
    "not reach."
)
ROWS_MOVED = (
    "vLLM keeps the rows of this layer in another order than the checkpoint, and adapters in the "
    "checkpoint's."
)
MLA_UNPROVEN = (
    "It is not shown that vLLM's attention (MLA) serves adapters of this layer right; those of "
    "q_proj, q_a_proj, q_b_proj, kv_a_proj_with_mqa and o_proj are."
)
OWN_SHARDS = (
    "vLLM divides this layer's rows between the GPUs in its own way, and adapters in order; it is "
    "served with `tensor_parallel_size: 1`."
)
NO_FUSED_EXPERTS = (
    "Its experts are one tensor (target_parameters), which this engine serves only with "
    "`enable_mixed_moe_lora_format: true` in engine_kwargs."
)
# Model classes of vLLM whose loader changes the order of rows (vllm/model_executor/models).
ROWS_MOVED_BY = {"K2HorizonForCausalLM": ("q_proj", "k_proj")}
# Layers of MLA attention of which vLLM's answers with an adapter are, to the digit, its answers
# with the adapter merged into the weights (DeepSeek-V2 and V3; tests/engine/oracle).
MLA_PROVEN = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")


MAMBA_LOADER = "mamba_v2_sharded_weight_loader"  # of vllm/.../mamba/mamba_mixer2.py


@dataclass
class LayerTable:
    """What `BaseShapes` says of a model, in a form that goes from one process to another."""

    modules: dict[str, Shape] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    experts: dict[str, int] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)
    ignored: tuple[str, ...] = ()
    mapper: Any = None  # vLLM's WeightsMapper

    def join(self, other: LayerTable) -> None:
        """With what another rank has: pipeline stages have different layers."""
        self.modules |= other.modules
        self.refused |= other.refused
        self.experts |= other.experts
        self.embeddings |= other.embeddings

    def shapes(self) -> BaseShapes:
        return BaseShapes(
            self.modules,
            renaming(self.mapper),
            self.refused,
            self.experts,
            frozenset(self.embeddings),
            self.ignored,
        )


def names_mapper(model: Any, layers: Collection[str]) -> Any:
    """vLLM's WeightsMapper for the names in adapters of this model, or None.

    transformers 5 calls `mlp` what checkpoints of Mixtral and its like call `block_sparse_moe`, and
    so do adapters trained with it; vLLM's own mapper does not know that yet.
    """
    from vllm.model_executor.models.utils import WeightsMapper

    mapper = getattr(model, "hf_to_vllm_mapper", None)
    mapper = None if mapper is None else mapper.get_rename_mapper()
    old, new = ".block_sparse_moe.", ".mlp."
    if any(old in name for name in layers) and not any(new in name for name in layers):
        mapper = WeightsMapper(orig_to_new_substr={new: old}) | (mapper or WeightsMapper())
    return mapper


def renaming(mapper: Any) -> Callable[[str], str]:
    """An adapter's name of a module -> vLLM's, as vLLM does it when it reads the adapter."""
    from vllm.lora.utils import parse_fine_tuned_lora_name

    def rename(module: str) -> str:
        name: str = parse_fine_tuned_lora_name(f"base_model.model.{module}.lora_A.weight", mapper)[
            0
        ]
        return name

    return rename


def pack(table: LayerTable) -> bytes:
    return pickle.dumps(table)


def join(parts: Sequence[bytes]) -> LayerTable:
    """Of all ranks: processes that this one has started."""
    tables: list[LayerTable] = [pickle.loads(part) for part in parts]
    for other in tables[1:]:
        tables[0].join(other)
    return tables[0]


def of_manager(manager: Any) -> LayerTable:
    """Of a running engine: `manager` is vLLM's LoRAModelManager of one rank."""
    layers = {name: module.base_layer for name, module in manager.modules.items()}
    return table(
        manager.model,
        layers,
        manager.packed_modules_mapping,
        fused_experts=manager._is_3d_moe_model or manager._enable_mixed_moe_lora_format,
        split_experts=not manager._is_3d_moe_model,
    )


def table(
    model: Any,
    layers: Mapping[str, Any],
    packed: Mapping[str, Sequence[str]],
    *,
    fused_experts: bool,
    split_experts: bool,
) -> LayerTable:
    """`layers`: name -> the layer below vLLM's LoRA layer. `packed`: last part of a name -> the
    parts that checkpoints have instead. Experts come in one tensor (`fused`) or one by one.
    """
    from vllm.model_executor.layers.fused_moe import MoERunner
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.logits_processor import LogitsProcessor
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        ParallelLMHead,
        VocabParallelEmbedding,
    )

    found = LayerTable(
        ignored=tuple(getattr(model, "lora_skip_prefixes", None) or ()),
        mapper=names_mapper(model, layers),
    )
    for name, layer in layers.items():
        if isinstance(layer, MoERunner):
            if split_experts:
                found.modules |= dict(_split_experts(name, layer, model))
            _add_fused_experts(found, name, layer, fused_experts)
        elif isinstance(layer, LinearBase):
            found.modules |= dict(_linear(name, layer, packed.get(name.rpartition(".")[2], ())))
        elif isinstance(layer, ParallelLMHead):
            found.modules[name] = (layer.org_vocab_size, layer.embedding_dim)
        elif isinstance(layer, VocabParallelEmbedding):
            found.modules[name] = (layer.embedding_dim, layer.org_vocab_size)
            found.embeddings.add(name)
        elif isinstance(layer, LogitsProcessor):
            hidden = _hidden_size(model, name)
            found.modules[name] = (layer.org_vocab_size, hidden)
    found.refused |= dict(_not_served(model, found.modules))
    found.refused |= dict(_own_shards(layers, packed, found.modules))
    return found


def _linear(name: str, layer: Any, parts: Sequence[str]) -> Iterator[tuple[str, Shape]]:
    sizes = _output_sizes(layer)
    if len(parts) < 2:  # as the checkpoint has it
        yield name, (sum(sizes), layer.input_size)
        return
    # where vLLM packs more slices than there are names, the first name has the rest of them
    first = len(sizes) - len(parts) + 1
    parent = name.rpartition(".")[0]
    for part, size in zip(parts, (sum(sizes[:first]), *sizes[first:]), strict=True):
        yield (f"{parent}.{part}" if parent else part), (size, layer.input_size)


def _output_sizes(layer: Any) -> list[int]:
    """Of all ranks together, as the checkpoint has them."""
    from vllm.model_executor.layers.linear import QKVParallelLinear

    if isinstance(layer, QKVParallelLinear):
        keys = layer.total_num_kv_heads  # each rank may have a copy of one
        queries = layer.total_num_heads * layer.head_size
        return [queries, keys * layer.head_size, keys * layer.v_head_size]
    return list(getattr(layer, "output_sizes", None) or [layer.output_size])


def _split_experts(name: str, layer: Any, model: Any) -> Iterator[tuple[str, Shape]]:
    from vllm.model_executor.utils import get_moe_expert_mapping

    hidden, inner = layer.moe_config.hidden_dim, layer.moe_config.intermediate_size
    parent = name.rpartition(".")[0]
    for _, weight, _, shard in get_moe_expert_mapping(model):
        shape = (hidden, inner) if shard == "w2" else (inner, hidden)
        yield f"{parent}.{weight.rstrip('.').replace('.base_layer', '')}", shape


def _add_fused_experts(found: LayerTable, name: str, layer: Any, served: bool) -> None:
    """PEFT's `target_parameters`: the outer tensors are of down_proj, the inner ones of
    gate_up_proj.
    """
    config = layer.moe_config
    gate_up = (1 + bool(config.is_act_and_mul)) * config.intermediate_size
    for layer_name, shape in (
        (name, (config.hidden_dim, config.intermediate_size)),
        (f"{name}.base_layer", (gate_up, config.hidden_dim)),
    ):
        found.modules[layer_name] = shape
        found.experts[layer_name] = config.num_experts
        if not served:
            found.refused[layer_name] = NO_FUSED_EXPERTS


def _hidden_size(model: Any, name: str) -> int:
    """The inputs of the head, which vLLM adapts in the logits processor's place."""
    head = model.get_submodule(name)
    size: int = getattr(head, "hidden_size", None) or head.embedding_dim
    return size


def _not_served(model: Any, names: Collection[str]) -> Iterator[tuple[str, str]]:
    from vllm.model_executor.layers.attention.mla_attention import MLAAttention

    copied = {
        id(getattr(m.kv_b_proj, "base_layer", m.kv_b_proj))
        for m in model.modules()
        if isinstance(m, MLAAttention)
    }
    for name, module in model.named_modules(remove_duplicate=False):
        if id(getattr(module, "base_layer", module)) in copied:
            yield from refused_by_mla(name, names)
        yield from refused_by_order(name, type(module).__name__, names)


def refused_by_mla(copied: str, names: Collection[str]) -> Iterator[tuple[str, str]]:
    """`copied`: the layer that the attention has copies of; those beside it are of the same
    attention.
    """
    attention = copied.rpartition(".")[0] + "."
    for name in names:
        if name == copied:
            yield name, MLA_COPY
        elif name.startswith(attention) and name.removeprefix(attention) not in MLA_PROVEN:
            yield name, MLA_UNPROVEN


def refused_by_order(
    module: str, class_name: str, names: Collection[str]
) -> Iterator[tuple[str, str]]:
    begin = f"{module}." if module else ""
    moved = ROWS_MOVED_BY.get(class_name, ())
    for name in names if moved else ():
        if name.startswith(begin) and name.rpartition(".")[2] in moved:
            yield name, ROWS_MOVED


def _own_shards(
    layers: Mapping[str, Any], packed: Mapping[str, Sequence[str]], names: Collection[str]
) -> Iterator[tuple[str, str]]:
    """Mamba's `in_proj`: each GPU has rows of all its parts."""
    for name, layer in layers.items():
        loader = getattr(getattr(layer, "weight", None), "weight_loader", None)
        own = getattr(loader, "__qualname__", "").startswith(MAMBA_LOADER)
        if own and layer.tp_size > 1:
            parent, _, last = name.rpartition(".")
            for part in packed.get(last) or (last,):
                if (whole := f"{parent}.{part}" if parent else part) in names:
                    yield whole, OWN_SHARDS


class RowOrder:
    """Adapters get the order of rows that vLLM has given the base: in Llama 4 it reorders the query
    and key rows of each head for its rotary embedding
    (Llama4ForCausalLM.permute_qk_weight_for_rotary).
    """

    def __init__(self, model: Any) -> None:
        self._parts = [
            (
                f"{name}." if name else "",
                {
                    "q_proj": module.config.num_attention_heads,
                    "k_proj": module.config.num_key_value_heads,
                },
            )
            for name, module in model.named_modules()
            if hasattr(module, "permute_qk_weight_for_rotary")
        ]

    def apply(self, lora: Any) -> None:
        """To a LoRAModel as read from its file."""
        for begin, heads in self._parts:
            for name, weights in lora.loras.items():
                count = heads.get(name.rpartition(".")[2])
                if count and name.startswith(begin):
                    b = weights.lora_b
                    weights.lora_b = (
                        b.view(count, b.size(0) // count // 2, 2, b.size(1))
                        .transpose(1, 2)
                        .reshape(b.shape)
                    )


def unapplied(manager: Any, lora: Any) -> list[str]:
    """The layers of a LoRAModel, as read from its file, that no module of this rank takes. Empty
    for a pipeline's stage, which has a part of the layers only.
    """
    from vllm.distributed import get_pp_group
    from vllm.lora.layers import FusedMoEWithLoRA

    if get_pp_group().world_size > 1:
        return []
    taken = set(manager.modules) | {n for names in manager.packed_modules.values() for n in names}
    taken |= {
        f"{name}.base_layer"
        for name, module in manager.modules.items()
        if isinstance(module, FusedMoEWithLoRA)
    }
    return [name for name in lora.loras if name not in taken]
