"""Shell. What the kernels for adapters need to know of a step: which slot each token uses, and the
tiles of tokens that share a slot.

vLLM 0.32 finds this out on the GPU (torch.sort, torch.unique), and so waits four times for the step
before to end. That costs an engine that works ahead of its GPU its lead, whenever a request comes
or goes. The slots are known on the host. Here all is made there, in a block that one copy brings to
the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]


SMALL_TOKENS = 512
"""Tokens of the largest of vLLM's CUDA graphs. Steps of up to so many tokens have small tiles."""
SMALL_ROWS, LARGE_ROWS = 16, 64
"""Tokens of a tile: as an engine decodes (many adapters, few tokens each; tensor cores multiply no
fewer rows), and as it reads prompts.
"""


def rows_of_a_tile(tokens: int) -> int:
    """The rows of the tiles that a launch for so many tokens uses."""
    return SMALL_ROWS if tokens <= SMALL_TOKENS else LARGE_ROWS


def most_tiles(tokens: int, slots: int, rows: int) -> int:
    """The most tiles that `tokens` tokens of up to `slots` adapters can have."""
    return min(tokens, tokens // rows + slots)


@dataclass(frozen=True, slots=True)
class TokenGroups:
    """Tokens by their slot. `order` has them sorted; `slots`, `counts` and `starts` have, for each
    slot in use (-1: the base model), how many there are and where they begin in `order`.
    """

    order: Ints
    slots: Ints
    counts: Ints
    starts: Ints

    @staticmethod
    def of(slot_of: Ints) -> TokenGroups:
        """`slot_of`: the slot of each token, -1 for the base model."""
        order = np.argsort(slot_of.astype(np.int16), kind="stable").astype(np.int32)
        each = np.bincount(slot_of + 1)
        (used,) = each.nonzero()
        counts: Ints = each[used].astype(np.int32)
        starts: Ints = (np.cumsum(counts) - counts).astype(np.int32)
        return TokenGroups(order, (used - 1).astype(np.int32), counts, starts)

    def tiles(self, rows: int) -> tuple[Ints, Ints]:
        """The slot of each tile, and its tokens: int32 [tiles] and [tiles, rows], -1 where a tile
        is not full. Tokens of the base model are in none.
        """
        adapted = self.slots >= 0
        slots, counts, starts = self.slots[adapted], self.counts[adapted], self.starts[adapted]
        tiles = -(-counts // rows)
        ends = np.cumsum(tiles)
        count = int(ends[-1]) if len(ends) else 0
        rows_of = np.full(count * rows, -1, np.int32)
        begin = int(starts[0]) if len(starts) else len(self.order)
        shift = np.repeat((ends - tiles) * rows - starts, counts)
        rows_of[np.arange(begin, len(self.order)) + shift] = self.order[begin:]
        return np.repeat(slots, tiles), rows_of.reshape(count, rows)


def slots_of(ids: Sequence[int], id_of: Sequence[int | None]) -> Ints:
    """The slot of each of these adapter ids; 0 is the base model (-1). `id_of` has the id of each
    slot. Raises KeyError for an id that is in no slot.
    """
    slot_by_id = sorted([(0, -1), *((i, slot) for slot, i in enumerate(id_of) if i is not None)])
    known, slots = (np.array(column) for column in zip(*slot_by_id, strict=True))
    wanted = np.asarray(ids, dtype=np.int64)
    at = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    if (known[at] != wanted).any():
        raise KeyError(f"no slot has the adapter {wanted[known[at] != wanted][0]}")
    found: Ints = slots.astype(np.int32)[at]
    return found
