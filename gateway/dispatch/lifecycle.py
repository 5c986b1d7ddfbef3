"""Pure. The life of one request at the gateway, as a table. An unlisted pair is a bug and raises
with the request's history.
"""

from __future__ import annotations

from enum import Enum


class RequestPhase(Enum):
    __hash__ = object.__hash__  # Enum hashes names in Python: twice for every step of every request

    QUEUED = "queued"  # no worker yet, or none any more
    SENT = "sent"  # on a worker, nothing has come back
    STREAMING = "streaming"  # the client has seen the status
    FINISHED = "finished"
    FAILED = "failed"
    ABORTED = "aborted"  # the client left


class RequestEvent(Enum):
    __hash__ = object.__hash__

    DISPATCHED = "dispatched"
    HEAD = "head"  # first frame
    END = "end"  # last frame
    RETRY = "retry"  # refused or lost before the first frame, and attempts are left
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
    (RequestPhase.STREAMING, RequestEvent.FAIL): RequestPhase.FAILED,
    (RequestPhase.STREAMING, RequestEvent.CANCEL): RequestPhase.ABORTED,
}
OVER = frozenset({RequestPhase.FINISHED, RequestPhase.FAILED, RequestPhase.ABORTED})
MAX_ATTEMPTS = 3
"""Workers tried for one request before the client hears of the failure."""


class RequestLifecycle:
    """One request's phase. Ends exactly once, in FINISHED, FAILED or ABORTED."""

    __slots__ = ("attempts", "history", "phase")

    def __init__(self) -> None:
        self.phase = RequestPhase.QUEUED
        self.attempts = 0
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
        return after

    def on_loss(self, *, retryable: bool) -> RequestPhase:
        """The worker refused the request or was lost: QUEUED again if nothing was sent to the
        client and attempts are left, else FAILED.
        """
        again = retryable and self.phase is RequestPhase.SENT and self.attempts < MAX_ATTEMPTS
        return self.on(RequestEvent.RETRY if again else RequestEvent.FAIL)
