"""Pure. The life of one request at the gateway, as a table. An unlisted pair is a bug and raises with the request's history."""

from __future__ import annotations

from enum import Enum


class Phase(Enum):
    __hash__ = object.__hash__  # Enum hashes names in Python: twice for every step of every request

    QUEUED = "queued"  # no worker yet, or none any more
    SENT = "sent"  # on a worker, nothing has come back
    STREAMING = "streaming"  # the client has seen the status
    FINISHED = "finished"
    FAILED = "failed"
    ABORTED = "aborted"  # the client left


class Event(Enum):
    __hash__ = object.__hash__

    DISPATCHED = "dispatched"
    HEAD = "head"  # first frame
    END = "end"  # last frame
    RETRY = "retry"  # refused or lost before the first frame, and attempts are left
    FAIL = "fail"
    CANCEL = "cancel"


NEXT: dict[tuple[Phase, Event], Phase] = {
    (Phase.QUEUED, Event.DISPATCHED): Phase.SENT,
    (Phase.QUEUED, Event.FAIL): Phase.FAILED,
    (Phase.QUEUED, Event.CANCEL): Phase.ABORTED,
    (Phase.SENT, Event.HEAD): Phase.STREAMING,
    (Phase.SENT, Event.RETRY): Phase.QUEUED,
    (Phase.SENT, Event.FAIL): Phase.FAILED,
    (Phase.SENT, Event.CANCEL): Phase.ABORTED,
    (Phase.STREAMING, Event.END): Phase.FINISHED,
    (Phase.STREAMING, Event.FAIL): Phase.FAILED,
    (Phase.STREAMING, Event.CANCEL): Phase.ABORTED,
}
OVER = frozenset({Phase.FINISHED, Phase.FAILED, Phase.ABORTED})
MAX_ATTEMPTS = 3
"""Workers tried for one request before the client hears of the failure."""


class Lifecycle:
    """One request's phase. Ends exactly once, in FINISHED, FAILED or ABORTED."""

    __slots__ = ("attempts", "history", "phase")

    def __init__(self) -> None:
        self.phase = Phase.QUEUED
        self.attempts = 0
        self.history: list[Event] = []

    @property
    def over(self) -> bool:
        return self.phase in OVER

    def on(self, event: Event) -> Phase:
        after = NEXT.get((self.phase, event))
        if after is None:
            raise AssertionError(f"{event} in {self.phase} after {self.history}")
        self.phase = after
        self.history.append(event)
        if event is Event.DISPATCHED:
            self.attempts += 1
        return after

    def on_loss(self, *, retryable: bool) -> Phase:
        """The worker refused the request or was lost: QUEUED again if nothing was sent to the client and attempts are left, else FAILED."""
        again = retryable and self.phase is Phase.SENT and self.attempts < MAX_ATTEMPTS
        return self.on(Event.RETRY if again else Event.FAIL)
