"""Pure. Whose batch runs. A few run at a time, and each key gets its turn: one that has filled all
places gives some back as soon as another one waits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gateway.batches.records import Batch, BatchStatus

BATCHES_AT_ONCE = 4
TURN_S = 30.0
"""How long a key's only batch runs before it gives its place to another key that waits."""


@dataclass(frozen=True, slots=True)
class RunningBatch:
    """`since` is when its turn began."""

    id: str
    owner: str
    since: float


def next_to_run(
    waiting: Sequence[Batch], running: Sequence[RunningBatch], ran_last: Mapping[str, float]
) -> Batch | None:
    """The batch for a free place: of the key with the fewest that run, then of the one whose turn
    was the longest ago, then the oldest. One that is cancelled asks nothing, and needs no place.
    None: there is no free place, or nobody waits.
    """
    cancelled = next((b for b in waiting if b.status is BatchStatus.CANCELLING), None)
    if cancelled is not None:
        return cancelled
    if len(running) >= BATCHES_AT_ONCE:
        return None
    of_owner = Counter(run.owner for run in running)
    return min(
        waiting,
        key=lambda b: (of_owner[b.owner], ran_last.get(b.owner, 0.0), b.created_at, b.id),
        default=None,
    )


def to_yield(
    waiting: Sequence[Batch], running: Sequence[RunningBatch], now: float
) -> RunningBatch | None:
    """The batch that gives its place to a key without one. None: all places are rightly taken."""
    of_owner = Counter(run.owner for run in running)
    without = {batch.owner for batch in waiting} - of_owner.keys()
    if not without or len(running) < BATCHES_AT_ONCE:
        return None
    longest = min(running, key=lambda run: (-of_owner[run.owner], run.since))
    if of_owner[longest.owner] == 1 and now - longest.since < TURN_S:
        return None
    return longest
