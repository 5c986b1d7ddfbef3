"""Shell. One launch for the adapters of a linear layer on a GPU: y += x @ A.T @ B.T, with the A and
B of each token's own adapter.

vLLM launches three kernels per layer: zero a buffer, shrink, expand. While an engine decodes, each
has little work, and most of its time is the launch. Here one launch does both products:

- The tokens of an adapter are cut into tiles of TILE_ROWS. A tile of one slice (the q, k or v of a
  qkv layer, say) is the work of `splits` programs.
- Each program multiplies its share of the hidden dimension, and writes the product to `partial`.
- It waits until the other programs of its tile have done so, and adds their products in a fixed
  order. Then it writes its share of the columns of y.

Programs of one tile have neighbouring numbers. The GPU starts programs in the order of their
numbers, so at most one tile waits for programs that have not started, and those that it waits for
start as soon as others end. Nothing waits for ever.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

TILE_ROWS = 16
"""Tokens of a tile. Tensor cores multiply no fewer rows."""
MAX_SPLITS = 32
PROGRAMS = 528
"""Programs that a launch aims at: four for each multiprocessor of a Hopper GPU."""
BLOCK_K = 128
BLOCK_N = 256
BOTH, SHRINK, EXPAND = 0, 1, 2
"""Which products a launch makes. Two launches of one product each need no waiting."""


@dataclass(frozen=True, slots=True)
class Scratch:
    """What the programs of a tile tell each other. One of it serves all layers, because launches of
    one stream follow each other.
    """

    partial: torch.Tensor  # float32: products of a share of the hidden dimension
    arrived: torch.Tensor  # int32 [log2 of splits][tile of a slice]: how many programs came, ever

    @staticmethod
    def make(
        tokens: int, slots: int, slices: int, rank: int, device: Any, programs: int = PROGRAMS
    ) -> Scratch:
        """For launches of up to `tokens` tokens and `slices` slices."""
        groups = range(1, tiles(tokens, slots + 1) * slices + 1)
        most = max(n * splits(n, programs) for n in groups)
        return Scratch(
            torch.empty(most * TILE_ROWS * _padded(rank), dtype=torch.float32, device=device),
            torch.zeros(MAX_SPLITS.bit_length(), len(groups), dtype=torch.int32, device=device),
        )


def tiles(tokens: int, loras: int) -> int:
    """The most tiles that `tokens` tokens of up to `loras` adapters can have."""
    return min(tokens, -(-tokens // TILE_ROWS) + loras)


def splits(tile_count: int, programs: int = PROGRAMS) -> int:
    """Programs per tile: a power of two, so that launches of so many tiles fill the GPU."""
    return min(MAX_SPLITS, 1 << max(0, (programs // tile_count).bit_length() - 1))


def _padded(rank: int) -> int:
    return max(16, triton.next_power_of_2(rank))


def add_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    a: tuple[torch.Tensor, ...],
    b: tuple[torch.Tensor, ...],
    order: torch.Tensor,
    counts: torch.Tensor,
    starts: torch.Tensor,
    ids: torch.Tensor,
    present: torch.Tensor,
    scratch: Scratch,
    product: int = BOTH,
    **launch: Any,
) -> None:
    """Adds the adapters' part to y.

    x is [tokens, hidden]. y is [tokens, columns of all slices]. a[i] is [slots, 1, rank, hidden]
    and b[i] is [slots, 1, columns of slice i, rank]. `order` has the tokens sorted by adapter;
    `ids`, `counts` and `starts` have the slot (-1 for the base model), the number of tokens and the
    first place in `order` of each adapter. They are those of vLLM's LoRAKernelMeta. Bit i of
    present[slot] tells whether slice i of this layer has weights there. After the slots, `present`
    has a value that is 0 if no slot has any.
    """
    tokens, hidden = x.shape
    rank, columns = a[0].shape[-2], [t.shape[-2] for t in b]
    count = tiles(tokens, ids.numel()) * len(b)
    parts = splits(count, launch.pop("programs", PROGRAMS))
    if scratch.partial.numel() < count * parts * TILE_ROWS * _padded(rank):
        raise ValueError(f"the scratch is too small for {count} times {parts} programs")
    _lora_linear[(count * parts,)](
        x,
        x.stride(0),
        y,
        y.stride(0),
        a,
        b,
        scratch.partial,
        scratch.arrived[parts.bit_length() - 1],
        order,
        counts,
        starts,
        ids,
        present,
        HIDDEN=hidden,
        RANK=rank,
        PADDED_RANK=_padded(rank),
        SLICES=len(b),
        COLUMNS=tuple(columns),
        BEGINS=tuple(itertools.accumulate(columns, initial=0)),
        LORAS=ids.numel(),
        PADDED_LORAS=triton.next_power_of_2(ids.numel()),
        SPLITS=parts,
        ROWS=TILE_ROWS,
        BLOCK_K=launch.pop("block_k", BLOCK_K),
        BLOCK_N=launch.pop("block_n", BLOCK_N),
        PRODUCT=product,
        **({"num_warps": 4, "num_stages": 3} | launch),
    )


@triton.jit
def _slice(
    x,
    x_stride,
    y,
    y_stride,
    a,
    b,
    partial,
    arrived,
    token,
    live,
    part,
    HIDDEN: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    PADDED_RANK: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    """A program's share of a tile of a slice. a and b are of the tile's adapter, y begins with the
    slice's columns, and `partial` has the tile's SPLITS products.
    """
    rank = tl.arange(0, PADDED_RANK)
    cell = tl.arange(0, ROWS)[:, None] * PADDED_RANK + rank[None, :]
    CELLS: tl.constexpr = ROWS * PADDED_RANK
    SHARE: tl.constexpr = ((HIDDEN + BLOCK_K - 1) // BLOCK_K + SPLITS - 1) // SPLITS * BLOCK_K

    if PRODUCT != 2:
        product = tl.zeros((ROWS, PADDED_RANK), dtype=tl.float32)
        for k in range(part * SHARE, min(HIDDEN, (part + 1) * SHARE), BLOCK_K):
            at = k + tl.arange(0, BLOCK_K)
            inputs = x + token[:, None] * x_stride + at[None, :]
            weights = a + rank[None, :] * HIDDEN + at[:, None]
            if HIDDEN % BLOCK_K == 0 and RANK == PADDED_RANK:
                product = tl.dot(tl.load(inputs), tl.load(weights), product)
            else:
                inside = at < HIDDEN
                there = inside[:, None] & (rank < RANK)[None, :]
                product = tl.dot(
                    tl.load(inputs, mask=inside[None, :], other=0.0),
                    tl.load(weights, mask=there, other=0.0),
                    product,
                )
        tl.store(partial + part * CELLS + cell, product)

    if PRODUCT == 0 and SPLITS > 1:
        tl.debug_barrier()  # all threads of this program have written
        came = tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu")
        whole = (came // SPLITS + 1) * SPLITS
        came += 1
        while came - whole < 0:  # a difference, because the count wraps around
            came = tl.atomic_add(arrived, 0, sem="acquire", scope="gpu")
        tl.debug_barrier()

    if PRODUCT != 1:
        shrunk = tl.zeros((ROWS, PADDED_RANK), dtype=tl.float32)
        for q in tl.static_range(SPLITS):
            shrunk += tl.load(partial + q * CELLS + cell, cache_modifier=".cg")
        narrow = shrunk.to(b.dtype.element_ty)
        for n in range(part * BLOCK_N, COLUMNS, SPLITS * BLOCK_N):
            at = n + tl.arange(0, BLOCK_N)
            weights = b + at[None, :] * RANK + rank[:, None]
            if COLUMNS % BLOCK_N == 0 and RANK == PADDED_RANK:
                added = tl.dot(narrow, tl.load(weights))
                inside = live[:, None]
            else:
                there = (at < COLUMNS)[None, :] & (rank < RANK)[:, None]
                added = tl.dot(narrow, tl.load(weights, mask=there, other=0.0))
                inside = live[:, None] & (at < COLUMNS)[None, :]
            outputs = y + token[:, None] * y_stride + at[None, :]
            before = tl.load(outputs, mask=inside, other=0.0)
            tl.store(outputs, (before + added).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _lora_linear(
    x,
    x_stride,
    y,
    y_stride,
    a,
    b,
    partial,
    arrived,
    order,
    counts,
    starts,
    ids,
    present,
    HIDDEN: tl.constexpr,
    RANK: tl.constexpr,
    PADDED_RANK: tl.constexpr,
    SLICES: tl.constexpr,
    COLUMNS: tl.constexpr,
    BEGINS: tl.constexpr,
    LORAS: tl.constexpr,
    PADDED_LORAS: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    group = tl.program_id(0) // SPLITS
    part = tl.program_id(0) % SPLITS
    tile = group // SLICES

    # Which adapter the tile belongs to. Tiles are numbered adapter by adapter.
    index = tl.arange(0, PADDED_LORAS)
    slots = tl.load(ids + index, mask=index < LORAS, other=-1)
    tokens = tl.load(counts + index, mask=index < LORAS, other=0)
    if tl.load(present + LORAS - 1) == 0:
        return
    of_each = tl.where(slots >= 0, (tokens + ROWS - 1) // ROWS, 0)
    lora = tl.sum((tl.cumsum(of_each, 0) <= tile).to(tl.int32), 0)
    if lora >= LORAS:
        return
    slot = tl.load(ids + lora).to(tl.int64)
    has = tl.load(present + slot)
    first = (tile - tl.sum(tl.where(index < lora, of_each, 0), 0)) * ROWS
    row = tl.arange(0, ROWS)
    live = first + row < tl.load(counts + lora)
    token = tl.load(order + tl.load(starts + lora) + first + row, mask=live, other=0).to(tl.int64)
    for s in tl.static_range(SLICES):
        if (group % SLICES == s) & ((has >> s) & 1 != 0):
            _slice(
                x,
                x_stride,
                y + BEGINS[s],
                y_stride,
                a[s] + slot * RANK * HIDDEN,
                b[s] + slot * COLUMNS[s] * RANK,
                partial + group * SPLITS * ROWS * PADDED_RANK,
                arrived + group,
                token,
                live,
                part,
                HIDDEN,
                COLUMNS[s],
                RANK,
                PADDED_RANK,
                SPLITS,
                ROWS,
                BLOCK_K,
                BLOCK_N,
                PRODUCT,
            )
