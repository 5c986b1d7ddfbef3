"""Pure. How popular each adapter is. Each request counts, with a weight that fades with time. The
adapters that are asked for often stay, and those that were asked for once leave.

LRU forgets an adapter that is asked for every ten seconds as soon as enough others were asked for
once. With Zipf-like demand that causes most of the reloads.
"""

from __future__ import annotations

import math
from collections import OrderedDict

from shared.adapters.identity import AdapterRef

FADE_S = 60.0
"""After this time a request counts 1/e of what it counted at first."""
STEADY_FADE_S = 10.0
"""The same, for the question whether an adapter is in use at present. Steady use is seen after some
seconds and forgotten within half a minute.
"""
MAX_KNOWN = 10_000
"""Adapters whose popularity is remembered, even after they have left. The one that was asked for
longest ago is forgotten first.
"""
FORGOTTEN = 20.0
"""A count that has faded to e^-20 is nothing, and is forgotten. So adapters that come and go cost
memory for some twenty minutes.
"""


class Popularity:
    """The faded request counts. `of` returns numbers that only compare with each other: the
    logarithm of the faded count, as if it had faded to time 0.
    """

    def __init__(self, fade_s: float | None = None) -> None:
        self._fade_s = fade_s or FADE_S
        self._levels: OrderedDict[AdapterRef, float] = OrderedDict()

    def note(self, adapter: AdapterRef, now: float) -> None:
        """Counts one request for the adapter."""
        one = now / self._fade_s
        before = self._levels.get(adapter, -math.inf)
        high, low = max(one, before), min(one, before)
        self._levels[adapter] = high + math.log1p(math.exp(low - high))
        self._levels.move_to_end(adapter)
        while len(self._levels) > MAX_KNOWN or self._coldest() < one - FORGOTTEN:
            self._levels.popitem(last=False)

    def _coldest(self) -> float:
        """The level of the adapter that was asked for longest ago."""
        return next(iter(self._levels.values()))

    def of(self, adapter: AdapterRef) -> float:
        """The adapter's popularity; -inf if it is not known."""
        return self._levels.get(adapter, -math.inf)

    def per_s(self, adapter: AdapterRef, now: float) -> float:
        """Recent requests for the adapter per second."""
        return math.exp(self._levels.get(adapter, -math.inf) - now / self._fade_s) / self._fade_s
