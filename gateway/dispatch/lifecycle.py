"""Pure. The life of one request at the gateway, as a table. An unlisted pair is a bug and raises
with the request's history.
"""

from __future__ import annotations

from enum import Enum


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
OVER = frozenset({RequestPhase.FINISHED, RequestPhase.FAILED, RequestPhase.ABORTED})
MAX_ATTEMPTS = 3
"""Workers tried for one request, without getting a frame, before the client hears of the failure.
"""
MAX_DEATHS = 2
"""Workers that may die before they have begun to answer a request: by then it may be what kills
them.
"""
RETRIES_PER_S = 0.5
"""Of each open request: what a fleet of two workers needs that lose one every second."""
MIN_OPEN = 64
"""Fewer open requests are treated as so many, for chance plays a large part among few."""


class RequestLifecycle:
    """One request's phase. Ends exactly once, in FINISHED, FAILED or ABORTED. `in_vain` counts the
    attempts since a worker last began to answer, `deaths` the workers that died in one of them.
    """

    __slots__ = ("attempts", "deaths", "history", "in_vain", "phase")

    def __init__(self) -> None:
        self.phase = RequestPhase.QUEUED
        self.attempts = self.in_vain = self.deaths = 0
        self.history: list[RequestEvent] = []

    @property
    def over(self) -> bool:
        return self.phase in OVER

    def on(self, event: RequestEvent) -> RequestPhase:
        after = NEXT.get((self.phase, event))
        if after is None:
            raise AssertionError(f"{event} in {self.phase} after {self.history}")
        self.phase = after
        self.history.append(event)
        if event is RequestEvent.DISPATCHED:
            self.attempts += 1
            self.in_vain += 1
        elif event is RequestEvent.HEAD:
            self.in_vain = self.deaths = 0
        return after

    def on_loss(self, *, retryable: bool, died: bool = False) -> RequestPhase:
        """The worker refused the request or was lost: QUEUED again, or FAILED if that was for good
        or too often. `died`: the worker did, which may be the request's doing.
        """
        self.deaths += died and self.phase is RequestPhase.SENT
        left = self.in_vain < MAX_ATTEMPTS and self.deaths < MAX_DEATHS
        return self.on(RequestEvent.RETRY if retryable and left else RequestEvent.FAIL)


class RetryBudget:
    """How many requests may be given to another worker: as fast as RETRIES_PER_S for each open one,
    and at once as many as are open. A fleet that dies over and over gets no more load for it.
    """

    __slots__ = ("_level", "_since")

    def __init__(self) -> None:
        self._level = 0.0  # spent, and not regained yet
        self._since = 0.0

    def take(self, open_requests: int, now: float) -> bool:
        """Whether one more may be retried now."""
        regained = (now - self._since) * RETRIES_PER_S * max(open_requests, MIN_OPEN)
        self._level, self._since = max(0.0, self._level - regained), now
        if self._level + 1 > max(open_requests, MIN_OPEN):
            return False
        self._level += 1
        return True
