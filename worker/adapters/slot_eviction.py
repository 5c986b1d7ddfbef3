"""Pure. Which adapter makes room for another one, in the slots and in host memory: the least
popular. Adapters in steady use are spared while they hold few of the slots.
"""

from __future__ import annotations

from collections.abc import Collection

from shared.adapters.identity import AdapterRef
from shared.link.messages import STEADY_PER_S, STEADY_SHARE
from worker.adapters.popularity import STEADY_FADE_S, Popularity
from worker.adapters.slot_table import Evict, Full, SlotOffer, SlotTable


class SlotEviction:
    """Counts the requests for each adapter and decides by them. With `lru` the least recently used
    adapter makes room, however popular it is.
    """

    def __init__(self, lru: bool) -> None:
        self._lru = lru
        self._popularity, self._recent = Popularity(), Popularity(STEADY_FADE_S)

    def note(self, adapter: AdapterRef, now: float) -> None:
        """Counts one request for the adapter."""
        self._popularity.note(adapter, now)
        self._recent.note(adapter, now)

    def warmth(self, adapter: AdapterRef) -> float:
        """The adapter with the least warmth makes room. Among equals it is the least recently used
        one.
        """
        return 0.0 if self._lru else self._popularity.of(adapter)

    def is_steady(self, adapter: AdapterRef, now: float) -> bool:
        """Whether the adapter is in steady use at present."""
        return self._recent.per_s(adapter, now) >= STEADY_PER_S

    def kept(self, slots: SlotTable, now: float) -> set[AdapterRef]:
        """The adapters in steady use, while they hold few of the slots, empty ones counted. One may
        always be kept where another slot is left.
        """
        if self._lru:
            return set()
        held = slots.adapters()
        pinned = {a for a in held if slots.pinned(a)}
        steady = {a for a in held if a not in pinned and self.is_steady(a, now)}
        free = slots.size - len(pinned)
        few = max(STEADY_SHARE * free, 1 if free > 1 else 0)
        return steady if len(steady) <= few else set()

    def room(
        self,
        slots: SlotTable,
        now: float,
        *,
        kept: Collection[AdapterRef],
        closing: Collection[AdapterRef],
        coming: Collection[AdapterRef] = (),
        wanted_by: AdapterRef | None = None,
    ) -> SlotOffer:
        """A slot for the adapter `wanted_by`, or for one that nobody asks for.

        An adapter of `kept` that is asked for more often than that one keeps its slot, even while
        it is idle. An idle adapter of `closing` gives up its slot in any case. Those of `coming`
        are being loaded and stay.
        """
        room = slots.room(coming, self.warmth)
        if not isinstance(room, Evict) or room.victim not in kept:
            return room
        per_s = self._recent.per_s(wanted_by, now) if wanted_by is not None else 0.0
        if self._recent.per_s(room.victim, now) <= per_s:
            return room
        return room if any(slots.uses(a) == 0 for a in closing) else Full()
