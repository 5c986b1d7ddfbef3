"""Shell. Ends requests: because the client left, because of an error, or because code of ours
raised. Whatever happens, a request ends once, and what it holds is released.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec

from gateway.dispatch.deadly.requests import DeadlyRequests
from gateway.dispatch.lifecycle import RequestEvent, RequestPhase
from gateway.dispatch.request import NO_CLIENT, InFlightRequest, cannot_go_on
from gateway.dispatch.request_tables import RequestTables
from gateway.dispatch.settlement import Settlement
from gateway.dispatch.workers.outbox import WorkerOutbox
from gateway.telemetry.unexpected_errors import UnexpectedErrors
from shared.adapters.identity import AdapterKey
from shared.errors import DeadlineExceeded, LoraplexError
from shared.link import messages

P = ParamSpec("P")
NO_WORKER = "no_worker"
"""Why an answer cannot be continued that has waited for another worker until its time was over."""


class RequestEndings:
    """Every request that was let in ends here.

    Args:
        on_room: called with the base model and the adapter of a request that has ended. Others may
            have its place now.
    """

    def __init__(
        self,
        tables: RequestTables,
        settlement: Settlement,
        outbox: WorkerOutbox,
        deadly: DeadlyRequests,
        unexpected_errors: UnexpectedErrors,
        clock: Callable[[], float],
        on_room: Callable[[str, AdapterKey | None], None],
    ) -> None:
        self._tables = tables
        self._settlement = settlement
        self._outbox = outbox
        self._deadly = deadly
        self._unexpected_errors = unexpected_errors
        self._clock = clock
        self._on_room = on_room
        self.ending = False
        """Whether this gateway ends, so that no answer goes on here without a client."""

    def cancel(self, request: InFlightRequest) -> None:
        """The client left. Once the request is over, it does nothing. An answer for which a client
        may ask again goes on without one: with the same key, or in the background. If this gateway
        ends, it goes on at its worker alone.
        """
        stays = request.sink is NO_CLIENT
        if request.lifecycle.over or (stays and not self.ending):
            return
        if not (request.t_head or stays):
            self._note_abandoned(request)
        on_worker = request.lifecycle.phase is not RequestPhase.QUEUED
        background = request.client_request.background
        knows_id = bool(request.t_head)  # of an answer in the background
        goes_on = knows_id if background else request.client_request.keep_s and on_worker
        if goes_on and not self.ending:
            self.leave_client(request)
        else:
            self.cancel_on_worker(request, over=background and not knows_id)
            self.end(request, RequestEvent.CANCEL)

    def leave_client(self, request: InFlightRequest) -> None:
        """The answer goes on without its client."""
        request.sink = NO_CLIENT
        self._tables.streams.write_elsewhere(request)
        self._tables.keepalive.leave(request)

    def give_up(self, request: InFlightRequest, error: LoraplexError) -> None:
        """The request's time is over. It leaves the queue or its worker, and the client is told
        why. Once the request is over, it does nothing.
        """
        if not request.lifecycle.over:
            self.cancel_on_worker(request, over=isinstance(error, DeadlineExceeded))
            self.fail(request, error)

    def time_out(self, request: InFlightRequest, error: LoraplexError) -> None:
        """The request has waited for too long."""
        self._note_abandoned(request)
        self.isolated(request, self.fail, request, error)

    def fail(self, request: InFlightRequest, error: LoraplexError) -> None:
        if isinstance(error, DeadlineExceeded) and request.sink is not NO_CLIENT:
            self._note_abandoned(request)
        if request.journal.begun and request.lifecycle.phase is RequestPhase.QUEUED:
            error = cannot_go_on(request, error, NO_WORKER)
        self.tell(request, error)
        self.end(request, RequestEvent.FAIL)

    def tell(self, request: InFlightRequest, error: LoraplexError) -> None:
        """The client hears why it gets no answer, or no more of it. If workers died of the request,
        that is noted first: the client may ask again at once, at another process.
        """
        self._note_deaths(request)
        request.note_error(error)
        request.sink.fail(error)

    def end(self, request: InFlightRequest, event: RequestEvent) -> None:
        request.lifecycle.on(event)
        self._tables.unreserve(request)
        self.close(request)

    def close(self, request: InFlightRequest) -> None:
        """The only place where a request leaves the dispatcher. Its phase is final, and its
        reservation was released.
        """
        self._tables.forget(request)
        request.t_end = self._clock()
        if request.lifecycle.phase is RequestPhase.FINISHED:
            self._deadly.forget(request, request.t_end)
        elif request.lifecycle.phase is RequestPhase.ABORTED:
            self._note_deaths(request)  # of one that failed `tell` has noted them
        self._settlement.settle(request)
        if request.model.base in self._tables.admission.queues:
            self._on_room(request.model.base, request.key)

    def cancel_on_worker(self, request: InFlightRequest, *, over: bool = False) -> None:
        if request.lifecycle.phase is not RequestPhase.QUEUED and request.choice is not None:
            self._outbox.send(request.choice.worker, messages.Cancel(request.sid, over))
            request.stopped = True

    def isolated(
        self, request: InFlightRequest, step: Callable[P, object], *args: P.args, **kw: P.kwargs
    ) -> None:
        """Performs one step of one request, so that an exception in it ends only this request."""
        try:
            step(*args, **kw)
        except Exception as exc:
            self.break_off(request, exc)

    def break_off(self, request: InFlightRequest, exc: Exception) -> None:
        """Ends the request with an error, whatever its state, and releases what it holds. Each step
        is guarded by itself, since any of them may be the one that raised.
        """
        error = self._unexpected_errors.note(exc, request.client_request.request_id)

        def fail() -> None:
            request.note_error(error)
            request.lifecycle.on(RequestEvent.FAIL)
            request.t_end = self._clock()
            self._settlement.settle(request)

        # the client of one that was over has heard, or its Sink is at it
        failing = [] if request.lifecycle.over else [lambda: request.sink.fail(error), fail]
        steps: list[Callable[[], object]] = [
            lambda: self.cancel_on_worker(request),
            lambda: self._tables.unreserve(request),
            lambda: self._tables.fleet.release(request.sid),
            lambda: self._tables.forget(request),
            *failing,
            lambda: self._on_room(request.model.base, request.key),
        ]
        for undo in steps:
            try:
                undo()
            except Exception as again:
                self._unexpected_errors.note(again, request.client_request.request_id)

    def _note_deaths(self, request: InFlightRequest) -> None:
        if request.lifecycle.deaths:
            self._deadly.note(request, self._clock(), ended=True)

    def _note_abandoned(self, request: InFlightRequest) -> None:
        if request.requester.in_batch:
            return  # its client does wait
        self._tables.admission.abandonment.ended(request.requester.tenant, in_vain=True)
