"""Shell. A worker gives a request back, or is lost. Another worker takes the request, or continues
the answer that the client has begun to see. If none can, the client gets the error.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from gateway.dispatch.deadly.requests import DeadlyRequests
from gateway.dispatch.deadly.trials import Trials
from gateway.dispatch.endings import RequestEndings
from gateway.dispatch.lifecycle import DEADLY, RequestEvent, RequestPhase, RetryBudget
from gateway.dispatch.request import InFlightRequest, cannot_go_on, message_of
from gateway.dispatch.request_tables import RequestTables
from gateway.dispatch.scheduler import Scheduler
from gateway.dispatch.workers.membership import Membership
from gateway.fleet.fleet import WorkerLost
from gateway.telemetry.prometheus import Metrics
from shared.errors import (
    AdapterNotFound,
    CannotContinue,
    EngineFailure,
    LoraplexError,
    OnTrial,
    WorkersDied,
    WorkerUnavailable,
    from_refusal,
)
from shared.link import messages

log = logging.getLogger("loraplex.dispatcher")

MAX_EARLIER = 8
"""Workers of one request that are remembered, for whoever asks why it was slow."""

WORKER_LOST = "worker_lost"
"""The reason of a move whose worker died, hung or was cut off. Its engine did nothing wrong."""


class Failover:
    """Decides what becomes of requests that have lost their worker. A budget bounds how many are
    tried again.
    """

    def __init__(
        self,
        tables: RequestTables,
        scheduler: Scheduler,
        endings: RequestEndings,
        membership: Membership,
        metrics: Metrics,
        deadly: DeadlyRequests,
        trials: Trials,
        clock: Callable[[], float],
    ) -> None:
        self._tables = tables
        self._scheduler = scheduler
        self._endings = endings
        self._membership = membership
        self._metrics = metrics
        self._deadly = deadly
        self._trials = trials
        self._clock = clock
        self._retries = RetryBudget()

    def refused(self, request: InFlightRequest, refused: messages.Refused) -> None:
        """The request's worker does not serve it."""
        self._endings.isolated(request, self._on_refused, request, refused)

    def worker_lost(self, lost: WorkerLost) -> None:
        for sid in lost.streams:
            request = self._tables.streams.get(sid)
            if request is not None:
                streaming = request.lifecycle.phase is RequestPhase.STREAMING
                error = EngineFailure if streaming else WorkerUnavailable
                why = "The worker that served this request was lost."
                self._endings.isolated(
                    request,
                    self._on_loss,
                    request,
                    error(why),
                    True,
                    died=not (lost.killed or lost.silent),
                    moved_by=WORKER_LOST,
                )

    def diverged(self, request: InFlightRequest) -> None:
        """The worker that should continue the answer makes another one."""
        self._endings.cancel_on_worker(request, over=True)
        self._tables.unreserve(request)
        why = "The worker that was to continue this answer began another one."
        request.lifecycle.on(RequestEvent.FAIL)
        self._lost(request, CannotContinue(why), "answered_otherwise")

    def _on_refused(self, request: InFlightRequest, refused: messages.Refused) -> None:
        if refused.code == OnTrial.code:
            self._trials.refused(request, self._clock())
            self._scheduler.take_back(request)
            return
        if request.choice is not None:
            worker = request.choice.worker
            request.refused_by |= {worker.id}
            # else it would get the request again at once, and soon be asked for the last time
            if refused.leaving:
                self._membership.leaves(worker, refused.message)
            elif refused.suspect:
                self._membership.suspects(worker, refused.message)
        others_may_have_it = request.model.elsewhere and refused.code == AdapterNotFound.code
        error = from_refusal(refused.code, refused.message)
        if isinstance(error, CannotContinue) and not request.journal.begun:
            request.journal.give_up("contradicted")  # the client has seen nothing: from the start
            others_may_have_it = True
        died = refused.leaving and isinstance(error, EngineFailure)
        retryable = refused.retryable or others_may_have_it
        handed_back = refused.leaving and not died
        self._on_loss(request, error, retryable, died=died, handed_back=handed_back)

    def _on_loss(
        self,
        request: InFlightRequest,
        error: LoraplexError,
        retryable: bool,
        *,
        died: bool = False,
        handed_back: bool = False,
        moved_by: str = "",
    ) -> None:
        """Another worker takes the request. If none has room, it queues again as the first. If none
        may have it, the client gets `error`. `moved_by` is the reason of a move; empty: the error's
        code.
        """
        alone = died and self._alone(request)
        self._tables.unreserve(request)
        obstacle = self._obstacle(request, retryable, handed_back)
        deaths = request.lifecycle.deaths
        after = request.lifecycle.on_loss(
            retryable=not obstacle,
            died=died,
            alone=alone,
            known_deadly=self._deadly.deadly(request, self._clock()),
            handed_back=handed_back,
        )
        if request.lifecycle.deaths > deaths and after is RequestPhase.QUEUED:
            self._deadly.note(request, self._clock(), ended=False)
        if after is RequestPhase.FAILED:
            if request.lifecycle.deaths >= DEADLY:
                error = WorkersDied("Workers died of this request. It is given to no other one.")
                log.error(
                    "workers died of a request",
                    extra={
                        "request": request.client_request.request_id,
                        "tenant": request.requester.tenant,
                        "base": request.model.base,
                        "earlier": request.earlier,
                    },
                )
            self._lost(request, error, obstacle or "attempts")
            return
        self._note_retry(request, error, moved_by or type(error).code)
        self._scheduler.place_again(request)

    def _alone(self, request: InFlightRequest) -> bool:
        """The request's worker has died. Returns whether no other request there had lost one since
        it last made progress. Where several processes give requests to it, nobody knows.
        """
        life, now = request.lifecycle, self._clock()
        if not life.accompanied and self._deadly.suspicion(request, now).deaths:
            there = self._tables.streams.of_peer(request.peer).requests.values()
            suspected = [
                other.lifecycle for other in there if self._deadly.suspicion(other, now).deaths
            ]
            for other in suspected:  # also for those that hear of the death later
                other.accompanied = len(suspected) > 1
        return self._deadly.alone and not life.accompanied

    def _obstacle(self, request: InFlightRequest, retryable: bool, handed_back: bool) -> str:
        """Why no other worker can take the request. Empty: one can. What a worker hands back as it
        leaves is no retry: a drain ends, and a rollout of all workers must not use up what keeps
        streams when one dies.
        """
        if not retryable:
            return "refused"
        if request.journal.begun and request.journal.obstacle:
            return request.journal.obstacle
        only_on = request.model.only_on
        if only_on and not any(w.routable for w in self._tables.fleet.lives(only_on)):
            return "stored_there"
        if handed_back or self._retries.take(len(self._tables.open), self._clock()):
            return ""
        return "retry_budget"

    def _note_retry(self, request: InFlightRequest, error: LoraplexError, reason: str) -> None:
        request.done, request.stopped = None, False
        request.t_lost, request.wait_until = self._clock(), 0.0
        away_from = "" if request.choice is None else request.choice.worker.id
        note = f"{away_from} had it: {message_of(error)}"
        request.earlier = (*request.earlier[1 - MAX_EARLIER :], note)
        if request.journal.begun:
            request.moving = reason
        else:
            self._metrics.retried()

    def _lost(self, request: InFlightRequest, error: LoraplexError, reason: str) -> None:
        """The request is lost for good. Its phase says so already."""
        if request.journal.begun:
            error = cannot_go_on(request, error, reason)
        self._endings.tell(request, error)
        self._endings.close(request)
