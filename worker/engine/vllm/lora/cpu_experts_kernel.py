"""Shell. The arithmetic of experts that take adapters, on CPUs. Each expert multiplies the rows
that the router gave it, and the rows of one adapter are computed together (see cpu_lora.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.activation import SwigluOAIAndMul
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.experts.lora_experts_mixin import LoRAExpertsMixin

from worker.engine.vllm.lora.cpu_lora import Rows, add_by_slot


class CpuExpertsWithLora(LoRAExpertsMixin, CPUUnquantizedExperts):  # type: ignore[misc]
    """Unquantized experts with adapters. The weights stay as the checkpoint has them:
    w1 [experts, gate and up, hidden], w2 [experts, hidden, inner].
    """

    @staticmethod
    def is_supported_config(cls: Any, moe_config: Any, *others: Any) -> tuple[bool, str | None]:
        if get_current_vllm_config().lora_config is None:
            return False, "there are no adapters"
        supported: tuple[bool, str | None] = mk.FusedMoEExperts.is_supported_config(
            cls, moe_config, *others
        )
        return supported

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self._use_zentorch = False

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: Any,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        workspace13: torch.Tensor,
        workspace2: torch.Tensor,
        expert_tokens_meta: Any,
        apply_router_weight_on_input: bool,
    ) -> None:
        """Writes the experts' weighted sum to output [tokens, hidden]."""
        output.zero_()
        interleaved = activation is MoEActivation.SWIGLUOAI
        slots = self._slots(hidden_states.size(0))
        for chosen in topk_ids.unique().tolist():
            expert = chosen if expert_map is None else int(expert_map[chosen])
            if expert < 0:  # another rank has it
                continue
            token, place = (topk_ids == chosen).nonzero(as_tuple=True)
            x, rows = hidden_states[token], Rows(slots[token].tolist())
            both = F.linear(x, w1[expert], _of(self.w1_bias, expert))
            if rows.parts:
                self._add_first(both, x, expert, rows, interleaved=interleaved)
            if interleaved:  # the CPU build has no kernel for it
                inner = SwigluOAIAndMul.forward_native(SWIGLU, both)
            else:
                inner = both.new_empty(both.size(0), both.size(1) // 2)
                self.activation(activation, inner, both)
            out = F.linear(inner, w2[expert], _of(self.w2_bias, expert))
            if rows.parts:
                a, b = (
                    self._lora_context.w2_lora_a_stacked,
                    self._lora_context.w2_lora_b_stacked,
                )
                _add(out, inner, a, b, expert, rows)
            if not apply_router_weight_on_input:
                out.mul_(topk_weights[token, place].unsqueeze(1))
            output.index_add_(0, token, out)

    def _slots(self, tokens: int) -> torch.Tensor:
        """The slot of each token, -1 for the base. Padding has none."""
        slots = torch.full((tokens,), -1)
        if self._lora_context is not None:
            of_tokens = self._lora_context.punica_wrapper.token_lora_indices[:tokens]
            slots[: of_tokens.size(0)] = of_tokens
        return slots

    def _add_first(
        self, both: torch.Tensor, x: torch.Tensor, expert: int, rows: Rows, *, interleaved: bool
    ) -> None:
        """Adds the adapters' part to the outputs of gate and up. The base may have them by
        turns, where the adapter has first all of one and then all of the other.
        """
        a, b = self._lora_context.w13_lora_a_stacked, self._lora_context.w13_lora_b_stacked
        turns = interleaved and len(b) == 2
        target = torch.zeros_like(both) if turns else both
        _add(target, x, a, b, expert, rows)
        if turns:
            both.unflatten(1, (-1, 2)).transpose(1, 2).add_(target.unflatten(1, (2, -1)))


class _Swiglu:
    alpha, limit = 1.702, 7.0  # gpt-oss's, as vLLM's kernel has them


SWIGLU = _Swiglu()


def _of(bias: torch.Tensor | None, expert: int) -> torch.Tensor | None:
    return None if bias is None else bias[expert]


def _add(
    y: torch.Tensor,
    x: torch.Tensor,
    a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor],
    expert: int,
    rows: Rows,
) -> None:
    """Adds the part of each row's adapter. `a` and `b` are [slots, experts, ...]."""
    sizes = [part.size(2) for part in b]
    add_by_slot(
        y,
        x,
        [_of_expert(t, expert) for t in a],
        [_of_expert(t, expert) for t in b],
        1.0,
        sizes,
        rows,
    )


def _of_expert(stacked: torch.Tensor, expert: int) -> torch.Tensor:
    """Its weights in all slots, [slots, 1, ...]. What all experts share is there once."""
    return stacked.narrow(1, min(expert, stacked.size(1) - 1), 1)
