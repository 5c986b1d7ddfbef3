"""Pure. Adapters on a worker as vLLM itself keeps them. It serves the comparison with Ray, whose
replicas leave the adapters to vLLM.

vLLM's scheduler admits the first request in its queue whose adapter is running. While fewer than
`max_loras` run, it admits a request for any adapter. The other requests are passed over until an
adapter runs no more, however long that takes. Slots and host memory are two LRU caches.
"""

from __future__ import annotations

from shared.adapters.identity import AdapterRef
from worker.adapters.residency import Instruction, Residency
from worker.adapters.slot_eviction import SlotEviction
from worker.adapters.slot_table import Full, SlotTable


class LastUse(SlotEviction):
    """The adapter whose last request came first makes room, and none is spared."""

    def __init__(self) -> None:
        super().__init__(lru=True)
        self._used: dict[AdapterRef, int] = {}
        self._uses = 0

    def note(self, adapter: AdapterRef, now: float) -> None:
        super().note(adapter, now)
        self._uses += 1
        self._used[adapter] = self._uses

    def warmth(self, adapter: AdapterRef) -> float:
        return self._used[adapter]

    def kept(self, slots: SlotTable, now: float) -> set[AdapterRef]:
        return set()


class VllmResidency(Residency):
    """The production state machine with vLLM's choices: who is next, who makes room, and no slot is
    closed.
    """

    def __init__(self, slots: int, host_places: int) -> None:
        super().__init__(slots, host_places)
        self._eviction = LastUse()

    def tick(self, now: float) -> list[Instruction]:
        return []

    def _in_order(self) -> list[AdapterRef]:
        return [] if isinstance(self.slots.room(), Full) else sorted(self._line, key=self._oldest)
