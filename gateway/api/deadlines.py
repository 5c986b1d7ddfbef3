"""Shell. The deadlines of open requests, with one timer for all of them. Nearly every request ends
long before its own, and a timer for each would cost a thirtieth of a short request.
"""

from __future__ import annotations

import asyncio
import math
from typing import Protocol

STEP_S = 0.02
"""The shortest time between two looks at all open requests, so a deadline is kept to that. Clients
choose their deadlines, and must not make this process look more often.
"""


class Expiring(Protocol):
    """Whose deadline may pass."""

    def too_late(self) -> None: ...


class Deadlines:
    """Times are those of `loop`. Its next look is at the earliest deadline, as far as is known."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._open: dict[Expiring, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._next = self._looked_at = -math.inf

    def __len__(self) -> int:
        return len(self._open)

    def enter(self, who: Expiring, at: float) -> None:
        """Its `too_late` is called soon after `at`, unless it leaves before."""
        self._open[who] = at
        if self._timer is None or at < self._next:
            self._look_at(at)

    def leave(self, who: Expiring) -> None:
        """Idempotent."""
        self._open.pop(who, None)

    def _look_at(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._next = max(when, self._looked_at + STEP_S)
        self._timer = self._loop.call_at(self._next, self._look)

    def _look(self) -> None:
        self._timer, now = None, self._loop.time()
        self._looked_at = now
        for who in [who for who, at in self._open.items() if at <= now]:
            del self._open[who]
            self._loop.call_soon(who.too_late)  # one that raises does not keep the others
        if self._open:
            self._look_at(min(self._open.values()))
