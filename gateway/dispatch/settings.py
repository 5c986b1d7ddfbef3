"""Pure. The settings of a dispatcher."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from gateway.dispatch.streams.journal import NO_JOURNALS, JournalBounds


@dataclass(frozen=True, slots=True)
class DispatchSettings:
    """`keepalive_s` is the time between two comments to a stream that waits (0: no comments).
    `journals` bounds what is kept of what clients have seen. `max_body_bytes` bounds the bodies of
    all open requests together.
    """

    max_requests: int
    keepalive_s: float = 0.0
    journals: JournalBounds = NO_JOURNALS
    max_body_bytes: int = 1 << 30


@dataclass(frozen=True, slots=True)
class TimeAndChance:
    """`clock` returns seconds that never go back. `call_at` calls a function at a time on that
    clock. Without it, such calls wait for the next regular tick.
    """

    clock: Callable[[], float]
    rng: random.Random
    call_at: Callable[[float, Callable[[], None]], object] | None = None
