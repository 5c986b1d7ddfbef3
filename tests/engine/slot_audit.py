"""Shell. Runs inside vLLM's worker: how often recorded copies were repeated, and whether the slots
hold the bits that vLLM alone would have put there.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.request import LoRARequest

from worker.engine.vllm.tensor_replay.slot_writer import SlotCopies

repeated: list[int] = []


def begin(worker: Any) -> None:
    run = SlotCopies.run

    def counted(copies: SlotCopies, block: torch.Tensor) -> None:
        repeated.append(len(block))
        run(copies, block)

    SlotCopies.run = counted  # type: ignore[method-assign]


def audit(worker: Any, folders: dict[int, str]) -> tuple[int, list[int | None], bool, bool]:
    """The copies repeated, the adapters in the slots, whether all bits are vLLM's, and whether they
    differ from slot to slot.
    """
    slots = worker._loraplex()
    manager, held = slots.manager, list(slots.manager.lora_index_to_id)
    ours = bits(manager)
    for module in manager.modules.values():
        module.__dict__.pop("reset_lora", None)  # ours; the class has vLLM's
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
    return len(repeated), held, same, any(not torch.equal(a[0], a[1]) for a in ours)


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
