"""Pure. How warm each adapter is: requests counted with a weight that fades, so that what is asked
for often stays and what was asked for once goes.

LRU forgets an adapter that is asked for every ten seconds as soon as enough others came once; with
Zipf-like demand that is most of the reloads.
"""

from __future__ import annotations

import math
from collections import OrderedDict

from shared.adapters.identity import AdapterRef

FADE_S = 60.0
"""A request counts e times less after this time."""
STEADY_FADE_S = 10.0
"""The same where the question is whether an adapter is in use at present: known after some seconds,
forgotten within half a minute.
"""
MAX_KNOWN = 10_000
"""Adapters whose warmth is remembered, also of those that have left; the one that was asked for
longest ago is forgotten first.
"""


class Popularity:
    """`of` yields numbers that only compare with each other: the logarithm of the faded count, as
    if faded to time 0.
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
        """Requests a second of late."""
        return math.exp(self._levels.get(adapter, -math.inf) - now / self._fade_s) / self._fade_s
