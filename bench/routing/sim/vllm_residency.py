"""Pure. Adapters on a worker as vLLM itself keeps them, for the comparison with Ray, whose replicas
leave them to it.

vLLM's scheduler lets into the batch whoever is first in its queue and asks for an adapter that is
running, or for any while fewer than `max_loras` run; the others are passed over until one falls
empty, however long that takes. Slots and host memory are two LRU caches.
"""

from __future__ import annotations

from collections.abc import Collection

from shared.adapters.identity import AdapterRef
from worker.adapters.residency import Instruction, Residency
from worker.adapters.slot_table import Full, SlotOffer


class VllmResidency(Residency):
    """The production state machine with vLLM's choices: who is next, who makes room, and nobody
    closes a slot.
    """

    def __init__(self, slots: int, host_places: int) -> None:
        super().__init__(slots, host_places)
        self._used: dict[AdapterRef, int] = {}
        self._uses = 0

    def want(self, request: int, adapter: AdapterRef, now: float) -> list[Instruction]:
        self._uses += 1
        self._used[adapter] = self._uses
        return super().want(request, adapter, now)

    def tick(self, now: float) -> list[Instruction]:
        return []

    def _in_order(self) -> list[AdapterRef]:
        return [] if isinstance(self.slots.room(), Full) else sorted(self._line, key=self._oldest)

    def _room(
        self,
        kept: Collection[AdapterRef],
        now: float,
        per_s: float = 0.0,
        coming: Collection[AdapterRef] = (),
    ) -> SlotOffer:
        return self.slots.room(coming, self._warmth)

    def _kept(self, now: float) -> set[AdapterRef]:
        return set()

    def _warmth(self, adapter: AdapterRef) -> float:
        return self._used[adapter]
