"""Shell. What Loraplex adds to vLLM's worker class (`worker_extension_cls`), called by name on every rank between engine steps."""

from __future__ import annotations

from typing import Any


class AdapterSlots:
    """Mixed into vLLM's worker. vLLM itself can only load into a slot or forget altogether (add_lora, remove_lora)."""

    model_runner: Any

    def loraplex_demote(self, int_id: int) -> bool:
        """Frees the adapter's slot and keeps its weights in host memory; False if it was in none. Never for one that is in flight."""
        manager = self.model_runner.lora_manager._adapter_manager
        return bool(manager.deactivate_adapter(int_id))

    def loraplex_slots(self) -> list[int]:
        """The adapters that are in a slot, as the engine sees it."""
        manager = self.model_runner.lora_manager._adapter_manager
        return [int_id for int_id in manager.lora_index_to_id if int_id is not None]
