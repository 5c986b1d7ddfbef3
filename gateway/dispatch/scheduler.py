"""Shell. Sends each request to a worker, or queues it. Queued requests are sent in turn once
something has become free.
"""

from __future__ import annotations

import math

from gateway.dispatch.deadly.requests import DeadlyRequests
from gateway.dispatch.endings import RequestEndings
from gateway.dispatch.lifecycle import RequestEvent
from gateway.dispatch.placement import Placement
from gateway.dispatch.queue.waiting_time import WaitingTime
from gateway.dispatch.request import InFlightRequest
from gateway.dispatch.request_tables import RequestTables
from gateway.dispatch.settings import TimeAndChance
from gateway.dispatch.settlement import Settlement
from gateway.routing.policy import Blocked, Defer
from gateway.telemetry.prometheus import Metrics
from shared.adapters.identity import AdapterKey
from shared.errors import LoraplexError, Overloaded, ResponseNotFound

NO_WORKER = "worker"
"""What a request waits for where no worker of its model serves."""


class Scheduler:
    """Owns the way of a request from the queue to a worker."""

    def __init__(
        self,
        tables: RequestTables,
        placement: Placement,
        endings: RequestEndings,
        settlement: Settlement,
        waiting_time: WaitingTime,
        metrics: Metrics,
        deadly: DeadlyRequests,
        time_and_chance: TimeAndChance,
    ) -> None:
        self._tables = tables
        self._admission = tables.admission
        self._placement = placement
        self._endings = endings
        self._settlement = settlement
        self._waiting_time = waiting_time
        self._metrics = metrics
        self._deadly = deadly
        self._clock = time_and_chance.clock
        self._call_at = time_and_chance.call_at
        self._alarm = math.inf  # when the policy wants to be asked again, whatever happens
        self._admitting: str | None = None

    def dispatch(self, request: InFlightRequest) -> Blocked | None:
        """What the request must wait for. None: it does not wait any more, because it was sent, or
        has failed here.
        """
        try:
            return self._place(request)
        except Exception as exc:  # it is often called at the end of somebody else's request
            self._endings.break_off(request, exc)
            return None

    def enqueue(self, request: InFlightRequest) -> LoraplexError | None:
        """Queues a new request. Returns the error for its client if the queue is full or too long.

        Where others wait, the new one may be the first that can be sent, so it is tried at once.
        """
        base = request.model.base
        refusal = self._waiting_time.refusal(request)
        if refusal is None and not self.queue(request):
            after_s = self._waiting_time.retry_after_s(base)
            refusal = self._admission.bound(base).refusal(after_s)
            if not self._tables.fleet.routable(base):
                self._admission.turned_away(base, self._clock() + after_s)
        if refusal is None:
            self.admit_waiting(base, request.key)
        return refusal

    def queue(self, request: InFlightRequest, *, admitted: bool = False) -> bool:
        """Queues the request. False: the queue is full."""
        for _ in range(2):
            request.ticket = self._admission.offer(
                request.model.base,
                request,
                self._clock(),
                request.flow,
                request.requester.weight,
                admitted=admitted,
                deadline=request.wait_until or None,
            )
            if request.ticket is not None or not self.make_way(request):
                break
        return request.ticket is not None

    def take_back(self, request: InFlightRequest) -> None:
        """The request's worker has another trial: it is as if the request had not been sent. It is
        placed again, or has waited for too long.
        """
        now = self._clock()
        self._tables.unreserve(request)
        request.lifecycle.not_begun()
        self._settlement.take_back(request)
        if request.lifecycle.attempts:
            request.t_lost = request.t_lost or now
        else:  # no worker has had it yet, so none was lost
            request.t_sent = request.t_first_sent = 0.0
            request.choice = None
        request.wait_until = request.wait_until or now + self._admission.timeout_s
        if now < request.wait_until:
            self.place_again(request)
        else:
            self._endings.time_out(request, self.too_late(request.model.base))

    def place_again(self, request: InFlightRequest) -> None:
        """The request has lost its worker. If no other one takes it, it waits as the first."""
        if self.dispatch(request) is not None:
            self.queue(request, admitted=True)
            if request.client_request.streams:
                self._tables.keepalive.enter(request, self._clock())

    def too_late(self, base: str) -> Overloaded:
        """The error for a request that has waited for as long as the queue allows."""
        after_s = self._waiting_time.retry_after_s(base)
        return Overloaded("No worker became free in time.", retry_after_s=after_s)

    def make_way(self, request: InFlightRequest) -> bool:
        """Removes one request from a full queue for this one. It belongs to a tenant with more
        places, or is of the same tenant and may wait longer.
        """
        base, requester = request.model.base, request.requester
        gone = self._admission.give_way(
            base, requester.tenant, requester.weight, requester.priority
        )
        if gone is None:
            return False
        late = Overloaded(
            "The queue is full; this request has given its place to another one.",
            retry_after_s=self._waiting_time.retry_after_s(base),
        )
        self._endings.isolated(gone, self._endings.fail, gone, late)
        return True

    def admit_waiting(self, base: str, key: AdapterKey | None = None) -> None:
        """Something may have become free, perhaps for requests for the adapter `key`. Events that
        this causes do not start it again from inside.
        """
        if self._admitting is None and base in self._admission.queues:
            self._admitting = base
            try:
                self._admission.admit_waiting(base, self._dispatch_waiting, key)
            finally:
                self._admitting = None

    def try_deferred(self) -> None:
        """Tries all queues again if the policy has asked for that, and its time has come."""
        if self._clock() >= self._alarm:
            self._alarm = math.inf
            for base in self._admission.bases():
                self.admit_waiting(base)

    def _dispatch_waiting(self, request: InFlightRequest) -> Blocked | None:
        """Like `dispatch`, but a request that can no longer finish in its time is not begun, nor
        one of which workers have died meanwhile. One that goes on from what a worker stores ends
        with that worker.
        """
        only_on = request.model.only_on
        if only_on and not self._tables.fleet.lives(only_on):
            gone = ResponseNotFound("The workers that stored what this request refers to are gone.")
            self._endings.isolated(request, self._endings.fail, request, gone)
            return None
        why = self._refusal(request, self._clock())
        if why is not None:
            self._endings.isolated(request, self._endings.fail, request, why)
            return None
        return self.dispatch(request)

    def _refusal(self, request: InFlightRequest, now: float) -> LoraplexError | None:
        """Why a request that waits is not begun any more. None: it may be."""
        try:
            self._deadly.check(request, now)
        except LoraplexError as exc:
            return exc
        return self._waiting_time.too_late(request, now)

    def _place(self, request: InFlightRequest) -> Blocked | None:
        now = self._clock()
        explains = self._metrics.recorder.explains(now)
        # the candidates as they are before the choice, which changes them
        candidates = self._placement.candidates(request) if explains else ()
        away_from = "" if request.choice is None else request.choice.worker.id
        decision = self._placement.place(request, now)
        if isinstance(decision, Defer):
            served = self._tables.fleet.routable(request.model.base)
            request.blocked = decision.blocked._value_ if served else NO_WORKER
            if request.apart and request.ticket is not None and request.ticket.flow != request.flow:
                request.wait_until = request.ticket.deadline
                self._tables.leave_queue(request)
                self.queue(request, admitted=True)
            if decision.until is not None:
                self._ask_again(max(decision.until, now))
            return decision.blocked
        if request.ticket is not None:
            if request.suspicion:  # the worker may refuse it
                request.wait_until = request.ticket.deadline
            self._tables.leave_queue(request)
        request.lifecycle.on(RequestEvent.DISPATCHED)
        self._tables.streams.add(request)
        request.candidates = candidates
        request.t_first_sent = request.t_first_sent or request.t_sent
        if request.t_lost:
            request.moved_s += request.t_sent - request.t_lost
            request.t_lost = 0.0
        if request.moving:
            request.moves += 1
            self._metrics.moved(request.moving, away_from)
            request.moving = ""
        self._settlement.charge(request, decision)
        self._metrics.dispatched(request.model.base, decision.reason._value_)
        return None

    def _ask_again(self, when: float) -> None:
        if when < self._alarm:
            self._alarm = when
            if self._call_at is not None:
                self._call_at(when, self.try_deferred)
