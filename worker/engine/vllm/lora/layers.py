"""Shell. What adapters may change in a model, as vLLM has built it: the names, shapes and kinds of
its LoRA layers, read from vLLM's own objects.

vLLM applies an adapter's tensors by name. It silently leaves out any tensor that it has no layer
for. So the checks take the names from here. They come from the running engine (`of_manager`), or
from the same class built without weights (worker/engine/vllm/lora/offline_layers.py). A few layers
are registered and yet are not served right. Adapters for them are refused with the reason.
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
NO_EXPERT_KERNELS = "The engine of a CPU takes no adapters of quantized experts."
NO_FUSED_EXPERTS = (
    "Its experts are one tensor (target_parameters), which this engine serves only with "
    "`enable_mixed_moe_lora_format: true` in engine_kwargs."
)
# Model classes of vLLM whose loader changes the order of rows (vllm/model_executor/models).
ROWS_MOVED_BY = {"K2HorizonForCausalLM": ("q_proj", "k_proj")}
# Layers of MLA attention that vLLM serves right with an adapter. Its answers equal, to the digit,
# those with the adapter merged into the weights (DeepSeek-V2 and V3; tests/engine/oracle).
MLA_PROVEN = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")


NEWER_NAMES = (
    (".block_sparse_moe.", ".mlp."),  # the Mixtral family
    (".block_sparse_moe.gate", ".block_sparse_moe.router"),  # Granite MoE
    (".block_sparse_moe.gate", ".block_sparse_moe.router.layer"),  # the same, transformers 4
    ("vision_tower.vision_model.encoder.", "vision_tower.encoder."),  # towers of CLIP and SigLIP
)
"""Part of a name in vLLM -> what transformers says. A longer name comes behind its beginning."""
CUT_ENCODERS = ("CLIPEncoder", "SiglipEncoder")
"""Classes of vLLM that are built with fewer layers than their config says."""
MAMBA_LOADER = "mamba_v2_sharded_weight_loader"  # of vllm/.../mamba/mamba_mixer2.py


@dataclass
class LayerTable:
    """The contents of `BaseShapes` for one model, in a form that can be sent between processes."""

    modules: dict[str, Shape] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    experts: dict[str, int] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)
    ignored: tuple[str, ...] = ()
    mapper: Any = None  # vLLM's WeightsMapper

    def join(self, other: LayerTable) -> None:
        """Adds what another rank has. Pipeline stages have different layers."""
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

    Adapters use the names of transformers, which may be others than those of checkpoints. vLLM's
    own mapper knows some of them.
    """
    from vllm.model_executor.models.utils import WeightsMapper

    mapper = getattr(model, "hf_to_vllm_mapper", None)
    mapper = None if mapper is None else mapper.get_rename_mapper()
    for old, new in NEWER_NAMES:
        if any(old in name for name in layers) and not any(new in name for name in layers):
            mapper = WeightsMapper(orig_to_new_substr={new: old}) | (mapper or WeightsMapper())
    return mapper


def skipped_prefixes(model: Any) -> list[str]:
    """The beginnings of names in adapters that the model leaves out: its own, and the layers behind
    the one from which a vision tower's features are taken. Transformers computes these, and throws
    the result away. So adapters of the whole tower have weights for them, which change nothing.
    """
    found = list(getattr(model, "lora_skip_prefixes", None) or ())
    for name, module in model.named_modules():
        if type(module).__name__ in CUT_ENCODERS:
            for i in range(len(module.layers), module.config.num_hidden_layers):
                layer = f"{name}.layers.{i}."
                found += [layer, *(layer.replace(*names) for names in NEWER_NAMES)]
    return list(dict.fromkeys(found))


def renaming(mapper: Any) -> Callable[[str], str]:
    """A function from an adapter's name of a module to vLLM's name, as vLLM maps it when it reads
    the adapter.
    """
    from vllm.lora.utils import parse_fine_tuned_lora_name

    def rename(module: str) -> str:
        name: str = parse_fine_tuned_lora_name(f"base_model.model.{module}.lora_A.weight", mapper)[
            0
        ]
        return name

    return rename


def pack(table: LayerTable) -> bytes:
    """The table as bytes, for another process."""
    return pickle.dumps(table)


def join(parts: Sequence[bytes]) -> LayerTable:
    """The table of all ranks, from the bytes of each. They are pickles of processes that this one
    started.
    """
    tables: list[LayerTable] = [pickle.loads(part) for part in parts]
    for other in tables[1:]:
        tables[0].join(other)
    return tables[0]


