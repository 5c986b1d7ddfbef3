"""Pure. The GPU slots: which adapter is in each, how many requests use it, and which adapter makes
room next. This table alone decides; the engine's own LRU never does.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from typing import TypeAlias

from shared.adapters.identity import AdapterRef


@dataclass(frozen=True, slots=True)
class Free:
    """A slot is free."""


@dataclass(frozen=True, slots=True)
class Evict:
    """This idle adapter makes room."""

    victim: AdapterRef


@dataclass(frozen=True, slots=True)
class Full:
    """Every slot is in use."""


SlotOffer: TypeAlias = Free | Evict | Full


class SlotTable:
    """`size` slots, in order of last use. An adapter in flight or pinned never makes room."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._uses: OrderedDict[AdapterRef, int] = OrderedDict()
        self._pinned: set[AdapterRef] = set()

    def __contains__(self, adapter: AdapterRef) -> bool:
        return adapter in self._uses

    def __len__(self) -> int:
        return len(self._uses)

    def uses(self, adapter: AdapterRef) -> int:
        """How many running requests use the adapter."""
        return self._uses.get(adapter, 0)

    def oldest_in_use(self, but: Container[AdapterRef] = ()) -> AdapterRef | None:
        """Of the adapters with running requests, the one that has gone longest without a new
        request. Those in `but` are left out.
        """
        return next(
            (a for a, n in self._uses.items() if n and a not in self._pinned and a not in but), None
        )

    def room(
        self, but: Container[AdapterRef] = (), warmth: Callable[[AdapterRef], float] = lambda _: 0.0
    ) -> SlotOffer:
        """A slot for one more adapter. If none is free, the idle adapter with the least `warmth`
        makes room, and among equals the least recently used. Adapters in `but` are being loaded and
        stay.
        """
        if len(self._uses) < self.size:
            return Free()
        idle = [
            a for a, n in self._uses.items() if n == 0 and a not in self._pinned and a not in but
        ]
        return Evict(min(idle, key=warmth)) if idle else Full()

    def adapters(self) -> Iterable[AdapterRef]:
        """The adapters that hold a slot, the least recently used first."""
        return self._uses.keys()

    def occupy(self, adapter: AdapterRef) -> None:
        """The adapter takes a free slot, from the start of its load on."""
        assert adapter not in self._uses and len(self._uses) < self.size
        self._uses[adapter] = 0

    def vacate(self, adapter: AdapterRef) -> None:
        """The adapter gives up its slot. No request may use it."""
        assert self._uses[adapter] == 0, "an adapter in flight must never lose its slot"
        del self._uses[adapter]

    def acquire(self, adapter: AdapterRef) -> None:
        """One more request uses the adapter; it becomes the most recently used."""
        self._uses[adapter] += 1
        self._uses.move_to_end(adapter)

    def release(self, adapter: AdapterRef) -> None:
        """One request that used the adapter has ended."""
        assert self._uses[adapter] > 0
        self._uses[adapter] -= 1

    def may_pin(self, adapter: AdapterRef) -> bool:
        """Whether the adapter may be pinned. At least one slot is kept for adapters that are not
        pinned. A pin of another version of the same name is replaced, so it does not count.
        """
        return len({a.name for a in self._pinned} | {adapter.name}) < self.size

    def pin(self, adapter: AdapterRef) -> None:
        """Pins the adapter. Other versions of the same name are no longer pinned."""
        self._pinned = {a for a in self._pinned if a.name != adapter.name} | {adapter}

    def unpin(self, adapter: AdapterRef) -> None:
        self._pinned.discard(adapter)

    def pinned(self, adapter: AdapterRef) -> bool:
        return adapter in self._pinned
