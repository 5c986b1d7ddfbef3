"""Pure. Virtual time: what happens next, in order, with ties in the order of asking."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count
from typing import Any


class Agenda:
    """A clock that jumps from event to event. Nothing is ever taken back: an event that has become
    pointless must know it itself.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = count()

    def clock(self) -> float:
        return self.now

    def at(self, when: float, do: Callable[..., None], *args: Any) -> None:
        assert when >= self.now, "the past is over"
        heapq.heappush(self._events, (when, next(self._numbers), do, args))

    def after(self, delay_s: float, do: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self._events, (self.now + delay_s, next(self._numbers), do, args))

    def run(self, going: Callable[[], bool]) -> None:
        """Until `going` says no (asked before each event) or nothing is left to happen."""
        events, pop = self._events, heapq.heappop
        while events and going():
            self.now, _, do, args = pop(events)
            do(*args)
