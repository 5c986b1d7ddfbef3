"""Shell. Gives steps to a layer with adapters as vLLM does on a GPU: its wrapper, our tables of the
step, what lies in the slots, our operator, and the kernels in Triton's interpreter.

It prints, for each step, its tokens and the largest difference to the product in float64. It needs
TRITON_INTERPRET=1. See interpreted_kernels.py for how programs wait there.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import torch
from triton.runtime.interpreter import InterpreterBuilder
from vllm.lora.layers import LoRAMapping
from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta
from vllm.lora.punica_wrapper import punica_gpu

from tests.unit.worker.engine.vllm.lora import interpreted_kernels as kernels
from worker.engine.vllm.lora import gpu_lora
from worker.engine.vllm.lora.presence import Presence
from worker.engine.vllm.lora.step_block import StepBlock

SLOTS, TOKENS, HIDDEN, COLUMNS, RANK = 3, 700, 96, (48, 16, 16), 24
IDS: list[int | None] = [70, None, 90]
RANKS = {0: 8, 2: 24}
STEPS = (
    (0,), (70,), (90,), (70, 90, 0), (90,) * 7 + (0,) * 5 + (70,) * 4, (70, 0, 90) * 6,
    (90,) * 600, (0, 70, 90),
)  # fmt: skip


class OneLayer:
    """An adapter with q and v in slot 0, and one with q, k and v in slot 2."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(1)
        self.a = tuple(torch.zeros(SLOTS, 1, RANK, HIDDEN).half() for _ in COLUMNS)
        self.b = tuple(torch.zeros(SLOTS, 1, n, RANK).half() for n in COLUMNS)
        self.x = torch.randn(TOKENS, HIDDEN, generator=g).half()
        self.y = torch.randn(TOKENS, sum(COLUMNS), generator=g).half()
        self.presence = Presence([(self.a, self.b)], SLOTS)
        for slot in range(SLOTS):
            rank, columns = RANKS.get(slot, 0), {}
            for i, n in enumerate(COLUMNS):
                if rank and not (slot == 0 and i == 1):
                    self.a[i][slot, 0, :rank] = torch.randn(rank, HIDDEN, generator=g) / 10
                    self.b[i][slot, 0, :, :rank] = torch.randn(n, rank, generator=g) / 10
                    columns[self.b[i].untyped_storage().data_ptr()] = rank
            self.presence.write(slot, columns)

    def after(self, ids: tuple[int, ...]) -> torch.Tensor:
        want, at = self.y[: len(ids)].double(), 0
        for i, n in enumerate(COLUMNS):
            for token, adapter in enumerate(ids):
                if adapter:
                    slot = IDS.index(adapter)
                    shrunk = self.x[token].double() @ self.a[i][slot, 0].double().T
                    want[token, at : at + n] += shrunk @ self.b[i][slot, 0].double().T
            at += n
        return want


def run() -> list[tuple[int, float]]:
    layer = OneLayer()
    config = SimpleNamespace(max_loras=SLOTS, specialize_active_lora=False)
    wrapper: Any = punica_gpu.PunicaWrapperGPU(TOKENS, 64, "cpu", lora_config=config)
    wrapper.step = StepBlock(wrapper, SLOTS)
    wrapper.wanted = torch.ones(len(layer.presence), dtype=torch.bool)
    gpu_lora._Layers.presence = layer.presence
    manager = SimpleNamespace(punica_wrapper_mapping={"": wrapper}, lora_slots=SLOTS)
    gpu_lora._make_scratch([(layer.a, layer.b)], manager)
    scratch, found = gpu_lora._Layers.token_scratch, []
    scratch.words.fill_(1 << 32)  # all seem to be of the first launch
    for ids in STEPS:
        wrapper.update_metadata(LoRAMapping(ids, ids, is_prefill=True), IDS, SLOTS + 1, 1000)
        y = layer.y.clone()
        for _ in range(2):
            scratch.launches.zero_()
            y = layer.y[: len(ids)].clone()
            wrapper.add_lora_linear(y, layer.x[: len(ids)], layer.a, layer.b, 1.0, COLUMNS)
        found.append((len(ids), (y.double() - layer.after(ids)).abs().max().item()))
    return found


if __name__ == "__main__":
    InterpreterBuilder.create_atomic_rmw = kernels.came_last
    torch.cuda.is_current_stream_capturing = lambda: False
    punica_gpu.LoRAKernelMeta = LoRAKernelMeta  # vLLM imports it where there is a GPU only
    gpu_lora.install()
    json.dump(run(), sys.stdout)
