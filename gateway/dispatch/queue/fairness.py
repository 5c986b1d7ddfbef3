"""Pure. Virtual token counters: whose turn it is when there is a queue (Sheng et al., "Fairness in
Serving Large Language Models", 2024).

Every flow (API key, adapter) has a counter of the tokens it was served; the waiting flow with the
least goes first. A flow that comes, or comes back, is lifted to what each of those that waited has
been served on average since the queue began (the virtual time of fair queueing), and at least to
the least of them, so that absence earns no credit. The least alone, as in the paper, lets flows
that come once, one after the other, pass by one that has had its fair share for as long as they
come: a hundred adapters that wait for a slot are just that. Output is charged as expected when a
request is sent and corrected when it ends. ServiceCounters live only as long as somebody waits:
without a queue there is nothing to divide.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable

INPUT_WEIGHT = 1.0
OUTPUT_WEIGHT = 2.0
"""Of a token, as in the paper: a token of output occupies the engine for a step, one of input for
its share of a prefill.
"""


QUANTUM = 4096.0
"""Weighted tokens within which flows count as equally served, so that the oldest of them goes
first: ten requests of 128 tokens in and out.
"""


def service(prompt_tokens: float, output_tokens: float) -> float:
    return INPUT_WEIGHT * prompt_tokens + OUTPUT_WEIGHT * output_tokens


class ServiceCounters:
    """Weighted tokens per flow since the queue began."""

    def __init__(self) -> None:
        self._served: dict[Hashable, float] = {}
        self._numbers: dict[Hashable, int] = {}  # of those that wait
        self._order: list[tuple[float, int]] = []  # (served, number) of those, the least first
        self._last = 0
        self._level = 0.0  # what each that waited was served on average

    def __getitem__(self, flow: Hashable) -> float:
        return self._served.get(flow, 0.0)

    def rank(self, flow: Hashable) -> int:
        """Flows of the same rank go by age."""
        return int(self._served.get(flow, 0.0) // QUANTUM)

    def charge(self, flow: Hashable, tokens: float) -> None:
        """Negative where less was used than expected."""
        before = self[flow]
        served = self._served[flow] = max(0.0, before + tokens)
        number = self._numbers.get(flow)
        if number is not None:
            self._level += max(0.0, tokens) / len(self._numbers)
            del self._order[bisect_left(self._order, (before, number))]
            insort(self._order, (served, number))

    def enter(self, flow: Hashable) -> None:
        """It begins to wait beside those that wait already."""
        least = self._order[0][0] if self._order else 0.0
        served = self._served[flow] = max(self[flow], self._level, least)
        self._last += 1
        self._numbers[flow] = self._last
        insort(self._order, (served, self._last))

    def leave(self, flow: Hashable) -> None:
        """It waits no longer."""
        del self._order[bisect_left(self._order, (self[flow], self._numbers.pop(flow)))]
