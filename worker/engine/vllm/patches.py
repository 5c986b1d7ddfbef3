"""Shell. Corrections of vLLM 0.32 that Loraplex cannot do without, applied in every process that
runs the model.

Each one says what goes wrong without it, is harmless where vLLM is right already, and has a test on
the real engine that fails without it.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from worker.engine.vllm.lora import files as adapter_files
from worker.engine.vllm.resume import engine_core

KERNELS = Path(__file__).parent / "lora_kernels"
RELATIVES = {(9, 0): "NVIDIA H200"}
"""Whose tables a GPU without its own takes, by compute capability: what fits into its registers and
shared memory fits here too, and vLLM's guess was made for none of them. Its own tables are
better.
"""


def apply() -> None:
    from vllm.platforms import current_platform

    adapter_files.install()
    engine_core.install()
    if current_platform.is_cpu():
        from worker.engine.vllm import cpu_lora

        _base_rows_stay_base()
        cpu_lora.install()
    elif current_platform.is_cuda():
        _lora_kernels_fit_the_gpu()


def _base_rows_stay_base() -> None:
    """The CPU kernels take the slot of a token as an index, and a token of the base model has slot
    -1: in Python's way it selects the LAST slot.

    So a base request that shares a batch with an adapter's request is answered with the weights of
    whatever adapter is in the last slot. The GPU kernels skip such tokens (vllm-project/vllm pull
    requests 48421 and 49656, open at the time of writing). Linear layers have kernels of their own
    (cpu_lora.py); for what still comes here the shrink's result is made zero, and what the
    expand adds is then zero as well.
    """
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    original = lora_ops.bgmv_shrink
    if getattr(original, "loraplex", False):
        return

    def bgmv_shrink(
        inputs: Any,
        lora_b_weights: Any,
        output_tensor: Any,
        lora_indices_tensor: Any,
        scaling: float = 1.0,
    ) -> None:
        original(inputs, lora_b_weights, output_tensor, lora_indices_tensor, scaling)
        output_tensor.masked_fill_((lora_indices_tensor < 0).unsqueeze(1), 0)

    bgmv_shrink.loraplex = True  # type: ignore[attr-defined]
    lora_ops.bgmv_shrink = bgmv_shrink  # the prefill's sgmv_shrink looks it up here
    punica_cpu.bgmv_shrink = bgmv_shrink


def _lora_kernels_fit_the_gpu() -> None:
    """vLLM launches its LoRA kernels with one guess for every GPU, unless VLLM_TUNED_CONFIG_FOLDER
    has tables for this one, and brings none.

    Ours are made by worker/engine/vllm/tune_kernels.py; the user's own folder comes first. (Setting
    the variable instead would change the kernels of MoE models.)
    """
    from vllm.lora.ops.triton_ops import utils

    theirs = utils.load_lora_op_config
    if getattr(theirs, "loraplex", False) or utils.is_batch_invariant:
        return

    @functools.lru_cache
    def load_lora_op_config(op_type: str, add_inputs: bool | None) -> dict[str, Any] | None:
        import torch

        table: dict[str, Any] | None = theirs(op_type, add_inputs)
        for gpu in (
            torch.cuda.get_device_name(),
            RELATIVES.get(torch.cuda.get_device_capability()),
        ):
            if table is None and gpu is not None:
                table = kernel_table(KERNELS, gpu, op_type, add_inputs)
        return table

    load_lora_op_config.loraplex = True  # type: ignore[attr-defined]
    utils.load_lora_op_config = load_lora_op_config


def kernel_table(folder: Path, gpu: str, op: str, add_inputs: bool | None) -> dict[str, Any] | None:
    """The table of [slots + 1][slices][tokens][k][n] -> launch config for this GPU, if there is
    one.
    """
    path = folder / gpu_file(gpu, op, add_inputs)
    if not path.exists():
        return None
    return {slots: _Nearest(by_slices) for slots, by_slices in json.loads(path.read_text()).items()}


def gpu_file(gpu: str, op: str, add_inputs: bool | None) -> str:
    """vLLM's name for the table of a kernel."""
    kind = f"EXPAND_{str(add_inputs).upper()}" if op == "expand" else op.upper()
    return f"{gpu.replace(' ', '_').replace('-', '_')}_{kind}.json"


class _Nearest(dict[str, Any]):
    """vLLM takes the nearest entry at every level of a table but this one, where it would fail: a
    layer of four slices gets what three have.
    """

    def __missing__(self, key: str) -> Any:
        return self[min(self, key=lambda k: abs(int(k) - int(key)))]
