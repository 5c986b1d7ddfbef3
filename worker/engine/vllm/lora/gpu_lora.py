"""Shell. Linear layers with adapters on GPUs, in place of vLLM 0.32's.

A step of few tokens, as an engine decodes, takes one launch per layer (gpu_kernel.py). Larger steps
take vLLM's two kernels, which nothing here does better. A layer for which no adapter of the step
has weights is left out (presence.py): by the kernel itself in a CUDA graph, by the host elsewhere.

Steps that must not depend on their batch (VLLM_BATCH_INVARIANT) are vLLM's own. So are those of an
engine that computes two parts of a batch at once: they would share one scratch.
"""

from __future__ import annotations

from typing import Any

import torch

from worker.engine.vllm.lora.presence import Presence

MAX_TOKENS = 512
"""Tokens of the largest step that takes one launch: the largest of vLLM's CUDA graphs. Above, a
launch is a small part of a layer's time.
"""
TYPES = (torch.float16, torch.bfloat16)


class _Layers:
    """What the layers of this process share. There is one engine per process."""

    presence: Presence | None = None
    scratch: Any = None


def presence() -> Presence | None:
    """What this process's engine knows of its slots. None where its layers are vLLM's."""
    return _Layers.presence


def install() -> None:
    """Replaces vLLM's layers in this process. A second call does nothing."""
    from vllm import envs
    from vllm.config import get_current_vllm_config_or_none
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU
    from vllm.utils.torch_utils import direct_register_custom_op

    if getattr(PunicaWrapperGPU, "loraplex", False) or envs.VLLM_BATCH_INVARIANT:
        return
    direct_register_custom_op("loraplex_lora_linear", _lora_linear, mutates_args=["y"])
    create, linear = LoRAModelManager._create_lora_modules, PunicaWrapperGPU.add_lora_linear
    update = PunicaWrapperGPU.update_metadata

    def create_lora_modules(manager: Any) -> None:
        create(manager)
        config = get_current_vllm_config_or_none()
        if config is not None and config.parallel_config.use_ubatching:
            PunicaWrapperGPU.add_lora_linear = linear
            return
        layers = linear_layers(manager)
        _Layers.presence = presence = Presence(layers, manager.lora_slots)
        _Layers.scratch = _scratch(layers, manager.lora_slots)
        for wrapper in manager.punica_wrapper_mapping.values():
            wrapper.wanted = torch.ones(len(presence), dtype=torch.bool)

    def update_metadata(self: Any, mapping: Any, index_to_id: Any, *args: Any, **more: Any) -> None:
        update(self, mapping, index_to_id, *args, **more)
        if _Layers.presence is not None and hasattr(self, "wanted"):
            ids = set(mapping.prompt_mapping)
            slots = [slot for slot, lora in enumerate(index_to_id) if lora in ids and lora]
            self.wanted.copy_(_Layers.presence.wanted(slots))

    def add_lora_linear(
        self: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **more: Any,
    ) -> None:
        if scale != 1.0 or not more.get("add_inputs", True) or y.dtype not in TYPES:
            linear(self, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, **more)
            return
        torch.ops.vllm.loraplex_lora_linear(
            y,
            x,
            list(lora_a_stacked),
            list(lora_b_stacked),
            *self.token_mapping_meta.meta_args(x.size(0), self.lora_config.specialize_active_lora),
            self.wanted,
        )

    LoRAModelManager._create_lora_modules = create_lora_modules
    PunicaWrapperGPU.update_metadata = update_metadata
    PunicaWrapperGPU.add_lora_linear = add_lora_linear
    PunicaWrapperGPU.loraplex = True


def linear_layers(manager: Any) -> list[tuple[Any, Any]]:
    """The A and the B of each linear layer that can have adapters."""
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

    return [
        (module.lora_a_stacked, module.lora_b_stacked)
        for module in manager.modules.values()
        if isinstance(module, BaseLinearLayerWithLoRA)
    ]


def _scratch(layers: list[tuple[Any, Any]], slots: int) -> Any:
    from worker.engine.vllm.lora.gpu_kernel import Scratch

    if not layers:
        return None
    rank = max(a[0].shape[-2] for a, _ in layers)
    slices = max(len(a) for a, _ in layers)
    return Scratch.make(MAX_TOKENS, slots, slices, rank, layers[0][0][0].device)


def _lora_linear(
    y: torch.Tensor,
    x: torch.Tensor,
    a: list[torch.Tensor],
    b: list[torch.Tensor],
    token_lora_mapping: torch.Tensor,
    token_indices_sorted_by_lora_ids: torch.Tensor,
    num_tokens_per_lora: torch.Tensor,
    lora_token_start_loc: torch.Tensor,
    lora_ids: torch.Tensor,
    no_lora_flag_cpu: torch.Tensor,
    num_active_loras: torch.Tensor,
    wanted: torch.Tensor,
) -> None:
    """y += x A' B' with each token's own A and B; see gpu_kernel.add_lora. An operator, so that
    torch.compile leaves its inside alone.
    """
    tokens = x.size(0)
    if tokens == 0 or no_lora_flag_cpu.item():
        return
    assert _Layers.presence is not None
    row = _Layers.presence.row(a[0])
    captured = torch.cuda.is_current_stream_capturing()
    if row is not None and not captured and not wanted[row]:
        return
    if row is not None and tokens <= MAX_TOKENS and x.dtype is a[0].dtype:
        from worker.engine.vllm.lora import gpu_kernel

        gpu_kernel.add_lora(
            y,
            x if x.stride(1) == 1 else x.contiguous(),
            tuple(a),
            tuple(b),
            token_indices_sorted_by_lora_ids,
            num_tokens_per_lora,
            lora_token_start_loc,
            lora_ids,
            _Layers.presence.on_device[row],
            _Layers.scratch,
        )
        return
    from vllm.lora.ops.triton_ops import lora_expand_op, lora_shrink_op

    meta = (
        token_lora_mapping,
        token_indices_sorted_by_lora_ids,
        num_tokens_per_lora,
        lora_token_start_loc,
        lora_ids,
        no_lora_flag_cpu,
        num_active_loras,
    )
    shrunk = torch.empty((len(b), tokens, b[0].size(-1)), dtype=torch.float32, device=x.device)
    lora_shrink_op._lora_shrink(x, a, shrunk, *meta, 1.0)
    lora_expand_op._lora_expand(shrunk, b, y, *meta, offset_start=0, add_inputs=True)