def of_manager(manager: Any) -> LayerTable:
    """The table of a running engine. `manager` is vLLM's LoRAModelManager of one rank."""
    layers = {name: module.base_layer for name, module in manager.modules.items()}
    closed = _closed_experts(manager.model)
    return table(
        manager.model,
        layers | closed,
        manager.packed_modules_mapping,
        fused_experts=manager._is_3d_moe_model or manager._enable_mixed_moe_lora_format,
        split_experts=not manager._is_3d_moe_model,
        closed_experts=closed,
    )


def _closed_experts(model: Any) -> dict[str, Any]:
    """name -> the experts that take no adapters on this engine (see cpu_experts.py)."""
    from vllm.model_executor.layers.fused_moe import MoERunner
    from vllm.platforms import current_platform

    from worker.engine.vllm.lora import cpu_experts

    if not current_platform.is_cpu():
        return {}
    found = {n: m for n, m in model.named_modules() if isinstance(m, MoERunner)}
    return {n: m for n, m in found.items() if not cpu_experts.takes_adapters(m)}


def table(
    model: Any,
    layers: Mapping[str, Any],
    packed: Mapping[str, Sequence[str]],
    *,
    fused_experts: bool,
    split_experts: bool,
    closed_experts: Collection[str] = (),
) -> LayerTable:
    """The table of a model.

    `layers`: name -> the layer below vLLM's LoRA layer. `packed`: the last part of a name -> the
    parts that checkpoints have in its place. `fused_experts` and `split_experts`: whether adapters
    may have experts in one tensor, or one by one. `closed_experts`: names of those that take no
    adapters.
    """
    from vllm.model_executor.layers.fused_moe import MoERunner
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.logits_processor import LogitsProcessor
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        ParallelLMHead,
        VocabParallelEmbedding,
    )

    found = LayerTable(
        ignored=tuple(skipped_prefixes(model)),
        mapper=names_mapper(model, layers),
    )
    for name, layer in layers.items():
        if isinstance(layer, MoERunner):
            if split_experts:
                found.modules |= dict(_split_experts(name, layer, model))
            _add_fused_experts(found, name, layer, fused_experts)
            if name in closed_experts:
                inside = (n for n in found.modules if n == name or n.startswith(f"{name}."))
                found.refused |= dict.fromkeys(inside, NO_EXPERT_KERNELS)
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
    if len(parts) < 2:  # the checkpoint has it as one layer, too
        yield name, (sum(sizes), layer.input_size)
        return
    # Where vLLM packs more slices than there are names, the first name has the remaining ones.
    first = len(sizes) - len(parts) + 1
    parent = name.rpartition(".")[0]
    for part, size in zip(parts, (sum(sizes[:first]), *sizes[first:]), strict=True):
        yield (f"{parent}.{part}" if parent else part), (size, layer.input_size)


def _output_sizes(layer: Any) -> list[int]:
    """The sizes of all ranks together, as in the checkpoint."""
    from vllm.model_executor.layers.linear import QKVParallelLinear

    if isinstance(layer, QKVParallelLinear):
        keys = layer.total_num_kv_heads  # ranks may have copies of the same key heads
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
    """PEFT's `target_parameters`: the outer tensors belong to down_proj, the inner ones to
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
    """The inputs of the head. vLLM adapts the head in the logits processor."""
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
    """`copied` is the layer that the attention has copies of. The layers beside it belong to the
    same attention.
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
    """Mamba's `in_proj`, of which each GPU has rows of all parts."""
    for name, layer in layers.items():
        loader = getattr(getattr(layer, "weight", None), "weight_loader", None)
        own = getattr(loader, "__qualname__", "").startswith(MAMBA_LOADER)
        if own and layer.tp_size > 1:
            parent, _, last = name.rpartition(".")
            for part in packed.get(last) or (last,):
                if (whole := f"{parent}.{part}" if parent else part) in names:
                    yield whole, OWN_SHARDS


class RowOrder:
    """Brings the rows of an adapter into the order that vLLM has given to the base's rows. In Llama
    4, vLLM reorders the query and key rows of each head for its rotary embedding
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
        """Reorders a LoRAModel as it was read from its file."""
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
    """The layers of a LoRAModel, as read from its file, that no module of this rank takes. Always
    empty for a pipeline stage, which has only a part of the layers.
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
