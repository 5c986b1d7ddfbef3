"""Shell. Runs the GPU's kernel for adapters in Triton's interpreter, which needs no GPU.

It prints, for each case, the largest difference to the product in float64. It is a process of its
own, because Triton decides when it is imported.

The interpreter runs one program after the other. So none may wait for the others, and the two
products are two launches.
"""

from __future__ import annotations

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch

from worker.engine.vllm.lora import gpu_kernel

CASES = (
    # tokens, slots, hidden, columns of the slices, rank
    (5, 3, 64, (32,), 8),
    (40, 2, 256, (96, 40, 40), 16),
    (19, 1, 130, (20, 12), 20),
    (1, 2, 128, (64,), 16),
)


def difference(tokens: int, slots: int, hidden: int, columns: tuple[int, ...], rank: int) -> float:
    g = torch.Generator().manual_seed(tokens)
    mapping = torch.randint(-1, slots, (tokens,), generator=g)
    found, count = torch.unique(mapping, return_counts=True)
    ids = torch.full((slots + 1,), -1, dtype=torch.int32)
    counts = torch.zeros(slots + 1, dtype=torch.int32)
    starts = torch.zeros(slots + 2, dtype=torch.int32)
    ids[: len(found)], counts[: len(found)] = found.int(), count.int()
    starts[1:] = counts.cumsum(0)
    present = torch.randint(0, 1 << len(columns), (slots + 1,), generator=g, dtype=torch.int32)
    present[-1] = 1
    x, y = (torch.randn(tokens, n, generator=g) for n in (hidden, sum(columns)))
    a = tuple(torch.randn(slots, 1, rank, hidden, generator=g) for _ in columns)
    b = tuple(torch.randn(slots, 1, n, rank, generator=g) for n in columns)
    want, at = y.double(), 0
    for i, n in enumerate(columns):
        for token, slot in enumerate(mapping.tolist()):
            if slot >= 0 and present[slot] >> i & 1:
                shrunk = x[token].double() @ a[i][slot, 0].double().T
                want[token, at : at + n] += shrunk @ b[i][slot, 0].double().T
        at += n
    scratch = gpu_kernel.Scratch.make(tokens, slots, len(columns), rank, "cpu", programs=8)
    order = torch.sort(mapping, stable=True)[1].int()
    for product in (gpu_kernel.SHRINK, gpu_kernel.EXPAND):
        gpu_kernel.add_lora(
            y, x, a, b, order, counts, starts, ids, present, scratch, product, programs=8,
            block_k=64, block_n=32,
        )  # fmt: skip
    return ((y.double() - want).abs() / (1 + want.abs())).max().item()


if __name__ == "__main__":
    json.dump([difference(*case) for case in CASES], sys.stdout)
