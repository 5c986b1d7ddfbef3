"""Shell. One launch for the adapters of a linear layer on a GPU: y += x @ A.T @ B.T, with the A and
B of each token's own adapter.

It is for steps of more tokens than token_kernel.py takes. vLLM launches three kernels per layer:
zero a buffer, shrink, expand. While an engine decodes, each has little work, and most of its time
is the launch. Here one launch does both products:

- The tokens of an adapter are cut into tiles (step_metadata.py). A tile of one slice (the q, k or v
  of a qkv layer, say) is the work of `splits` programs.
- Each program multiplies its share of the hidden dimension, and writes the product to `partial`.
- It waits until the other programs of its tile have done so, and adds their products in a fixed
  order. Then it writes its share of the columns of y.

A program multiplies as many rows of A as the adapter's rank needs, out of RANKS. With all that
`max_lora_rank` allows, adapters of rank 16 took twice as long in slots for rank 64.

Programs of one tile have neighbouring numbers. The GPU starts programs in the order of their
numbers, so at most one tile waits for programs that have not started, and those that it waits for
start as soon as others end. Nothing waits for ever.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from worker.engine.vllm.lora.presence import RANK_AT
from worker.engine.vllm.lora.step_metadata import LARGE_ROWS, SMALL_ROWS, SMALL_TOKENS, most_tiles
from worker.engine.vllm.lora.token_kernel import padded_rank

MAX_SPLITS = 32
PROGRAMS = 528
"""Programs that a launch aims at: four for each multiprocessor of a Hopper GPU."""
LARGE_SPLITS = 4
"""Programs of a large tile, whatever the step: each other number would be compiled when it is first
needed, while streams wait.
"""
MAX_BLOCK_K = 128
MAX_BLOCK_N = 256
RANKS = (16, 64)
"""Ranks that programs are made for, beside the largest."""
A_VALUES, B_VALUES, Y_VALUES = 8192, 16384, 8192
"""The most values of A, B and y that a program holds at once, so that any rank fits a GPU."""


@dataclass(frozen=True, slots=True)
class TileScratch:
    """What the programs of a tile tell each other. One of it serves all layers, because launches of
    one stream follow each other.
    """

    partial: torch.Tensor  # float32: products of a share of the hidden dimension
    arrived: torch.Tensor  # int32 [log2 of splits][tile of a slice]: how many programs came, ever

    @staticmethod
    def make(
        tokens: int, slots: int, slices: int, rank: int, device: Any, programs: int = PROGRAMS
    ) -> TileScratch:
        """For launches of up to `tokens` tokens and `slices` slices."""
        small = min(tokens, SMALL_TOKENS)
        groups = [n * slices for n in range(1, most_tiles(small, slots, SMALL_ROWS) + 1)]
        values = max(n * splits(n, programs) for n in groups) * SMALL_ROWS
        if tokens > small:
            groups.append(most_tiles(tokens, slots, LARGE_ROWS) * slices)
            values = max(values, groups[-1] * LARGE_SPLITS * LARGE_ROWS)
        return TileScratch(
            torch.empty(values * padded_rank(rank), dtype=torch.float32, device=device),
            torch.zeros(MAX_SPLITS.bit_length(), max(groups), dtype=torch.int32, device=device),
        )


class CompiledLaunch(NamedTuple):
    """A program that Triton has compiled, and the values that are compiled into it."""

    program: Any
    constants: tuple[Any, ...]


ALIGNMENT = 16
"""Bytes. Triton compiles another program for a tensor that begins elsewhere."""
_compiled: dict[tuple[Any, ...], CompiledLaunch] = {}
"""By all that Triton compiles another program for. It has a table of its own, but to find a program
in it costs more than the launch, and a step outside of the graphs has 128 launches.
"""


def splits(tile_count: int, programs: int = PROGRAMS) -> int:
    """Programs per tile: a power of two, so that launches of so many tiles fill the GPU."""
    return min(MAX_SPLITS, 1 << max(0, (programs // tile_count).bit_length() - 1))


def add_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    a: tuple[torch.Tensor, ...],
    b: tuple[torch.Tensor, ...],
    tiles: Sequence[torch.Tensor],
    present: torch.Tensor,
    scratch: TileScratch,
    programs: int = PROGRAMS,
    **launch: Any,
) -> None:
    """Adds the adapters' part to y.

    x is [tokens, hidden]. y is [tokens, columns of all slices]. a[i] is [slots, 1, rank, hidden]
    and b[i] is [slots, 1, columns of slice i, rank]. `tiles` are the slot of each tile, -1 where
    there is none, and its tokens (step_metadata.py). present[slot] tells which slices of this layer
    have weights there, and of what rank (presence.py).
    """
    tuned = bool(launch)
    slot_of, rows_of = tiles
    tokens, hidden = x.shape
    slots, rank, columns = a[0].shape[0], a[0].shape[-2], [t.shape[-2] for t in b]
    rows, padded = rows_of.shape[1], padded_rank(rank)
    count = most_tiles(tokens, slots, rows) * len(b)
    parts = LARGE_SPLITS if rows == LARGE_ROWS else splits(count, programs)
    parts = launch.pop("splits", parts)
    ranks = tuple(sorted({*(r for r in RANKS if r < padded), padded}))
    block_k, block_n = launch.pop("block_k", 0), launch.pop("block_n", 0)
    if parts > 1 and scratch.partial.numel() < count * parts * rows * padded:
        raise ValueError(f"the scratch is too small for {count} times {parts} programs")
    tensors = (
        x,
        x.stride(0),
        y,
        y.stride(0),
        a,
        b,
        scratch.partial,
        scratch.arrived[parts.bit_length() - 1],
        slot_of,
        rows_of,
        present,
    )
    grid = (count * parts, 1, 1)
    shape = (rank, slots, rows, parts, hidden, *columns, x.stride(0), y.stride(0))
    types = (x.dtype, y.dtype, a[0].dtype, b[0].dtype)
    pointers = (x, y, *tensors[6:], *a, *b)
    key = (*shape, *types, *(t.data_ptr() % ALIGNMENT == 0 for t in pointers))
    if not tuned and (compiled := _compiled.get(key)):
        compiled.program[grid](*tensors, *compiled.constants)
        return
    constants = {
        "HIDDEN": hidden,
        "RANK": rank,
        "RANKS": ranks,
        "ABOVE": (0, *ranks[:-1]),
        "RANK_AT": RANK_AT,
        "SLICES": len(b),
        "COLUMNS": tuple(columns),
        "BEGINS": tuple(itertools.accumulate(columns, initial=0)),
        "SLOTS": slots,
        "PADDED_SLOTS": triton.next_power_of_2(slots),
        "SPLITS": parts,
        "ROWS": rows,
        "BLOCKS_K": tuple(block_k or min(MAX_BLOCK_K, max(16, A_VALUES // r)) for r in ranks),
        "BLOCKS_N": tuple(
            block_n or min(MAX_BLOCK_N, Y_VALUES // rows, max(16, B_VALUES // r)) for r in ranks
        ),
    }
    warps = 4 if padded <= 128 else 8
    options = {"num_warps": warps, "num_stages": 3} | launch
    program = _lora_linear[grid](*tensors, **constants, **options)
    if program is not None and not tuned:  # Triton's interpreter has none
        in_order = _lora_linear.arg_names[len(tensors) :]
        _compiled[key] = CompiledLaunch(program, tuple(constants[name] for name in in_order))


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
):
    """A program's share of a tile of a slice. a and b are of the tile's adapter, y begins with the
    slice's columns, and `partial` has the tile's SPLITS products.
    """
    rank = tl.arange(0, PADDED_RANK)
    cell = tl.arange(0, ROWS)[:, None] * PADDED_RANK + rank[None, :]
    CELLS: tl.constexpr = ROWS * PADDED_RANK
    SHARE: tl.constexpr = ((HIDDEN + BLOCK_K - 1) // BLOCK_K + SPLITS - 1) // SPLITS * BLOCK_K

    product = tl.zeros((ROWS, PADDED_RANK), dtype=tl.float32)
    for k in range(part * SHARE, min(HIDDEN, (part + 1) * SHARE), BLOCK_K):
        at = k + tl.arange(0, BLOCK_K)
        inputs = x + token[:, None] * x_stride + at[None, :]
        weights = a + rank[None, :] * HIDDEN + at[:, None]
        if HIDDEN % BLOCK_K == 0 and PADDED_RANK <= RANK:
            product = tl.dot(tl.load(inputs), tl.load(weights), product)
        else:
            inside = at < HIDDEN
            there = inside[:, None] & (rank < RANK)[None, :]
            product = tl.dot(
                tl.load(inputs, mask=inside[None, :], other=0.0),
                tl.load(weights, mask=there, other=0.0),
                product,
            )

    if SPLITS > 1:
        tl.store(partial + part * CELLS + cell, product)
        tl.debug_barrier()  # all threads of this program have written
        came = tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu")
        whole = (came // SPLITS + 1) * SPLITS
        came += 1
        while came - whole < 0:  # a difference, because the count wraps around
            came = tl.atomic_add(arrived, 0, sem="acquire", scope="gpu")
        tl.debug_barrier()

        shrunk = tl.zeros((ROWS, PADDED_RANK), dtype=tl.float32)
        for q in tl.static_range(SPLITS):
            shrunk += tl.load(partial + q * CELLS + cell, cache_modifier=".cg")
        narrow = shrunk.to(b.dtype.element_ty)
    else:
        narrow = product.to(b.dtype.element_ty)

    for n in range(part * BLOCK_N, COLUMNS, SPLITS * BLOCK_N):
        at = n + tl.arange(0, BLOCK_N)
        weights = b + at[None, :] * RANK + rank[:, None]
        outputs = y + token[:, None] * y_stride + at[None, :]
        if COLUMNS % BLOCK_N == 0 and PADDED_RANK <= RANK:
            added = tl.dot(narrow, tl.load(weights))
            inside = live[:, None]
        else:
            there = (at < COLUMNS)[None, :] & (rank < RANK)[:, None]
            added = tl.dot(narrow, tl.load(weights, mask=there, other=0.0))
            inside = live[:, None] & (at < COLUMNS)[None, :]
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
    slot_of,
    rows_of,
    present,
    HIDDEN: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    ABOVE: tl.constexpr,
    RANK_AT: tl.constexpr,
    SLICES: tl.constexpr,
    COLUMNS: tl.constexpr,
    BEGINS: tl.constexpr,
    SLOTS: tl.constexpr,
    PADDED_SLOTS: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS_K: tl.constexpr,
    BLOCKS_N: tl.constexpr,
):
    group = tl.program_id(0) // SPLITS
    part = tl.program_id(0) % SPLITS
    tile = group // SLICES

    index = tl.arange(0, PADDED_SLOTS)
    slot = tl.load(slot_of + tile).to(tl.int64)
    token = tl.load(rows_of + tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    of_each = tl.load(present + index, mask=index < SLOTS, other=0)
    has = tl.sum(tl.where(index == slot, of_each, 0), 0)  # loaded beside the slot, not after it
    live = token >= 0
    token = tl.where(live, token, 0)
    rank = tl.minimum((has >> RANK_AT) & 0xFFFF, RANK)
    place = partial + group * SPLITS * ROWS * RANKS[len(RANKS) - 1]
    for s in tl.static_range(SLICES):
        if (group % SLICES == s) & ((has >> s) & 1 != 0):
            for r in tl.static_range(len(RANKS)):
                if (rank > ABOVE[r]) & (rank <= RANKS[r]):
                    _slice(
                        x,
                        x_stride,
                        y + BEGINS[s],
                        y_stride,
                        a[s] + slot * RANK * HIDDEN,
                        b[s] + slot * COLUMNS[s] * RANK,
                        place,
                        arrived + group,
                        token,
                        live,
                        part,
                        HIDDEN,
                        COLUMNS[s],
                        RANK,
                        RANKS[r],
                        SPLITS,
                        ROWS,
                        BLOCKS_K[r],
                        BLOCKS_N[r],
                    )
