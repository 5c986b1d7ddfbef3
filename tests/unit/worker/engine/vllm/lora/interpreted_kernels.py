"""Shell. Runs the GPU's kernels for adapters in Triton's interpreter, which needs no GPU.

It prints, for each case, the largest difference to the product in float64. It is a process of its
own, because Triton decides when it is imported.

The interpreter runs one program after the other, so none may wait for others. Each is told that it
came last, or that all words are of its launch. A first run fills in what the programs tell each
other, and a second one is judged.
"""

from __future__ import annotations

import json
import math
import os
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from worker.engine.vllm.lora import tile_kernel, token_kernel
from worker.engine.vllm.lora.presence import RANK_AT
from worker.engine.vllm.lora.step_metadata import TokenGroups, most_tiles, rows_of_a_tile

TILES = (
    # tokens, slots, hidden, columns of the slices, rank, programs
    (5, 3, 64, (32,), 8, 8),
    (40, 2, 256, (96, 40, 40), 16, 64),
    (19, 1, 130, (20, 12), 20, 1),
    (1, 2, 128, (64,), 16, 1),
    (600, 2, 128, (48, 16), 16, 1),
    (9, 6, 128, (48,), 100, 4),
)
TOKENS = (
    # tokens, slots, hidden, columns of the slices, rank
    (1, 2, 256, (96, 40, 40), 16),
    (5, 3, 64, (32,), 8),
    (16, 3, 1300, (700, 72), 20),
    (3, 2, 20000, (1024, 256), 40),
    (2, 2, 4096, (9000,), 64),
)


def came_last(self: Any, op: Any, ptr: Any, val: TensorHandle, *more: Any) -> TensorHandle:
    return TensorHandle(np.full_like(val.data, tile_kernel.MAX_SPLITS - 1), val.dtype)


def random_layer(
    tokens: int,
    slots: int,
    hidden: int,
    columns: tuple[int, ...],
    rank: int,
    beyond: float = 0.0,
) -> tuple[Any, ...]:
    """The slot of each token, which slices are present, x, y before, A, B and y after. `beyond`
    lies beyond an adapter's rank.
    """
    g = torch.Generator().manual_seed(tokens)
    mapping = torch.randint(-1, slots, (tokens,), generator=g, dtype=torch.int32)
    mapping[0] = 0
    present = torch.randint(0, 1 << len(columns), (slots,), generator=g, dtype=torch.int32)
    present[0] |= 1
    ranks = torch.randint(1, rank + 1, (slots,), generator=g, dtype=torch.int32)
    ranks[-1] = 0xFFFF  # of a slot that nothing is known of
    x, before = (torch.randn(tokens, n, generator=g) for n in (hidden, sum(columns)))
    a = tuple(torch.randn(slots, 1, rank, hidden, generator=g) / hidden**0.5 for _ in columns)
    b = tuple(torch.randn(slots, 1, n, rank, generator=g) for n in columns)
    for slot, most in enumerate(ranks.tolist()):
        for i in range(len(columns)):
            a[i][slot, 0, most:] = b[i][slot, 0, :, most:] = beyond
    want, at = before.double(), 0
    for i, n in enumerate(columns):
        for token, slot in enumerate(mapping.tolist()):
            if slot >= 0 and present[slot] >> i & 1:
                most = ranks[slot]
                shrunk = x[token].double() @ a[i][slot, 0, :most].double().T
                want[token, at : at + n] += shrunk @ b[i][slot, 0, :, :most].double().T
        at += n
    return mapping, present | ranks << RANK_AT, x, before, a, b, want


def of_tiles(
    tokens: int, slots: int, hidden: int, columns: tuple[int, ...], rank: int, programs: int
) -> float:
    mapping, present, x, before, a, b, want = random_layer(tokens, slots, hidden, columns, rank)
    rows = rows_of_a_tile(tokens)
    most = most_tiles(tokens, slots, rows)
    slot_of, rows_of = (torch.full(n, -1, dtype=torch.int32) for n in ((most,), (most, rows)))
    for whole, part in zip(
        (slot_of, rows_of), TokenGroups.of(mapping.numpy()).tiles(rows), strict=True
    ):
        whole[: len(part)] = torch.from_numpy(part)
    scratch = tile_kernel.TileScratch.make(
        tokens, slots, len(columns), rank, "cpu", programs=programs
    )
    for _ in range(2):
        y = before.clone()
        tile_kernel.add_lora(
            y, x, a, b, (slot_of, rows_of), present, scratch,
            programs=programs, block_k=64, block_n=32,
        )  # fmt: skip
    return largest(y, want)


def of_tokens(tokens: int, slots: int, hidden: int, columns: tuple[int, ...], rank: int) -> float:
    mapping, present, x, before, a, b, want = random_layer(
        tokens, slots, hidden, columns, rank, math.nan
    )
    scratch = token_kernel.TokenScratch.make(len(columns), rank, "cpu")
    scratch.words.fill_(1 << 32)  # all seem to be of the first launch
    for _ in range(2):
        scratch.launches.zero_()
        y = before.clone()
        token_kernel.add_lora(y, x, a, b, mapping, present, scratch)
    counted = scratch.launches.count_nonzero().item()
    here = mapping[mapping >= 0].long()
    worked = sum(int(present[slot] & 0xFFFF).bit_count() for slot in here)
    assert counted == worked, f"{counted} counters for {worked} slices with work"
    return largest(y, want)


def largest(y: torch.Tensor, want: torch.Tensor) -> float:
    return ((y.double() - want).abs() / (1 + want.abs())).max().item()


if __name__ == "__main__":
    InterpreterBuilder.create_atomic_rmw = came_last
    found = [of_tiles(*case) for case in TILES] + [of_tokens(*case) for case in TOKENS]
    json.dump(found, sys.stdout)
