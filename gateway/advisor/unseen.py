"""Pure. Adapters that nobody has asked for yet, foretold from those that came once or twice.

A sample makes too much of what it holds and nothing of the rest. Absolute discounting (Ney, Essen
and Kneser, 1994) takes the same part of a request from every adapter: f1 / (f1 + 2 f2), where f1
came once and f2 twice. What it takes is the share of adapters that have not come yet. How many
these are at least is Chao's estimate (1984): f1^2 / (2 f2).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Unseen:
    """`discount` is to be taken from every adapter's count. `requests` of as long a time would be
    for `adapters` others, in the place of what was taken.
    """

    discount: float
    adapters: float
    requests: float


def unseen(counts: Collection[int]) -> Unseen:
    """From the requests of each adapter that was seen."""
    once, twice = (sum(count == n for count in counts) for n in (1, 2))
    if not once:
        return Unseen(0.0, 0.0, 0.0)
    discount = once / (once + 2 * twice)
    adapters = once**2 / (2 * twice) if twice else once * (once + 1) / 2
    return Unseen(discount, adapters, discount * len(counts))
