"""Shell. Writing adapters into slots. The copies that vLLM makes for the first adapter of a layout
are recorded, and repeated for the next ones in a few calls.

A `CopyTarget` is where a part of an adapter's block goes, in any slot. `SlotCopies` are the copies
of a whole block into one slot.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from worker.engine.vllm.lora import gpu_lora
from worker.engine.vllm.tensor_replay.file_templates import EMPTY_LAYOUT, BlockLayout

PAUSE_S = 0.002
MAX_LAYOUTS = 8
"""Layouts whose copies are remembered. Each costs about 800 bytes per tensor and slot."""


@dataclass(frozen=True, slots=True)
class CopyTarget:
    """Where a part of the block goes: the buffer's number, the offset in the slot's row of that
    buffer, shape and strides. `source_at` is where the part lies in the block.
    """

    buffer: int
    at: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    source_strides: tuple[int, ...]
    source_at: int


@dataclass(frozen=True, slots=True)
class SlotCopies:
    """The copies of a block into one slot. The block goes to the device in one piece, the `stage`.
    The sources are views of the stage, and the targets are views of the buffers.
    """

    stage: torch.Tensor
    # (targets, sources): one pair for the dense ones, one for the others
    pairs: tuple[tuple[list[torch.Tensor], list[torch.Tensor]], ...]

    def run(self, block: torch.Tensor) -> None:
        """Copies the block into the slot."""
        self.stage.copy_(block, non_blocking=True)
        for targets, sources in self.pairs:
            torch._foreach_copy_(targets, sources)


class SlotWriter:
    """Writes adapters into slots, and knows the layout of what lies in each slot.

    vLLM zeroes every buffer of every module before it writes what the adapter has. Here the slot's
    rows are zeroed in one call. They are not zeroed at all if the next adapter overwrites exactly
    what the last one wrote.
    """

    def __init__(self, manager: Any) -> None:
        """Must be made while all slots are empty."""
        self._manager = manager
        self._holds: list[BlockLayout | None] = [None] * manager.lora_slots
        self._known: OrderedDict[
            int, tuple[BlockLayout, list[CopyTarget], dict[int, SlotCopies]]
        ] = OrderedDict()
        self._presence = gpu_lora.presence()
        self._stage: torch.Tensor | None = None
        self._buffers = _buffers(manager)
        self._storages = [b.untyped_storage().data_ptr() for b in self._buffers or ()]
        if self._buffers is not None:
            for buffer in self._buffers:
                buffer.zero_()
            for module in manager.modules.values():
                module.reset_lora = _zero_already
            self._holds = [EMPTY_LAYOUT] * manager.lora_slots

    def activate(self, int_id: int) -> bool:
        """Does what vLLM's activate_adapter does. Raises what that raises. Returns whether a layout
        became known, whose copies `make_next_copies` can make.
        """
        manager, learned = self._manager, False
        if int_id in manager._active_adapters:
            return False
        lora = manager.get_adapter(int_id)
        slot = manager.lora_index_to_id.index(None)
        layout = getattr(lora, "layout", None)
        held, self._holds[slot] = self._holds[slot], None
        copies = self._copies(layout, slot)
        if (
            self._buffers is not None
            and held is not EMPTY_LAYOUT
            and (copies is None or held is not layout)
        ):
            torch._foreach_zero_([buffer[slot] for buffer in self._buffers])
        if copies is not None:
            manager._active_adapters[int_id] = None
            manager.lora_index_to_id[slot] = int_id
            copies.run(lora.block)
            self._tell(
                slot, ((self._storages[p.buffer], p.shape[-1]) for p in self._known[id(layout)][1])
            )
        else:
            with WriteRecorder() as writes:
                manager.activate_adapter(int_id)
            written = ((t.untyped_storage().data_ptr(), t.shape[-1]) for t, _ in writes.copied)
            self._tell(slot, None if writes.other else written)
            if layout is not None and (places := self._places(writes, lora.block, slot)):
                self._known[id(layout)] = layout, places, {}
                learned = True
                with suppress(torch.OutOfMemoryError):
                    self._staged(layout.elements)  # here, because steps use the stage
                if len(self._known) > MAX_LAYOUTS:
                    self._known.popitem(last=False)
        self._holds[slot] = layout
        return learned

    def make_next_copies(self) -> bool:
        """Makes the copies into one slot, which takes a few ms. It is called in another thread than
        the steps, and leaves them the interpreter afterwards. Returns False if there are all.
        """
        for layout, places, copies_of in list(self._known.values()):
            slot = next((n for n in range(len(self._holds)) if n not in copies_of), None)
            if slot is not None:
                try:
                    copies_of[slot] = self._into(places, layout.elements, slot)
                except torch.OutOfMemoryError:
                    return False
                time.sleep(PAUSE_S)
                return True
        return False

    def _tell(self, slot: int, written: Iterable[tuple[int, int]] | None) -> None:
        """`written`: the storage of each copy's target, and its columns."""
        if self._presence is None:
            return
        columns: dict[int, int] = {}
        for storage, count in written or ():
            columns[storage] = max(count, columns.get(storage, 0))
        self._presence.write(slot, None if written is None else columns)

    def _copies(self, layout: BlockLayout | None, slot: int) -> SlotCopies | None:
        known = self._known.get(id(layout))  # a remembered layout is alive, so its id stays unique
        if known is None:
            return None
        self._known.move_to_end(id(layout))
        _, places, copies_of = known
        if slot not in copies_of:
            try:
                copies_of[slot] = self._into(places, known[0].elements, slot)
            except torch.OutOfMemoryError:
                return None  # vLLM's own way of writing needs no stage
        return copies_of[slot]

    def _into(self, places: list[CopyTarget], elements: int, slot: int) -> SlotCopies:
        assert self._buffers is not None
        stage = self._staged(elements)
        dense: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        spread: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for p in places:
            buffer = self._buffers[p.buffer]
            target = buffer.as_strided(
                p.shape, p.strides, buffer.storage_offset() + slot * buffer.stride(0) + p.at
            )
            source = stage.as_strided(p.shape, p.source_strides, p.source_at)
            targets, sources = (
                dense if target.is_contiguous() and source.is_contiguous() else spread
            )
            targets.append(target)
            sources.append(source)
        return SlotCopies(stage[:elements], tuple(pair for pair in (dense, spread) if pair[0]))

    def _staged(self, elements: int) -> torch.Tensor:
        """The stage, as large as the largest adapter so far. Older copies keep the smaller stage
        that they were made with.
        """
        if self._stage is None or len(self._stage) < elements:
            assert self._buffers is not None
            buffer = self._buffers[0]
            self._stage = torch.empty(
                1 << (elements - 1).bit_length(), dtype=buffer.dtype, device=buffer.device
            )
        return self._stage

    def _places(
        self, writes: WriteRecorder, block: torch.Tensor, slot: int
    ) -> list[CopyTarget] | None:
        """The targets of the recorded copies. None if something other than copies happened, or if a
        copy did not come from the block.
        """
        if self._buffers is None or writes.other or writes.zeroed:
            return None
        number = {storage: n for n, storage in enumerate(self._storages)}
        home = block.untyped_storage().data_ptr()
        places = []
        for target, source in writes.copied:
            n = number.get(target.untyped_storage().data_ptr())
            if (
                n is None
                or source.untyped_storage().data_ptr() != home
                or target.shape != source.shape
            ):
                return None
            buffer = self._buffers[n]
            at = target.storage_offset() - buffer.storage_offset() - slot * buffer.stride(0)
            if not 0 <= at < buffer.stride(0) or not target.dtype is source.dtype is block.dtype:
                return None
            places.append(
                CopyTarget(
                    n,
                    at,
                    tuple(target.shape),
                    target.stride(),
                    source.stride(),
                    source.storage_offset(),
                )
            )
        return places


