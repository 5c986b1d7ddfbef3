"""Shell. Linear layers with adapters on GPUs, in place of vLLM 0.32's.

A layer takes one launch: token_kernel.py in steps of few tokens, else tile_kernel.py. A layer for
which no adapter of the step has weights is left out (presence.py): by the kernel itself in a CUDA
graph, by the host elsewhere. What the kernels need to know of a step is made on the host
(step_metadata.py).

The head is no part of vLLM's graphs. vLLM computes an adapter's part of all logits in each step,
and compiles a kernel anew for some numbers of rows, while streams wait. Few adapters have a head.

Steps that must not depend on their batch (VLLM_BATCH_INVARIANT) are vLLM's own. So are those of an
engine that computes two parts of a batch at once: they would share one scratch.
"""

from __future__ import annotations

from typing import Any

import torch

from worker.engine.vllm.lora.presence import Presence
from worker.engine.vllm.lora.step_block import StepBlock
from worker.engine.vllm.lora.step_metadata import SMALL_ROWS, rows_of_a_tile

TYPES = (torch.float16, torch.bfloat16)


class _Layers:
    """What the layers of this process share. There is one engine per process."""

    presence: Presence | None = None
    token_scratch: Any = None
    tile_scratch: Any = None


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
    update, logits = PunicaWrapperGPU.update_metadata, PunicaWrapperGPU.add_lora_logits

    def create_lora_modules(manager: Any) -> None:
        create(manager)
        config = get_current_vllm_config_or_none()
        if config is not None and config.parallel_config.use_ubatching:
            PunicaWrapperGPU.add_lora_linear, PunicaWrapperGPU.update_metadata = linear, update
            PunicaWrapperGPU.add_lora_logits = logits
            return
        layers = linear_layers(manager)
        _Layers.presence = presence = Presence(layers + heads(manager), manager.lora_slots)
        for wrapper in manager.punica_wrapper_mapping.values():
            wrapper.step = StepBlock(wrapper, manager.lora_slots)
            wrapper.wanted = torch.ones(len(presence), dtype=torch.bool)
        if layers:
            _make_scratch(layers, manager)

    def update_metadata(
        self: Any, mapping: Any, index_to_id: Any, max_loras: int, vocab_size: int, **more: Any
    ) -> None:
        self.is_prefill = mapping.is_prefill
        used = self.step.update(mapping, index_to_id, max_loras, vocab_size)
        if _Layers.presence is not None:
            self.wanted.copy_(_Layers.presence.wanted(used))

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
        if (
            scale != 1.0
            or not more.get("add_inputs", True)
            or y.dtype not in TYPES
            or not x.dtype == y.dtype == lora_a_stacked[0].dtype
        ):
            linear(self, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, **more)
            return
        torch.ops.vllm.loraplex_lora_linear(
            y,
            x,
            list(lora_a_stacked),
            list(lora_b_stacked),
            self.token_mapping_meta.token_lora_mapping,
            self.step.tiles,
            self.token_mapping_meta.no_lora_flag_cpu,
            self.wanted,
        )

    def add_lora_logits(
        self: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        **more: Any,
    ) -> None:
        assert _Layers.presence is not None
        row = _Layers.presence.row(lora_a_stacked)
        if torch.cuda.is_current_stream_capturing() or self.wanted[row]:
            logits(self, y, x, lora_a_stacked, lora_b_stacked, scale, **more)

    LoRAModelManager._create_lora_modules = create_lora_modules
    PunicaWrapperGPU.update_metadata = update_metadata
    PunicaWrapperGPU.add_lora_linear = add_lora_linear
    PunicaWrapperGPU.add_lora_logits = add_lora_logits
    PunicaWrapperGPU.loraplex = True


def linear_layers(manager: Any) -> list[tuple[Any, Any]]:
    """The A and the B of each linear layer that can have adapters."""
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

    return [
        (module.lora_a_stacked, module.lora_b_stacked)
        for module in manager.modules.values()
        if isinstance(module, BaseLinearLayerWithLoRA)
    ]


def heads(manager: Any) -> list[tuple[Any, Any]]:
    """The A and the B of each head that can have adapters."""
    from vllm.lora.layers.logits_processor import LogitsProcessorWithLoRA

    return [
        ((module.lora_a_stacked,), (module.lora_b_stacked,))
        for module in manager.modules.values()
        if isinstance(module, LogitsProcessorWithLoRA)
    ]


def _make_scratch(layers: list[tuple[Any, Any]], manager: Any) -> None:
    from worker.engine.vllm.lora.tile_kernel import TileScratch
    from worker.engine.vllm.lora.token_kernel import TokenScratch

    tokens = max(len(w._token_lora_indices) for w in manager.punica_wrapper_mapping.values())
    rank = max(a[0].shape[-2] for a, _ in layers)
    slices, device = max(len(a) for a, _ in layers), layers[0][0][0].device
    _Layers.token_scratch = TokenScratch.make(slices, rank, device)
    _Layers.tile_scratch = TileScratch.make(tokens, manager.lora_slots, slices, rank, device)


def _lora_linear(
    y: torch.Tensor,
    x: torch.Tensor,
    a: list[torch.Tensor],
    b: list[torch.Tensor],
    slot_of: torch.Tensor,
    tiles: list[torch.Tensor],
    no_lora_flag_cpu: torch.Tensor,
    wanted: torch.Tensor,
) -> None:
    """y += x A' B' with each token's own A and B; see token_kernel.py. An operator, so that
    torch.compile leaves its inside alone.
    """
    tokens = x.size(0)
    if tokens == 0 or no_lora_flag_cpu.item():
        return
    assert _Layers.presence is not None
    row = _Layers.presence.row(a[0])
    if not torch.cuda.is_current_stream_capturing() and not wanted[row]:
        return
    from worker.engine.vllm.lora import tile_kernel, token_kernel

    x = x if x.stride(1) == 1 else x.contiguous()
    present = _Layers.presence.on_device[row]
    if tokens <= token_kernel.FEW_TOKENS:
        token_kernel.add_lora(y, x, tuple(a), tuple(b), slot_of, present, _Layers.token_scratch)
        return
    tiles = tiles[:2] if rows_of_a_tile(tokens) == SMALL_ROWS else tiles[2:]
    tile_kernel.add_lora(y, x, tuple(a), tuple(b), tiles, present, _Layers.tile_scratch)
