"""Shell. Which slices of which linear layers have adapter weights in which slot, and of what rank,
for the GPU's kernels and for the host.

An adapter of q, k, v and o has no weights for the MLP's layers. Where no adapter of a step has
weights for a layer, that layer costs what it costs without adapters. An adapter whose rank is less
than `max_lora_rank` costs little more than its own rank.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch

RANK_AT = 16
"""The bit at which a rank begins. Below are the bits of the slices."""


class Presence:
    """`on_device` is int32 [layers + 1, slots]. Bit i of [layer, slot] tells whether slice i has
    weights in that slot. From bit RANK_AT on it has the largest rank of these weights. The last row
    is of layers that are not known: they may have any.

    Before anything was written, everything counts as present: vLLM measures and captures its graphs
    with adapters that it does not put into slots.
    """

    def __init__(
        self, layers: Iterable[tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]], slots: int
    ) -> None:
        """`layers`: the A and the B of each layer's slices, each [slots, 1, ...]."""
        self._row: dict[int, int] = {}  # address of a layer's first A -> its row
        self._bits: dict[int, list[tuple[int, int]]] = {}  # address of a B -> rows and bits
        device = torch.device("cpu")
        for a, b in layers:
            if len(b) > RANK_AT:
                continue  # more slices than bits: it stays unknown
            row = self._row.setdefault(a[0].data_ptr(), len(self._row))
            device = a[0].device
            for i, one in enumerate(b):
                self._bits.setdefault(one.untyped_storage().data_ptr(), []).append((row, 1 << i))
        self._host = torch.full((len(self._row) + 1, slots), -1, dtype=torch.int32)
        self.on_device = self._host.to(device)

    def __len__(self) -> int:
        return len(self._host)

    def row(self, a: torch.Tensor) -> int:
        """The row of the layer whose first A this is."""
        return self._row.get(a.data_ptr(), len(self._row))

    def write(self, slot: int, columns: Mapping[int, int] | None) -> None:
        """Slot `slot` has weights in the buffers with these storages' addresses, and in no others.
        `columns` says how many columns were written: those of a B are its rank. None: it may have
        some in any, since what is left out here answers like the base.
        """
        bits, ranks = [0] * len(self._row), [0] * len(self._row)
        for storage, rank in (columns or {}).items():
            for row, bit in self._bits.get(storage, ()):
                bits[row] |= bit
                ranks[row] = max(ranks[row], rank)
        values = [b | r << RANK_AT for b, r in zip(bits, ranks, strict=True)]
        self._host[:-1, slot] = torch.tensor(
            [-1] * len(values) if columns is None else values, dtype=torch.int32
        )
        self.on_device.copy_(self._host, non_blocking=True)

    def wanted(self, slots: Collection[int]) -> torch.Tensor:
        """bool [layers + 1]: whether an adapter in one of these slots has weights for the layer."""
        return self._host[:, list(slots)].ne(0).any(1)