def _buffers(manager: Any) -> list[torch.Tensor] | None:
    """The buffers whose first dimension is the slot, found by watching vLLM's own reset. None if
    that reset does more than set rows of them to zero.
    """
    with WriteRecorder() as writes:
        for module in manager.modules.values():
            module.reset_lora(0)
    found = [
        buffer
        for buffer, index in writes.zeroed
        if index == 0 and buffer.size(0) == manager.lora_slots
    ]
    own = {buffer.untyped_storage().data_ptr() for buffer in found}
    one = {(buffer.dtype, buffer.device) for buffer in found}
    plain = (
        not writes.other
        and not writes.copied
        and len(own) == len(found) == len(writes.zeroed)
        and len(one) == 1
    )
    return found if plain and not any(manager.lora_index_to_id) else None


def _zero_already(index: int) -> None:
    """Takes the place of a module's reset_lora, because the slot's rows are zero already."""


class WriteRecorder(TorchFunctionMode):  # type: ignore[misc]
    """Records the writes to tensors: (target, source) of each copy, (tensor, index) of what is set
    to zero, and whether there was any other write.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copied: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.zeroed: list[tuple[torch.Tensor, Any]] = []
        self.other = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "copy_":
            self.copied.append((args[0], args[1]))
        elif name == "__setitem__" and isinstance(args[2], int | float) and args[2] == 0:
            self.zeroed.append((args[0], args[1]))
        elif name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
            self.other = True
        return func(*args, **(kwargs or {}))
