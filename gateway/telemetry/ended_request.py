"""Pure. What metrics, logs and traces are told of a request once it has ended."""

from __future__ import annotations

import msgspec

from shared.link.messages import Done


class EndedRequest(msgspec.Struct, frozen=True, gc=False):
    """Times are seconds on the dispatcher's clock; 0.0 where that moment never came."""

    base: str
    adapter: str | None
    outcome: str
    """finished, failed or aborted."""
    done: Done | None
    """What the worker measured; None if it never said."""
    t_start: float
    t_sent: float
    t_head: float
    t_end: float
