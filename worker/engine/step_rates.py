"""Pure. How fast an engine steps, as moving averages for heartbeats. vLLM's steps are measured with
it, and those of the routing simulator, so that both mean the same.
"""

from __future__ import annotations

from shared.averages import blend

NEWEST_WEIGHT = 0.2
"""Weight of the newest step in the moving averages."""


class StepRates:
    """`step_s`: a step in which each running sequence gets a token and no prompt is read.
    `prefill_tokens_per_s`: prompt tokens over the time by which they make steps longer. Both are 0
    until something was measured.

    Tokens and time are averaged apart: with a short prompt, one step may take no longer than usual.
    """

    def __init__(self) -> None:
        self.step_s = self._tokens = self._longer_s = 0.0

    @property
    def prefill_tokens_per_s(self) -> float:
        return self._tokens / self._longer_s if self._longer_s else 0.0

    def steps(self, took_s: float, number: int = 1) -> None:
        """Counts steps without a prompt, each of `took_s`."""
        if number:
            self.step_s = blend(self.step_s, took_s, 1 - (1 - NEWEST_WEIGHT) ** number)

    def prefill(self, took_s: float, prompt_tokens: int) -> None:
        """Counts a step in which so many prompt tokens were read."""
        longer_s = max(0.0, took_s - self.step_s)
        self._longer_s = blend(self._longer_s, longer_s, NEWEST_WEIGHT)
        self._tokens = blend(self._tokens, prompt_tokens, NEWEST_WEIGHT)
