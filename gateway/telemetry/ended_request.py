"""Pure. What metrics, logs and traces are told of a request once it has ended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import msgspec

from shared.link.messages import Done


class CostTerms(Protocol):
    """What routing expected of the worker that it chose; see CostBreakdown."""

    @property
    def total_s(self) -> float: ...
    def terms_ms(self) -> Mapping[str, float]: ...


class EndedRequest(msgspec.Struct, frozen=True, gc=False):
    """Times are seconds on the dispatcher's clock; 0.0 where that moment never came.

    `t_sent` is when the last worker got it, `t_first_sent` when the first one did, and `moved_s`
    the time in between that no worker had it. `moves` counts the workers that went on with an
    answer that had begun, `attempts` the workers that got it at all.

    `reason`, `tier`, `cost` and `candidates` are the last choice of a worker: why, where the
    adapter was, what that was expected to cost, and what the others would have. The candidates are
    kept of a bounded number of requests a second.
    """

    base: str
    adapter: str | None
    outcome: str
    """finished, failed, aborted, or refused: it was never let in."""
    done: Done | None
    """What the worker measured; None if it never said."""
    t_start: float
    t_sent: float
    t_head: float
    t_end: float
    request_id: str = ""
    tenant: str = ""
    digest: str = ""
    code: str = ""
    """Of the error that its client got; empty: none."""
    worker: str = ""
    reason: str = ""
    tier: str = ""
    cost: CostTerms | None = None
    candidates: tuple[Mapping[str, object], ...] = ()
    blocked: str = ""
    """What it waited for last in the queue: room, or slot."""
    t_first_sent: float = 0.0
    moved_s: float = 0.0
    moves: int = 0
    attempts: int = 0
    streamed: bool = True
    """False: its answer came whole, and nobody saw its first token."""
