"""Pure. What is remembered of the lives of workers that are over. A life is one process; its epoch
names it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TypeVar

from shared.adapters.identity import AdapterKey, AdapterRef
from shared.link.messages import WorkerId

K = TypeVar("K")
V = TypeVar("V")

MOST_REMEMBERED = 10_000
"""Lives that are remembered after their end. A late heartbeat is seconds old, and a worker does not
restart that often in seconds.
"""
FAILED_STARTS = 2
"""In a row, after which a worker is not waited for. One may be an accident. `serve` says the same
of the workers that it has started (FAILED_STARTS_LIMIT).
"""
SUCCESSOR_S = 600.0
"""After this time a worker of the same name is another one. The slowest restart, of a large model
on a GPU, takes a few minutes.
"""


@dataclass(frozen=True, slots=True)
class FailedStarts:
    """`count` lives of one worker in a row that have ended before they served."""

    base: str
    count: int
    reason: str
    at: float


@dataclass(frozen=True, slots=True)
class LastHeld:
    """What the last life of a worker had in its slots, and how long that matters."""

    base: str
    adapters: tuple[AdapterKey, ...]
    until: float


class PastLives:
    """Lives that are over, by worker. Times are seconds of the caller's clock."""

    def __init__(self) -> None:
        # True: the worker has said so itself.
        self._ended: dict[tuple[WorkerId, int], bool] = {}
        self._failed_starts: dict[WorkerId, FailedStarts] = {}
        self._last_held: dict[WorkerId, LastHeld] = {}

    def end(self, worker: WorkerId, epoch: int, *, reported: bool) -> None:
        """This life is over, so a late heartbeat does not revive it. `reported`: its last word, or
        its host, has said so. If not, another life has replaced it.
        """
        _remember(self._ended, (worker, epoch), reported)

    def is_over(self, worker: WorkerId, epoch: int, *, replaced: bool) -> bool:
        """Whether this life has ended. A life that another one replaced may come back after its
        successor has gone (not `replaced`): then two processes had the same name.
        """
        reported = self._ended.get((worker, epoch))
        return reported is not None and (reported or replaced)

    def failed_to_start(self, worker: WorkerId, base: str, reason: str, at: float) -> None:
        before = self._failed_starts.pop(worker, None)
        count = 1 if before is None else before.count + 1
        _remember(self._failed_starts, worker, FailedStarts(base, count, reason, at))

    def serves(self, worker: WorkerId) -> None:
        """A life of the worker serves: those before it no longer count as failed starts."""
        self._failed_starts.pop(worker, None)

    def cannot_start(self, base: str, present: Collection[WorkerId], now: float) -> str | None:
        """Why no worker of the base model can start: each one that is known has failed
        FAILED_STARTS times in a row. None: one may, for example one of those `present` that has not
        failed yet.
        """
        tried = {
            worker: failed
            for worker, failed in self._failed_starts.items()
            if failed.base == base and now - failed.at < SUCCESSOR_S
        }
        new = any(worker not in tried for worker in present)
        if not tried or new or any(f.count < FAILED_STARTS for f in tried.values()):
            return None
        return max(tried.values(), key=lambda f: f.at).reason

    def held(
        self, worker: WorkerId, base: str, adapters: tuple[AdapterKey, ...], at: float
    ) -> None:
        """What was in the slots of a life that ended, the most wanted first."""
        _remember(self._last_held, worker, LastHeld(base, adapters, at + SUCCESSOR_S))

    def last_held(self, worker: WorkerId, base: str, now: float) -> list[AdapterRef]:
        """What the life of the worker before this one had in its slots, the most wanted first.
        Empty where there was none, or too long ago.
        """
        last = self._last_held.get(worker)
        if last is None or last.base != base or now >= last.until:
            return []
        return [AdapterRef(base, *key) for key in last.adapters]


def _remember(known: dict[K, V], key: K, value: V) -> None:
    """The oldest is forgotten where there are too many."""
    known[key] = value
    if len(known) > MOST_REMEMBERED:
        del known[next(iter(known))]
