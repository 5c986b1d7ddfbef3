"""Pure. What a dispatcher is told once, when it is made."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from gateway.dispatch.journal import NO_JOURNALS, JournalBounds


@dataclass(frozen=True, slots=True)
class DispatchSettings:
    """`keepalive_s`: how often a stream that waits is told so (0: never).

    `journals`: how much is kept of what clients have seen.
    """

    max_requests: int
    keepalive_s: float = 0.0
    journals: JournalBounds = NO_JOURNALS


@dataclass(frozen=True, slots=True)
class TimeAndChance:
    """`clock` yields seconds that never go back. `call_at` calls at a time on that clock; without
    it, whoever wants to be called waits for the next regular tick.
    """

    clock: Callable[[], float]
    rng: random.Random
    call_at: Callable[[float, Callable[[], None]], object] | None = None
