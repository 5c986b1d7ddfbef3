"""Shell. One launch for the adapters of a linear layer in a step of few tokens: y += x @ A.T @ B.T,
with the A and B of each token's own adapter.

Such a launch has next to no work. It takes as long as its loads wait for each other. So each token
and slice is the work of SPLITS programs, which tell each other their products in one way through
the GPU's memory:

- Each program multiplies its share of the hidden dimension, and sends the product to the others of
  its token and slice. A value and the number of the launch are one word. So whoever reads a word
  knows whether it is of this launch. (tile_kernel.py has a counter of arrivals, so the products, a
  fence and the counter go one after the other. Where there is more to do, that costs no more.)
- B and y come meanwhile.
- It adds the products of all in a fixed order, and writes its share of the columns of y.

The GPU starts programs in the order of their numbers, so nothing waits for ever.

From Hopper on the GPU begins a launch while the one before it ends (programmatic dependent launch).
Weights are read at once, and what others write only after `gdc_wait`. Every program calls it: what
comes after this launch may then rely on what came before.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from worker.engine.vllm.lora.presence import RANK_AT

FEW_TOKENS = 16
"""The most tokens of a step. With more, tiles of tokens (tile_kernel.py) are faster."""
SPLITS = 32
"""Programs of a token and slice."""
MOST_WEIGHTS = 8192
"""Values of A or B that a program holds at once, so that any rank fits a GPU."""


@dataclass(frozen=True, slots=True)
class TokenScratch:
    """What the programs of a launch tell each other. One of it serves all layers, because launches
    of one stream follow each other.
    """

    words: torch.Tensor
    """int64 [tokens times slices, SPLITS, padded rank]. The lower half of a word is a float32: a
    product of a share of the hidden dimension. The upper half is the launch that it is of.
    """
    launches: torch.Tensor
    """int32 [tokens times slices]: how many launches had work there, modulo 2**32."""

    @staticmethod
    def make(slices: int, rank: int, device: Any) -> TokenScratch:
        """For launches of up to FEW_TOKENS tokens and `slices` slices."""
        groups = FEW_TOKENS * slices
        return TokenScratch(
            torch.zeros(groups, SPLITS, padded_rank(rank), dtype=torch.int64, device=device),
            torch.zeros(groups, dtype=torch.int32, device=device),
        )


def padded_rank(rank: int) -> int:
    """The rank that a kernel holds for this one: a power of two that tensor cores take."""
    return max(16, triton.next_power_of_2(rank))


def _share(length: int, held: int) -> int:
    """How many of `length` values, each with `held` weights, a program reads at once: its whole
    share, if they are not too many.
    """
    return max(16, min(triton.next_power_of_2(-(-length // SPLITS)), MOST_WEIGHTS // held))


def add_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    a: tuple[torch.Tensor, ...],
    b: tuple[torch.Tensor, ...],
    slot_of: torch.Tensor,
    present: torch.Tensor,
    scratch: TokenScratch,
) -> None:
    """Adds the adapters' part to y.

    x is [tokens, hidden], of at most FEW_TOKENS tokens. y is [tokens, columns of all slices]. a[i]
    is [slots, 1, rank, hidden] and b[i] is [slots, 1, columns of slice i, rank]. slot_of[token] is
    the slot of a token's adapter, -1 for the base model. present[slot] tells which slices of this
    layer have weights there, and of what rank (presence.py).
    """
    tokens, hidden = x.shape
    rank, columns = a[0].shape[-2], [t.shape[-2] for t in b]
    held = padded_rank(rank)
    if scratch.words.size(2) < held or len(scratch.launches) < tokens * len(b):
        raise ValueError(f"the scratch is too small for {tokens} tokens of rank {rank}")
    _lora_tokens[(tokens * len(b) * SPLITS,)](
        x,
        x.stride(0),
        y,
        y.stride(0),
        a,
        b,
        scratch.words,
        scratch.launches,
        slot_of,
        present,
        HIDDEN=hidden,
        RANK=rank,
        PADDED_RANK=held,
        SLICES=len(b),
        COLUMNS=tuple(columns),
        BEGINS=tuple(itertools.accumulate(columns, initial=0)),
        RANK_AT=RANK_AT,
        WORDS=scratch.words.size(2),
        SPLITS=SPLITS,
        SLOTS=len(present),
        PADDED_SLOTS=triton.next_power_of_2(len(present)),
        BLOCK_K=_share(hidden, held),
        BLOCK_N=_share(max(columns), held),
        **_overlap(y.device),
        num_warps=4 if held <= 128 else 8,
    )


@functools.cache
def _overlap(device: torch.device) -> dict[str, bool]:
    """The arguments that let a launch begin while the one before it ends."""
    can = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
    return {"PDL": True, "launch_pdl": True} if can else {"PDL": False}


@triton.jit
def _weights(
    b,
    rank,
    n,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    PADDED_RANK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """B's values of the columns from n on: [BLOCK_N, PADDED_RANK]."""
    column, at = tl.arange(0, PADDED_RANK), n + tl.arange(0, BLOCK_N)
    there = (at < COLUMNS)[:, None] & (column < rank)[None, :]
    return tl.load(b + at[:, None] * RANK + column[None, :], mask=there, other=0.0)


