"""Shell. Runs inside vLLM's worker. It counts how often recorded copies were repeated, and checks
that the slots hold the bits that vLLM alone would have put there. What a GPU's kernels are told of
the slots is checked, too.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.request import LoRARequest

from worker.engine.vllm.lora import gpu_lora
from worker.engine.vllm.lora.presence import RANK_AT, Presence
from worker.engine.vllm.tensor_replay.slot_writer import SlotCopies

repeated: list[int] = []


def begin(worker: Any) -> None:
    run = SlotCopies.run

    def counted(copies: SlotCopies, block: torch.Tensor) -> None:
        repeated.append(len(block))
        run(copies, block)

    SlotCopies.run = counted  # type: ignore[method-assign]
    slots = worker._loraplex()
    layers, count = adapted_layers(slots.manager), slots.manager.lora_slots
    slots.writer._presence = Presence(layers, count)


def audit(
    worker: Any, folders: dict[int, str]
) -> tuple[int, list[int | None], bool, bool, list[int]]:
    """Returns five things: how many copies were repeated, the adapters in the slots, whether all
    bits are vLLM's, whether the bits differ from slot to slot, and of how many slices with weights
    in a slot the kernels are not told, or not of all ranks, and are told.
    """
    slots = worker._loraplex()
    told = told_and_there(slots)
    manager, held = slots.manager, list(slots.manager.lora_index_to_id)
    ours = bits(manager)
    for module in manager.modules.values():
        module.__dict__.pop("reset_lora", None)  # ours; the class still has vLLM's function
        for slot in range(len(held)):
            module.reset_lora(slot)
    worker.model_runner.lora_manager._lora_model_cls = LoRAModel
    for int_id in filter(None, held):
        slots.remove(int_id)
    for int_id in filter(None, held):
        worker.model_runner.lora_manager.add_adapter(
            LoRARequest(f"again{int_id}", int_id, folders[int_id])
        )
    theirs = bits(manager)
    same = len(ours) == len(theirs) > 0 and all(
        torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)
    )
    return len(repeated), held, same, any(not torch.equal(a[0], a[1]) for a in ours), told


def staged(worker: Any) -> list[int]:
    """The adapters that were read and wait for a slot."""
    return sorted(worker._loraplex().staging._ready)


def told_of_heads(worker: Any) -> list[int]:
    """In how many slots an adapter has a head, and of how many of them the kernels are told."""
    slots = worker._loraplex()
    presence, heads = slots.writer._presence, gpu_lora.heads(slots.manager)
    (row,) = {presence.row(a[0]) for a, _ in heads}
    there = [bool(b[0][slot].any()) for _, b in heads for slot in range(slots.manager.lora_slots)]
    return [sum(there), int(presence.on_device[row].ne(0).sum())]


def adapted_layers(manager: Any) -> list[tuple[Any, Any]]:
    return gpu_lora.linear_layers(manager) + gpu_lora.heads(manager)


def told_and_there(slots: Any) -> list[int]:
    presence, missed, both = slots.writer._presence, 0, 0
    for row, (a, b) in enumerate(adapted_layers(slots.manager)):
        for slot, int_id in enumerate(slots.manager.lora_index_to_id):
            for i, one in enumerate(b):
                if int_id is not None:
                    said = int(presence.on_device[row, slot])
                    rank = said >> RANK_AT & 0xFFFF
                    beyond = a[i][slot, 0, rank:].any() or one[slot, 0, :, rank:].any()
                    told = bool(said >> i & 1 and not beyond)
                    there = bool(one[slot].any())
                    missed, both = missed + (there and not told), both + (there and told)
    return [missed, both]


def bits(manager: Any) -> list[torch.Tensor]:
    stacked = [
        held
        for module in manager.modules.values()
        for held in (module.lora_a_stacked, module.lora_b_stacked)
    ]
    return [
        tensor.clone()
        for held in stacked
        for tensor in ([held] if isinstance(held, torch.Tensor) else held)
    ]
