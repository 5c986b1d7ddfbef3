"""Pure. How much CPU time the grammar of one answer may take.

EngineCore asks every grammar between two steps, one after the other, so all streams of the engine
wait for the slowest. Which grammar will be slow cannot be said before: whether a grammar can be
read in several ways is undecidable. So its time is measured.
"""

from __future__ import annotations

RESERVE_TOKENS = 16
"""A grammar may be this many tokens' time behind. Its first bitmasks fill the backend's caches,
and single ones take several times the mean. This is one token in a hundred of a usual answer.
"""


class GrammarBudget:
    """`token_cpu_s` is the CPU time that each token may take on average: half of it to fill its
    bitmask, half to take it. What is not used is not saved up. So a grammar that is cheap for long
    ends as soon as any other, once it is dear.
    """

    __slots__ = ("_behind_s", "_reserve_s", "_step_s")

    def __init__(self, token_cpu_s: float) -> None:
        self._step_s = token_cpu_s / 2
        self._reserve_s = RESERVE_TOKENS * token_cpu_s
        self._behind_s = 0.0

    def spend(self, cpu_s: float, steps: int) -> None:
        """The grammar has taken so long, for so many bitmasks or tokens."""
        self._behind_s = max(0.0, self._behind_s + cpu_s - steps * self._step_s)

    @property
    def spent(self) -> bool:
        return self._behind_s > self._reserve_s
