"""Pure. The record of a request that has ended, as metrics, logs and /admin/requests get it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import msgspec

from shared.link.messages import Done


class CostTerms(Protocol):
    """The time that routing expected the chosen worker to take, term by term (see
    CostBreakdown).
    """

    @property
    def total_s(self) -> float: ...
    @property
    def ttft_s(self) -> float: ...
    def terms_ms(self) -> Mapping[str, float]: ...


class EndedRequest(msgspec.Struct, frozen=True, gc=False):
    """Times are seconds on the dispatcher's clock. A time is 0.0 if that moment never came.

    `t_start` is when the request came in, `t_head` when the first bytes of the answer left.
    `t_sent` is when its last worker got it, `t_first_sent` when its first worker did. `moved_s` is
    the time in between during which no worker had it.

    `moves` counts the workers that continued an answer that had begun. `attempts` counts the
    workers that got the request at all.

    `reason`, `tier` and `cost` describe the last choice of a worker: why it was chosen, where the
    adapter was, and the expected cost. `candidates` are the costs that other workers would have
    had. They are kept for a bounded number of requests a second.
    """

    base: str
    adapter: str | None
    outcome: str
    """finished, failed or aborted (its client left, or its batch asks again). Invalid: nobody could
    serve it, or the engine refused it. Not let in: refused, or limited (by a limit of its key).
    """
    done: Done | None
    """What the worker measured. None: the worker never reported the end."""
    t_start: float
    t_sent: float
    t_head: float
    t_end: float
    request_id: str = ""
    tenant: str = ""
    digest: str = ""
    code: str = ""
    """The code of the error that the client got. Empty: there was none."""
    worker: str = ""
    reason: str = ""
    tier: str = ""
    cost: CostTerms | None = None
    candidates: tuple[Mapping[str, object], ...] = ()
    blocked: str = ""
    """What the request last waited for in the queue: `room`, `slot`, or a `worker` that serves."""
    t_first_sent: float = 0.0
    moved_s: float = 0.0
    moves: int = 0
    attempts: int = 0
    streamed: bool = True
    """False: the answer was sent whole, so the time of its first token is unknown."""
    path: str = ""
    message: str = ""
    """What the client was told with `code`. Empty for a request that was invalid: such a message
    may quote it.
    """
    earlier: tuple[str, ...] = ()
    """Of each worker that had it before the last one: the worker, and why it did not finish."""
    trace_id: str = ""
    """The trace of a request that is traced, else empty."""
    engine_status: int = 0
    """The HTTP status with which the engine refused it. 0: it did not."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    """What was worked on. Before the worker reports it: what the client got, or an estimate."""

    @property
    def first_token_s(self) -> float | None:
        """From its arrival to its first token. None: no client saw that one come."""
        seen = self.t_head and self.streamed and not self.engine_status
        return self.t_head - self.t_start if seen else None

    @property
    def is_counted(self) -> bool:
        """Whether its tokens are known."""
        return self.done is not None or self.output_tokens > 0
