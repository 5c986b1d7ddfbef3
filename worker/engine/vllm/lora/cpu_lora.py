"""Shell. LoRA layers on CPUs, in place of vLLM 0.32's. The rows of one adapter are computed
together, so each adapter's weights are read once per step and layer.

vLLM's CPU kernels copy an adapter's weights once for every token of the batch, even for tokens of
the base model. Here a step without any adapter costs nothing. With adapters, the rows of a batch
are ordered by slot once per step. The rows of a slot then take two plain matrix products, and the
weights stay where they are. For few rows of small layers the calls would cost more than the
arithmetic. Such rows are multiplied with the weights of all slots at once, and the products of
other slots are masked to zero. `make bench-micro` measures both (test_cpu_lora_cost.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

CALLS_WORTH = 300_000
"""Multiplications that take as long as the calls for one more slot. Those calls take about 10
microseconds, and one core with AVX-512 does 30 multiplications per nanosecond.
"""


class Rows:
    """The rows of one step, grouped by slot.

    `order` is a permutation that makes the rows of each slot neighbours (None: all rows are of one
    slot or of none). `parts` are (slot, first row, end row) in that order. Rows of the base model
    are in no part.
    """

    __slots__ = ("_mask", "_slots", "order", "parts")

    def __init__(self, slots: Sequence[int]) -> None:
        self._slots = slots
        self._mask: torch.Tensor | None = None
        counts: dict[int, int] = {}
        for slot in slots:
            if slot >= 0:
                counts[slot] = counts.get(slot, 0) + 1
        self.parts: list[tuple[int, int, int]] = []
        at = 0
        for slot in sorted(counts):
            self.parts.append((slot, at, at + counts[slot]))
            at += counts[slot]
        self.order: torch.Tensor | None = None
        if self.parts and (len(self.parts) > 1 or at < len(slots)):
            self.order = torch.tensor(
                sorted((n for n, s in enumerate(slots) if s >= 0), key=slots.__getitem__)
            )

    def mask(self, slots: int) -> torch.Tensor:
        """A tensor [rows, slots, 1] that is 1 where the row belongs to the slot, else 0."""
        if self._mask is None:
            own = torch.tensor(self._slots).unsqueeze(1)
            self._mask = (own == torch.arange(slots)).to(torch.float32).unsqueeze(2)
        return self._mask


def add(
    y: torch.Tensor,
    x: torch.Tensor,
    a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor],
    scale: float,
    sizes: Sequence[int],
    rows: Rows,
) -> None:
    """Computes y += scale x (x A') B' in place, with each row's own A and B.

    Shapes: x [rows, in], y [rows, sum of sizes], each a [slots, 1, rank, in], each b [slots, 1,
    size, rank]. The product with A is made in float32 whatever the model's type, as in vLLM.
    """
    if not rows.parts:
        return
    if _few(x, y, a[0], b[0], rows):
        _add_masked(y, x, a, b, scale, sizes, rows)
    else:
        add_by_slot(y, x, a, b, scale, sizes, rows)


def _few(x: torch.Tensor, y: torch.Tensor, a: torch.Tensor, b: torch.Tensor, rows: Rows) -> bool:
    """Whether multiplying every row with all slots is less work than one call per slot."""
    slots, _, rank, size_in = a.shape
    if not (x.dtype is y.dtype is a.dtype is b.dtype is torch.float32) or b.is_inference():
        return False
    return bool(
        x.size(0) * (slots - 1) * rank * (size_in + b.size(2)) < CALLS_WORTH * len(rows.parts)
    )


def _add_masked(
    y: torch.Tensor,
    x: torch.Tensor,
    a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor],
    scale: float,
    sizes: Sequence[int],
    rows: Rows,
) -> None:
    slots, _, rank, size_in = a[0].shape
    mask, offset = rows.mask(slots), 0
    for a_slots, b_slots, size in zip(a, b, sizes, strict=True):
        shrunk = x @ a_slots.view(slots * rank, size_in).t()
        shrunk.view(-1, slots, rank).mul_(mask)
        y[:, offset : offset + size].addmm_(shrunk, _sideways(b_slots), alpha=scale)
        offset += size


def _sideways(b: torch.Tensor) -> torch.Tensor:
    """b as [slots x rank, size], from [slots, 1, size, rank]. It is made again when a slot was
    written.
    """
    version = b._version
    held: tuple[int, torch.Tensor] | None = getattr(b, "loraplex_sideways", None)
    if held is None or held[0] != version:
        held = (version, b[:, 0].permute(0, 2, 1).reshape(-1, b.size(2)).contiguous())
        b.loraplex_sideways = held
    return held[1]


def add_by_slot(
    y: torch.Tensor,
    x: torch.Tensor,
    a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor],
    scale: float,
    sizes: Sequence[int],
    rows: Rows,
) -> None:
    """Like `add`, always with one call per slot. The batch has rows of at least one slot."""
    mine = x if rows.order is None else x.index_select(0, rows.order)
    precise = mine if mine.dtype is torch.float32 else mine.float()
    offset = 0
    for a_slots, b_slots, size in zip(a, b, sizes, strict=True):
        target = y[:, offset : offset + size]
        offset += size
        if rows.order is None:
            target.add_(_one(precise, a_slots, b_slots, rows.parts[0][0], y.dtype), alpha=scale)
            continue
        out = torch.empty((mine.size(0), size), dtype=y.dtype)
        for slot, first, behind in rows.parts:
            torch.mm(
                _shrunk(precise[first:behind], a_slots, slot, y.dtype),
                b_slots[slot, 0].t().to(y.dtype),
                out=out[first:behind],
            )
        target.index_add_(0, rows.order, out, alpha=scale)


def _one(
    x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, slot: int, dtype: torch.dtype
) -> torch.Tensor:
    return torch.mm(_shrunk(x, a, slot, dtype), b[slot, 0].t().to(dtype))


def _shrunk(x: torch.Tensor, a: torch.Tensor, slot: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.mm(x, a[slot, 0].t().to(x.dtype)).to(dtype)


def install() -> None:
    """Replaces vLLM's layers in this process. Every process that runs the model on a CPU calls it.
    A second call does nothing.
    """
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    if getattr(PunicaWrapperCPU, "loraplex", False):
        return
    theirs = PunicaWrapperCPU.update_metadata

    def update_metadata(self: Any, *args: Any, **more: Any) -> None:
        theirs(self, *args, **more)
        self.rows = Rows(self.token_lora_indices.tolist())

    def add_lora_linear(
        self: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **_: Any,
    ) -> None:
        add(
            y.view(-1, y.size(-1)),
            x.view(-1, x.size(-1)),
            lora_a_stacked,
            lora_b_stacked,
            scale,
            output_slices,
            self.rows,
        )

    PunicaWrapperCPU.update_metadata = update_metadata
    PunicaWrapperCPU.add_lora_linear = add_lora_linear
    PunicaWrapperCPU.loraplex = True
