"""Pure. What a person reads while `serve` starts: what each worker is at, for how long, and how
long it took the last time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

QUIET_S = 3.0
"""The longest time without a line."""
IMPORTING = "importing vLLM"
"""What a worker with vLLM is at before it has told anything."""
MAX_NAMED = 4
"""Workers that a line names one by one."""


class StartTimes(msgspec.Struct, frozen=True):
    """How long the last start took until all workers served, by the models of the file."""

    start_s: dict[str, float] = {}


@dataclass(frozen=True, slots=True)
class Starting:
    """A worker that does not serve yet, and what it is at."""

    name: str
    stage: str


class StartProgress:
    """Lines of one start, which began at `now`. `usual_s`: what the last one took; 0: unknown."""

    def __init__(self, now: float, usual_s: float) -> None:
        self._began = self._said_at = now
        self._usual_s = usual_s
        self._stages: frozenset[Starting] = frozenset()

    def line(self, workers: Iterable[Starting], now: float) -> str | None:
        """The line to be said now: something has changed, or nothing was said for QUIET_S."""
        at = frozenset(workers)
        if not at:
            return None
        changed, self._stages = at != self._stages, at
        if not changed and now - self._said_at < QUIET_S:
            return None
        self._said_at = now
        return f"{self._words()}; {now - self._began:.0f} s so far{self._usual()}"

    def _words(self) -> str:
        by_stage: dict[str, list[str]] = {}
        for worker in sorted(self._stages, key=lambda w: w.name):
            by_stage.setdefault(worker.stage, []).append(worker.name)
        return ", ".join(f"{_names(names)}: {stage}" for stage, names in sorted(by_stage.items()))

    def _usual(self) -> str:
        return f" (the last start took {self._usual_s:.0f} s)" if self._usual_s else ""


def _names(names: list[str]) -> str:
    if len(names) <= MAX_NAMED:
        return " ".join(names)
    return f"{names[0]} and {len(names) - 1} others"
