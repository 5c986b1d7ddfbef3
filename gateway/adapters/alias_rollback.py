"""Pure. When a share of an alias is rolled back: its error rate over a sliding window is high."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from shared.config.aliases import RollbackConfig

SLICES = 12
"""The parts of a window. It slides by one of them at a time."""


@dataclass(frozen=True, slots=True)
class OutcomeCount:
    """How many requests ended, and how many of them with an error."""

    requests: int = 0
    errors: int = 0

    @property
    def rate(self) -> float:
        return self.errors / self.requests if self.requests else 0.0

    def __add__(self, other: OutcomeCount) -> OutcomeCount:
        return OutcomeCount(self.requests + other.requests, self.errors + other.errors)


class OutcomeWindow:
    """The requests of one share that ended within the last `window_s` seconds, to within one
    slice.
    """

    def __init__(self, window_s: float) -> None:
        self._slice_s = window_s / SLICES
        self._slices: deque[tuple[int, OutcomeCount]] = deque(maxlen=SLICES)

    def note(self, failed: bool, now: float) -> None:
        one, number = OutcomeCount(1, int(failed)), int(now / self._slice_s)
        if self._slices and self._slices[-1][0] == number:
            one += self._slices.pop()[1]
        self._slices.append((number, one))

    def count(self, now: float) -> OutcomeCount:
        oldest = int(now / self._slice_s) - SLICES
        return sum((c for number, c in self._slices if number > oldest), OutcomeCount())


class ShareOutcomes:
    """The windows of one alias's shares."""

    def __init__(self, rollback: RollbackConfig | None) -> None:
        self._rollback = rollback or RollbackConfig()
        self._enabled = rollback is not None
        self._windows: dict[str, OutcomeWindow] = {}

    def note(self, adapter: str, failed: bool, now: float) -> str | None:
        """A request of this share has ended. Returns the reason if the share must be rolled back
        now.
        """
        window = self._windows.get(adapter)
        if window is None:
            window = self._windows[adapter] = OutcomeWindow(self._rollback.window_s)
        window.note(failed, now)
        if not (failed and self._enabled):
            return None  # only an error can raise the error rate
        mine = window.count(now)
        others = sum(
            (w.count(now) for a, w in self._windows.items() if a != adapter), OutcomeCount()
        )
        limit = self._rollback
        if mine.requests < limit.min_requests or mine.rate <= max(limit.error_rate, others.rate):
            return None
        return (
            f"{mine.errors} of {mine.requests} requests failed within "
            f"{limit.window_s:g} s ({mine.rate:.1%}); "
            f"allowed are {limit.error_rate:.1%}, the other shares have {others.rate:.1%}"
        )

    def count(self, adapter: str, now: float) -> OutcomeCount:
        window = self._windows.get(adapter)
        return window.count(now) if window is not None else OutcomeCount()
