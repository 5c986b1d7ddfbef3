"""Shell. Runs the GPU's kernel for adapters in Triton's interpreter, which needs no GPU.

It prints, for each case, the largest difference to the product in float64. It is a process of its
own, because Triton decides when it is imported.

The interpreter runs one program after the other, so none may wait for others. Each is told that it
came last. A first run fills in what the programs tell each other, and a second one is judged.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from worker.engine.vllm.lora import gpu_kernel
from worker.engine.vllm.lora.step_metadata import TokenGroups, most_tiles, rows_of_a_tile

CASES = (
    # tokens, slots, hidden, columns of the slices, rank, programs
    (5, 3, 64, (32,), 8, 8),
    (40, 2, 256, (96, 40, 40), 16, 64),
    (19, 1, 130, (20, 12), 20, 1),
    (1, 2, 128, (64,), 16, 1),
    (600, 2, 128, (48, 16), 16, 1),
)


def came_last(self: Any, op: Any, ptr: Any, val: TensorHandle, *more: Any) -> TensorHandle:
    return TensorHandle(np.full_like(val.data, gpu_kernel.MAX_SPLITS - 1), val.dtype)


def difference(
    tokens: int, slots: int, hidden: int, columns: tuple[int, ...], rank: int, programs: int
) -> float:
    g = torch.Generator().manual_seed(tokens)
    mapping = torch.randint(-1, slots, (tokens,), generator=g)
    rows = rows_of_a_tile(tokens)
    most = most_tiles(tokens, slots, rows)
    slot_of, rows_of = (torch.full(n, -1, dtype=torch.int32) for n in ((most,), (most, rows)))
    for whole, part in zip(
        (slot_of, rows_of), TokenGroups.of(mapping.numpy()).tiles(rows), strict=True
    ):
        whole[: len(part)] = torch.from_numpy(part)
    present = torch.randint(0, 1 << len(columns), (slots,), generator=g, dtype=torch.int32)
    x, before = (torch.randn(tokens, n, generator=g) for n in (hidden, sum(columns)))
    a = tuple(torch.randn(slots, 1, rank, hidden, generator=g) for _ in columns)
    b = tuple(torch.randn(slots, 1, n, rank, generator=g) for n in columns)
    want, at = before.double(), 0
    for i, n in enumerate(columns):
        for token, slot in enumerate(mapping.tolist()):
            if slot >= 0 and present[slot] >> i & 1:
                shrunk = x[token].double() @ a[i][slot, 0].double().T
                want[token, at : at + n] += shrunk @ b[i][slot, 0].double().T
        at += n
    scratch = gpu_kernel.Scratch.make(tokens, slots, len(columns), rank, "cpu", programs=programs)
    for _ in range(2):
        y = before.clone()
        gpu_kernel.add_lora(
            y, x, a, b, (slot_of, rows_of), present, scratch,
            programs=programs, block_k=64, block_n=32,
        )  # fmt: skip
    return ((y.double() - want).abs() / (1 + want.abs())).max().item()


if __name__ == "__main__":
    InterpreterBuilder.create_atomic_rmw = came_last
    json.dump([difference(*case) for case in CASES], sys.stdout)
