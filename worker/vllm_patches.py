"""Shell. Corrections of vLLM 0.32 that Loraplex cannot do without, applied in every process that runs the model.

Each one says what goes wrong without it, is harmless where vLLM is right already, and has a test on the real engine that fails without it.
"""

from __future__ import annotations

from typing import Any


def apply() -> None:
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        _base_rows_stay_base()


def _base_rows_stay_base() -> None:
    """The CPU kernels take the slot of a token as an index, and a token of the base model has slot -1: in Python's way it selects the LAST slot.

    So a base request that shares a batch with an adapter's request is answered with the weights of whatever adapter is in the last slot. The GPU
    kernels skip such tokens (vllm-project/vllm pull requests 48421 and 49656, open at the time of writing). Here the shrink's result is made
    zero for them, and what the expand adds is then zero as well.
    """
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    original = lora_ops.bgmv_shrink
    if getattr(original, "loraplex", False):
        return

    def bgmv_shrink(inputs: Any, lora_b_weights: Any, output_tensor: Any, lora_indices_tensor: Any, scaling: float = 1.0) -> None:
        original(inputs, lora_b_weights, output_tensor, lora_indices_tensor, scaling)
        output_tensor.masked_fill_((lora_indices_tensor < 0).unsqueeze(1), 0)

    bgmv_shrink.loraplex = True  # type: ignore[attr-defined]
    lora_ops.bgmv_shrink = bgmv_shrink  # the prefill's sgmv_shrink looks it up here
    punica_cpu.bgmv_shrink = bgmv_shrink