@triton.jit
def _shrinks(a, rank, k, HIDDEN: tl.constexpr, PADDED_RANK: tl.constexpr, BLOCK_K: tl.constexpr):
    """A's values of the hidden dimension from k on: [PADDED_RANK, BLOCK_K]."""
    row, at = tl.arange(0, PADDED_RANK), k + tl.arange(0, BLOCK_K)
    there = (row < rank)[:, None] & (at < HIDDEN)[None, :]
    return tl.load(a + row[:, None] * HIDDEN + at[None, :], mask=there, other=0.0)


@triton.jit
def _slice(
    x,
    y,
    a,
    b,
    words,
    launches,
    rank,
    part,
    HIDDEN: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    PADDED_RANK: tl.constexpr,
    WORDS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program's share of a slice of a token. x is the token's, y begins with the slice's columns,
    and a and b are of the token's adapter, of this rank.
    """
    row = tl.arange(0, PADDED_RANK)
    SHARE: tl.constexpr = ((HIDDEN + BLOCK_K - 1) // BLOCK_K + SPLITS - 1) // SPLITS * BLOCK_K

    first = part * BLOCK_N
    end = min(HIDDEN, (part + 1) * SHARE)
    weights = _weights(b, rank, first, COLUMNS, RANK, PADDED_RANK, BLOCK_N)
    shrinks = _shrinks(a, rank, part * SHARE, HIDDEN, PADDED_RANK, BLOCK_K)
    if PDL:
        gdc_wait()
    launch = tl.load(launches) + 1
    products = tl.zeros((PADDED_RANK, BLOCK_K), dtype=tl.float32)
    for k in range(part * SHARE, end, BLOCK_K):
        at = k + tl.arange(0, BLOCK_K)
        inputs = tl.load(x + at, mask=at < HIDDEN, other=0.0)
        products += shrinks.to(tl.float32) * inputs[None, :].to(tl.float32)
        if SHARE > BLOCK_K:
            shrinks = _shrinks(a, rank, k + BLOCK_K, HIDDEN, PADDED_RANK, BLOCK_K)
    product = tl.sum(products, 1)
    at = first + tl.arange(0, BLOCK_N)
    before = tl.load(y + at, mask=at < COLUMNS, other=0.0)

    sent = product.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    sent |= launch.to(tl.int64) << 32
    tl.store(words + part * WORDS + row, sent, cache_modifier=".cg")
    of_all = words + tl.arange(0, SPLITS)[:, None] * WORDS + row[None, :]
    shrunk = product
    waits = 1
    while waits != 0:
        word = tl.load(of_all, volatile=True)
        waits = tl.max(tl.where((word >> 32).to(tl.int32) != launch, 1, 0))
        shrunk = tl.sum(word.to(tl.int32).to(tl.float32, bitcast=True), 0)
    # Nobody reads the number of this launch any more: whoever has sent a word has read it.
    tl.store(launches, launch, mask=part == SPLITS - 1)
    narrow = shrunk.to(b.dtype.element_ty).to(tl.float32)[None, :]

    for n in range(first, COLUMNS, SPLITS * BLOCK_N):
        at = n + tl.arange(0, BLOCK_N)
        added = tl.sum(weights.to(tl.float32) * narrow, 1)
        tl.store(y + at, (before + added).to(y.dtype.element_ty), mask=at < COLUMNS)
        if SPLITS * BLOCK_N < COLUMNS:
            after = at + SPLITS * BLOCK_N
            weights = _weights(b, rank, n + SPLITS * BLOCK_N, COLUMNS, RANK, PADDED_RANK, BLOCK_N)
            before = tl.load(y + after, mask=after < COLUMNS, other=0.0)


@triton.jit
def _lora_tokens(
    x,
    x_stride,
    y,
    y_stride,
    a,
    b,
    words,
    launches,
    slot_of,
    present,
    HIDDEN: tl.constexpr,
    RANK: tl.constexpr,
    PADDED_RANK: tl.constexpr,
    SLICES: tl.constexpr,
    COLUMNS: tl.constexpr,
    BEGINS: tl.constexpr,
    RANK_AT: tl.constexpr,
    SLOTS: tl.constexpr,
    PADDED_SLOTS: tl.constexpr,
    WORDS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    group = tl.program_id(0) // SPLITS
    part = tl.program_id(0) % SPLITS
    token = (group // SLICES).to(tl.int64)

    slot = tl.load(slot_of + token).to(tl.int64)
    index = tl.arange(0, PADDED_SLOTS)
    of_each = tl.load(present + index, mask=index < SLOTS, other=0)
    has = tl.sum(tl.where(index == slot, of_each, 0), 0)  # loaded beside the slot, not after it
    rank = tl.minimum((has >> RANK_AT) & 0xFFFF, RANK)
    for s in tl.static_range(SLICES):
        if (group % SLICES == s) & ((has >> s) & 1 != 0):
            _slice(
                x + token * x_stride,
                y + token * y_stride + BEGINS[s],
                a[s] + slot * RANK * HIDDEN,
                b[s] + slot * COLUMNS[s] * RANK,
                words + group * SPLITS * WORDS,
                launches + group,
                rank,
                part,
                HIDDEN,
                COLUMNS[s],
                RANK,
                PADDED_RANK,
                WORDS,
                SPLITS,
                BLOCK_K,
                BLOCK_N,
                PDL,
            )
    if PDL:
        gdc_wait()
