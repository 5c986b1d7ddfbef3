"""Pure. How popular each adapter is: requests are counted with a weight that fades. What is asked
for often stays, and what was asked for once goes.

LRU forgets an adapter that is asked for every ten seconds as soon as enough others were asked for
once. With Zipf-like demand that causes most of the reloads.
"""

from __future__ import annotations

import math
from collections import OrderedDict

from shared.adapters.identity import AdapterRef

FADE_S = 60.0
"""A request counts e times less after this time."""
STEADY_FADE_S = 10.0
"""The same for the question whether an adapter is in use at present. Steady use is known after some
seconds, and forgotten within half a minute.
"""
MAX_KNOWN = 10_000
"""Adapters whose popularity is remembered, also after they have left. The one that was asked for
longest ago is forgotten first.
"""


class Popularity:
    """`of` gives numbers that only compare with each other: the logarithm of the faded count, as if
    it had faded to time 0.
    """

    def __init__(self, fade_s: float | None = None) -> None:
        self._fade_s = fade_s or FADE_S
        self._levels: OrderedDict[AdapterRef, float] = OrderedDict()

    def note(self, adapter: AdapterRef, now: float) -> None:
        """One more request."""
        one = now / self._fade_s
        before = self._levels.get(adapter, -math.inf)
        high, low = max(one, before), min(one, before)
        self._levels[adapter] = high + math.log1p(math.exp(low - high))
        self._levels.move_to_end(adapter)
        if len(self._levels) > MAX_KNOWN:
            self._levels.popitem(last=False)

    def of(self, adapter: AdapterRef) -> float:
        return self._levels.get(adapter, -math.inf)

    def per_s(self, adapter: AdapterRef, now: float) -> float:
        """Recent requests a second."""
        return math.exp(self._levels.get(adapter, -math.inf) - now / self._fade_s) / self._fade_s
