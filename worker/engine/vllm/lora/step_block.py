"""Shell. What the layers with adapters read about a step, in one block on the GPU. It is made on
the host, and brought there by one copy that nobody waits for.

vLLM's own tensors of a `PunicaWrapperGPU` become views of the block, with the values that its
`update_metadata` writes, so its other layers (experts, embeddings, heads) go on as before.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Collection, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from worker.engine.vllm.lora.step_metadata import (
    LARGE_ROWS,
    SMALL_ROWS,
    SMALL_TOKENS,
    Ints,
    TokenGroups,
    most_tiles,
    slots_of,
)

ALIGN = 32
"""int32 values. Triton compiles a kernel anew for addresses of another alignment."""


INDICES = (
    "_token_lora_indices",
    "_sampler_indices",
    "_sampler_indices_padded",
    "_embeddings_indices",
)
META = (
    "token_lora_mapping",
    "token_indices_sorted_by_lora_ids",
    "active_lora_ids",
    "num_tokens_per_lora",
    "lora_token_start_loc",
)


class StepMapping(Protocol):
    """vLLM's LoRAMapping: the adapter's id of each token, and of each token that is sampled."""

    index_mapping: Sequence[int]
    prompt_mapping: Sequence[int]


class StepBlock:
    """`tiles`: slot and tokens of each small tile, and of each large one."""

    def __init__(self, wrapper: Any, slots: int) -> None:
        """`wrapper`: vLLM's PunicaWrapperGPU, before any graph has its tensors' addresses."""
        self._wrapper = wrapper
        self._places: dict[str, tuple[int, torch.dtype, tuple[int, ...]]] = {}
        self._size = 0
        meta = {"token": wrapper.token_mapping_meta, "prompt": wrapper.prompt_mapping_meta}
        old: dict[str, torch.Tensor] = {name: getattr(wrapper, name) for name in INDICES}
        old |= {f"{of}.{name}": getattr(m, name) for of, m in meta.items() for name in META}
        for name, tensor in old.items():
            self._place(name, tensor.dtype, tuple(tensor.shape))
        tokens = len(wrapper._token_lora_indices)
        for rows, most in ((SMALL_ROWS, min(tokens, SMALL_TOKENS)), (LARGE_ROWS, tokens)):
            tiles = most_tiles(most, slots, rows)
            self._place(f"slots of {rows}", torch.int32, (tiles,))
            self._place(f"tiles of {rows}", torch.int32, (tiles, rows))
        self._block = torch.full((self._size,), -1, dtype=torch.int32, device=wrapper.device)
        on_device = {name: self._view(self._block, name) for name in self._places}
        for name, tensor in old.items():
            on_device[name].copy_(tensor)
            of, _, attribute = name.rpartition(".")
            setattr(meta[of] if of else wrapper, attribute, on_device[name])
        self.tiles = [
            on_device[f"{part} of {rows}"]
            for rows in (SMALL_ROWS, LARGE_ROWS)
            for part in ("slots", "tiles")
        ]

    def update(
        self, mapping: StepMapping, id_of: Sequence[int | None], max_loras: int, vocab_size: int
    ) -> Collection[int]:
        """Brings a step's values to the GPU. `id_of` has the adapter's id of each slot. Returns the
        slots that the step uses. Raises KeyError for an adapter that is in no slot.
        """
        tokens = slots_of(mapping.index_mapping, id_of)
        prompts = slots_of(mapping.prompt_mapping, id_of)
        # The allocator of pinned memory keeps it until the copy is done.
        host = torch.empty(self._size, dtype=torch.int32, pin_memory=self._block.is_cuda)
        host.numpy().fill(-1)  # torch would wake its threads for it
        values = self._parts(host.numpy())
        self._write_indices(values, tokens, prompts, max_loras, vocab_size)
        groups = self._write_meta(values, "token", tokens)
        self._write_meta(values, "prompt", prompts)
        # A step of few tokens may be made longer, up to a graph's size, so it has both kinds.
        for rows in (SMALL_ROWS, LARGE_ROWS) if len(tokens) <= SMALL_TOKENS else (LARGE_ROWS,):
            slots, tiles = groups.tiles(rows)
            values[f"slots of {rows}"][: len(slots)] = slots
            values[f"tiles of {rows}"][: len(slots)] = tiles
        self._block.copy_(host, non_blocking=True)
        return [slot for slot in groups.slots.tolist() if slot >= 0]

    def _place(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self._places[name] = self._size, dtype, shape
        words = math.prod(shape) * dtype.itemsize // 4
        self._size += -(-words // ALIGN) * ALIGN

    def _view(self, block: torch.Tensor, name: str) -> torch.Tensor:
        at, dtype, shape = self._places[name]
        words = math.prod(shape) * dtype.itemsize // 4
        return block[at : at + words].view(dtype).view(shape)

    def _parts(self, block: Ints) -> dict[str, np.ndarray[Any, Any]]:
        """The same of all places, on the host."""
        return {
            name: block[at : at + math.prod(shape) * dtype.itemsize // 4]
            .view(np.int64 if dtype is torch.int64 else np.int32)
            .reshape(shape)
            for name, (at, dtype, shape) in self._places.items()
        }

    def _write_indices(
        self,
        values: dict[str, np.ndarray[Any, Any]],
        tokens: Ints,
        prompts: Ints,
        max_loras: int,
        vocab_size: int,
    ) -> None:
        count = len(prompts)
        values["_token_lora_indices"][: len(tokens)] = tokens
        values["_sampler_indices"][:count] = prompts
        values["_sampler_indices_padded"][:count] = np.arange(count) + count * np.where(
            prompts < 0, max_loras - 1, prompts
        )
        # Rows that only fill up a graph are looked up in the embeddings, too.
        values["_embeddings_indices"][:] = 0
        values["_embeddings_indices"][: len(tokens)] = (
            np.maximum(tokens, 0).astype(np.int64) * vocab_size
        )
        self._wrapper.indices_len[:] = [len(tokens), count, count, len(tokens)]

    def _write_meta(
        self, values: dict[str, np.ndarray[Any, Any]], of: str, slots: Ints
    ) -> TokenGroups:
        meta = getattr(self._wrapper, f"{of}_mapping_meta")
        groups = TokenGroups.of(slots)
        found = len(groups.slots) if (slots >= 0).any() else 0
        meta.no_lora_flag_cpu[0] = not found
        counts = meta.captured_lora_counts
        at = bisect.bisect_left(counts, found) if found else len(counts)
        meta.num_active_loras_cpu[0] = counts[at] if at < len(counts) else found
        values[f"{of}.token_lora_mapping"][: len(slots)] = slots
        values[f"{of}.token_indices_sorted_by_lora_ids"][: len(slots)] = groups.order
        values[f"{of}.active_lora_ids"][:found] = groups.slots[:found]
        for name in ("num_tokens_per_lora", "lora_token_start_loc"):
            values[f"{of}.{name}"][:] = 0
        values[f"{of}.num_tokens_per_lora"][:found] = groups.counts[:found]
        values[f"{of}.lora_token_start_loc"][1 : found + 1] = np.cumsum(groups.counts[:found])
        return groups
