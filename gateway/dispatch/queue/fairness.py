"""Pure. Virtual token counters decide whose turn it is in the queue (Sheng et al., "Fairness in
Serving Large Language Models", 2024).

Every flow (an API key) has a counter of the tokens that it was served. The waiting flow with
the lowest counter goes first. A flow that begins to wait is lifted to the average service of
waiting flows since the queue began (the virtual time of fair queueing). It is lifted at least to
the lowest counter among them. So absence earns no credit.

The paper lifts only to the lowest. Flows that come once, one after the other, would then pass a
flow that has had its fair share, for as long as they come.

What a request will likely take counts for its flow's turn from the moment it is sent. So a flow
cannot take all places before its first request has ended. At its end, what it really took is
charged instead. Only charges lift other flows. Otherwise a flow with large requests that are then
refused would lift the others beyond any reach.

ServiceCounters exist only while somebody waits. Without a queue there is nothing to share.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable

INPUT_WEIGHT = 1.0
OUTPUT_WEIGHT = 2.0
"""The weights of a token, as in the paper. A token of output occupies the engine for a step, a
token of input for its share of a prefill.
"""


def service(prompt_tokens: float, output_tokens: float) -> float:
    return INPUT_WEIGHT * prompt_tokens + OUTPUT_WEIGHT * output_tokens


class ServiceCounters:
    """Weighted tokens per flow since the queue began: what the flow was charged, and what its
    running requests are expected to take.
    """

    def __init__(self) -> None:
        self._charged: dict[Hashable, float] = {}
        self._expected: dict[Hashable, float] = {}
        self._numbers: dict[Hashable, int] = {}  # of those that wait
        # (tokens, number) of those, the least first
        self._by_turn: list[tuple[float, int]] = []
        self._by_charge: list[tuple[float, int]] = []
        self._last = 0
        self._level = 0.0  # what each that waited was served on average

    def __getitem__(self, flow: Hashable) -> float:
        return self._charged.get(flow, 0.0) + self._expected.get(flow, 0.0)

    def expect(self, flow: Hashable, tokens: float) -> None:
        """A request was sent that will likely take so many tokens. The number is negative once it
        has ended.
        """
        before = self[flow]
        expected = max(0.0, self._expected.get(flow, 0.0) + tokens)
        if expected:
            self._expected[flow] = expected
        else:
            self._expected.pop(flow, None)
        self._move(self._by_turn, flow, before, self[flow])

    def charge(self, flow: Hashable, tokens: float) -> None:
        """The flow was served so many tokens."""
        before, charged = self[flow], self._charged.get(flow, 0.0)
        after = self._charged[flow] = max(0.0, charged + tokens)
        if flow in self._numbers:
            self._level += max(0.0, tokens) / len(self._numbers)
            self._move(self._by_charge, flow, charged, after)
            self._move(self._by_turn, flow, before, self[flow])

    def enter(self, flow: Hashable) -> None:
        """The flow begins to wait."""
        least = self._by_charge[0][0] if self._by_charge else 0.0
        charged = max(self._charged.get(flow, 0.0), self._level, least)
        self._charged[flow] = charged
        self._last += 1
        self._numbers[flow] = self._last
        insort(self._by_charge, (charged, self._last))
        insort(self._by_turn, (self[flow], self._last))

    def leave(self, flow: Hashable) -> None:
        """The flow waits no longer."""
        number = self._numbers.pop(flow)
        _remove(self._by_charge, (self._charged[flow], number))
        _remove(self._by_turn, (self[flow], number))

    def _move(
        self, order: list[tuple[float, int]], flow: Hashable, before: float, after: float
    ) -> None:
        number = self._numbers.get(flow)
        if number is not None:
            _remove(order, (before, number))
            insort(order, (after, number))


def _remove(order: list[tuple[float, int]], entry: tuple[float, int]) -> None:
    del order[bisect_left(order, entry)]
