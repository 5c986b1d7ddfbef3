"""Pure. The life of one request at the gateway, as a table. A pair that is not in it is a bug, and
raises with the request's history.
"""

from __future__ import annotations

from enum import Enum

import msgspec


class RequestPhase(Enum):
    __hash__ = object.__hash__  # Enum hashes names in Python: twice for every step of every request

    QUEUED = "queued"  # no worker yet, or none any more
    SENT = "sent"  # on a worker, nothing has come back
    STREAMING = "streaming"  # its worker has begun to answer
    FINISHED = "finished"
    FAILED = "failed"
    ABORTED = "aborted"  # the client left


class RequestEvent(Enum):
    __hash__ = object.__hash__

    DISPATCHED = "dispatched"
    HEAD = "head"  # first frame
    END = "end"  # last frame
    RETRY = "retry"  # refused or lost, and another worker may take it
    FAIL = "fail"
    CANCEL = "cancel"


NEXT: dict[tuple[RequestPhase, RequestEvent], RequestPhase] = {
    (RequestPhase.QUEUED, RequestEvent.DISPATCHED): RequestPhase.SENT,
    (RequestPhase.QUEUED, RequestEvent.FAIL): RequestPhase.FAILED,
    (RequestPhase.QUEUED, RequestEvent.CANCEL): RequestPhase.ABORTED,
    (RequestPhase.SENT, RequestEvent.HEAD): RequestPhase.STREAMING,
    (RequestPhase.SENT, RequestEvent.RETRY): RequestPhase.QUEUED,
    (RequestPhase.SENT, RequestEvent.FAIL): RequestPhase.FAILED,
    (RequestPhase.SENT, RequestEvent.CANCEL): RequestPhase.ABORTED,
    (RequestPhase.STREAMING, RequestEvent.END): RequestPhase.FINISHED,
    (RequestPhase.STREAMING, RequestEvent.RETRY): RequestPhase.QUEUED,
    (RequestPhase.STREAMING, RequestEvent.FAIL): RequestPhase.FAILED,
    (RequestPhase.STREAMING, RequestEvent.CANCEL): RequestPhase.ABORTED,
}
_DISPATCHED, _HEAD = RequestEvent.DISPATCHED, RequestEvent.HEAD
OVER = frozenset({RequestPhase.FINISHED, RequestPhase.FAILED, RequestPhase.ABORTED})
MAX_ATTEMPTS = 3
"""How many workers are tried for one request without getting a frame. Then the client hears of the
failure.
"""
MAX_DEATHS = 2
"""How many workers may die before they began to answer a request. By then the request may be what
kills them.
"""
RETRIES_PER_S = 0.5
"""Of each open request: what a fleet of two workers needs that lose one every second."""
RETRIES_AT_ONCE = 3
"""Of each open request: three workers may be lost in a row, each with all of it."""
MIN_OPEN = 64
"""Fewer open requests are treated as so many, for chance plays a large part among few."""


class RequestLifecycle(msgspec.Struct, eq=False):
    """The phase of one request. It ends exactly once: FINISHED, FAILED or ABORTED. `in_vain` counts
    the attempts since a worker last began to answer. `deaths` counts the workers that died in one
    of them.
    """

    phase: RequestPhase = RequestPhase.QUEUED
    attempts: int = 0
    in_vain: int = 0
    deaths: int = 0
    history: list[RequestEvent] = []

    @property
    def over(self) -> bool:
        return self.phase in OVER

    def on(self, event: RequestEvent) -> RequestPhase:
        after = NEXT.get((self.phase, event))
        if after is None:
            raise AssertionError(f"{event} in {self.phase} after {self.history}")
        self.phase = after
        self.history.append(event)
        if event is _DISPATCHED:
            self.attempts += 1
            self.in_vain += 1
        elif event is _HEAD:
            self.in_vain = self.deaths = 0
        return after

    def progressed(self) -> None:
        """A worker has made tokens that the client does not get yet, because its answer is sent
        whole.
        """
        self.in_vain = self.deaths = 0

    def on_loss(
        self, *, retryable: bool, died: bool = False, handed_back: bool = False
    ) -> RequestPhase:
        """The worker refused the request or was lost. The request is QUEUED again, or FAILED if
        this was final or happened too often. `died`: the worker died, perhaps because of this
        request. `handed_back`: the worker leaves, which says nothing about the request.
        """
        if handed_back and self.in_vain:
            self.in_vain -= 1
        self.deaths += died and self.phase is RequestPhase.SENT and bool(self.in_vain)
        left = self.in_vain < MAX_ATTEMPTS and self.deaths < MAX_DEATHS
        return self.on(RequestEvent.RETRY if retryable and left else RequestEvent.FAIL)


class RetryBudget:
    """How many requests may be given to another worker: RETRIES_PER_S for each open request, and
    RETRIES_AT_ONCE for each at once. So a fleet that dies over and over gets no additional load.
    """

    __slots__ = ("_level", "_since")

    def __init__(self) -> None:
        self._level = 0.0  # spent, and not regained yet
        self._since = 0.0

    def take(self, open_requests: int, now: float) -> bool:
        """Whether one more request may be retried now."""
        counted = max(open_requests, MIN_OPEN)
        regained = (now - self._since) * RETRIES_PER_S * counted
        self._level, self._since = max(0.0, self._level - regained), now
        if self._level + 1 > RETRIES_AT_ONCE * counted:
            return False
        self._level += 1
        return True
