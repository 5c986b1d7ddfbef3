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
    ANSWERED = "answered"  # first frame of one in the background: nothing is made of it yet
    END = "end"  # last frame
    RETRY = "retry"  # refused or lost, and another worker may take it
    FAIL = "fail"
    CANCEL = "cancel"


NEXT: dict[tuple[RequestPhase, RequestEvent], RequestPhase] = {
    (RequestPhase.QUEUED, RequestEvent.DISPATCHED): RequestPhase.SENT,
    (RequestPhase.QUEUED, RequestEvent.FAIL): RequestPhase.FAILED,
    (RequestPhase.QUEUED, RequestEvent.CANCEL): RequestPhase.ABORTED,
    (RequestPhase.SENT, RequestEvent.HEAD): RequestPhase.STREAMING,
    (RequestPhase.SENT, RequestEvent.ANSWERED): RequestPhase.STREAMING,
    (RequestPhase.SENT, RequestEvent.RETRY): RequestPhase.QUEUED,
    (RequestPhase.SENT, RequestEvent.FAIL): RequestPhase.FAILED,
    (RequestPhase.SENT, RequestEvent.CANCEL): RequestPhase.ABORTED,
    (RequestPhase.STREAMING, RequestEvent.END): RequestPhase.FINISHED,
    (RequestPhase.STREAMING, RequestEvent.RETRY): RequestPhase.QUEUED,
    (RequestPhase.STREAMING, RequestEvent.FAIL): RequestPhase.FAILED,
    (RequestPhase.STREAMING, RequestEvent.CANCEL): RequestPhase.ABORTED,
}
_DISPATCHED, _HEAD, _ANSWERED = RequestEvent.DISPATCHED, RequestEvent.HEAD, RequestEvent.ANSWERED
OVER = frozenset({RequestPhase.FINISHED, RequestPhase.FAILED, RequestPhase.ABORTED})
MAX_ATTEMPTS = 3
"""How many workers are tried for one request without getting a frame. Then the client hears of the
failure.
"""
DEADLY = 3
"""Deaths after which the request is what kills them: the last worker had no other suspected one."""
RETRIES_PER_S = 0.5
"""Of each open request: what a fleet of two workers needs that lose one every second."""
RETRIES_AT_ONCE = 3
"""Of each open request: three workers may be lost in a row, each with all of it."""
MIN_OPEN = 64
"""Fewer open requests are treated as so many, for chance plays a large part among few."""


class RequestLifecycle(msgspec.Struct, eq=False):
    """The phase of one request. It ends exactly once: FINISHED, FAILED or ABORTED. `in_vain` counts
    the attempts since a worker last began to answer. `deaths` counts the workers that died since
    then, that one included: at most DEADLY. With `to_its_end` progress proves nothing: an earlier
    request of the same kind killed a worker in the middle of its answer. `accompanied`: its worker
    died with another request that had lost one before. `taken`: the worker has it, and may die of
    it. It says so if others died of it, and else it is presumed. `untaken` counts the workers that
    died before they had it.
    """

    phase: RequestPhase = RequestPhase.QUEUED
    attempts: int = 0
    in_vain: int = 0
    deaths: int = 0
    to_its_end: bool = False
    accompanied: bool = False
    taken: bool = False
    untaken: int = 0
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
            self.taken = not self.deaths
        elif event is _HEAD:
            self.in_vain = 0
            if self.deaths:
                self.taken = True
                self.progressed()
        elif event is _ANSWERED:
            self.taken = True
        return after

    def progressed(self) -> None:
        """A worker has begun to answer, or has made tokens that the client does not get yet,
        because its answer is sent whole.
        """
        self.in_vain = self.untaken = 0
        if not self.to_its_end:
            self.deaths = 0

    def goes_on_from(self, deaths: int, begun: bool) -> None:
        """The same request has ended before without its answer, and so many workers had died of it,
        one of them after it had `begun`.
        """
        if deaths > self.deaths:
            self.deaths, self.to_its_end = deaths, begun

    def not_begun(self) -> None:
        """The worker did not begin the request: it is as if it had not been sent."""
        self.on(RequestEvent.RETRY)
        del self.history[-2:]
        self.attempts -= 1
        self.in_vain -= 1

    def on_loss(
        self,
        *,
        retryable: bool,
        died: bool = False,
        alone: bool = False,
        known_deadly: bool = False,
        handed_back: bool = False,
    ) -> RequestPhase:
        """The worker refused the request or was lost. The request is QUEUED again, or FAILED if
        this was final or happened too often. `known_deadly`: a copy of it was. `died`: the worker
        died, perhaps because of this request, and `alone`: of those that it had, no other
        has lost a worker without progress since. What the worker had not taken yet did not kill it,
        unless that is said too often: a worker may die before its word has left it.
        `handed_back`: the worker leaves, which says nothing about the request.
        """
        if handed_back and self.in_vain:
            self.in_vain -= 1
        if died and not self.taken and self.untaken < MAX_ATTEMPTS:
            self.untaken += 1
            self.in_vain -= 1
        elif died:
            again = self.deaths > 0
            certain = alone and again and not self.to_its_end
            self.deaths = DEADLY if certain else min(self.deaths + 1, DEADLY)
        if known_deadly:
            self.deaths = DEADLY
        self.accompanied = False
        left = self.in_vain < MAX_ATTEMPTS and self.deaths < DEADLY
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
