"""Shell. Owns the requests in flight: joins the pure parts (fleet, routing, admission) with the
shells that move a request.

A request comes in by `submit`. The Scheduler gives it to a worker in one synchronous step, or
queues it. What the workers send comes in by `inbox`. Its frames go straight from the link's
callback to its Sink (see streams/delivery.py). No task runs per request or per token here.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import msgspec

from gateway.dispatch.deadly.news import DeathNews
from gateway.dispatch.deadly.requests import DeadlyRequests
from gateway.dispatch.deadly.trials import Trials
from gateway.dispatch.endings import RequestEndings
from gateway.dispatch.failover import Failover
from gateway.dispatch.placement import Placement
from gateway.dispatch.queue.admission import Admission
from gateway.dispatch.queue.overload import DrainRates
from gateway.dispatch.queue.waiting_time import MAX_RETRY_AFTER_S, WaitingTime
from gateway.dispatch.request import NO_CLIENT, InFlightRequest, routing_request_of
from gateway.dispatch.request_summary import OPEN, ended_request, refused_as
from gateway.dispatch.request_tables import RequestTables
from gateway.dispatch.scaling_status import (
    NONE_MOVABLE,
    ScalingState,
    model_loads,
    movable_by_worker,
)
from gateway.dispatch.scheduler import Scheduler
from gateway.dispatch.settings import DispatchSettings, TimeAndChance
from gateway.dispatch.settlement import Settlement
from gateway.dispatch.stream_events import StreamEvents
from gateway.dispatch.streams.delivery import FrameDelivery
from gateway.dispatch.streams.journal import keep_within
from gateway.dispatch.streams.keepalive import StreamKeepalive, comment
from gateway.dispatch.workers.commands import WorkerCommands
from gateway.dispatch.workers.inbox import WorkerInbox
from gateway.dispatch.workers.membership import Membership
from gateway.dispatch.workers.outbox import Transport, WorkerOutbox
from gateway.fleet.fleet import Fleet, WorkerLost, WorkerView
from gateway.routing.policy import Candidate, Policy, RoutingRequest
from gateway.supervisor.autoscaling.reports import ModelLoad, ModelStatus
from gateway.telemetry.ended_request import EndedRequest
from gateway.telemetry.prometheus import Metrics
from gateway.telemetry.unexpected_errors import UnexpectedErrors
from shared.adapters.identity import AdapterKey, AdapterRef, StoredAdapter
from shared.errors import LoraplexError, ModelUnavailable, Overloaded, WorkerUnavailable
from shared.link import messages

MOVE_S = 2.0
"""A worker takes what another one has lost within this time, unless all are full."""


class Dispatcher:
    """`policy` decides where each request goes, `fleet` knows the workers, and `transport` carries
    the messages. `inbox` takes what the workers send. `deadly` is what all gateway processes know
    of requests that kill workers. None: this process is the only one.
    """

    def __init__(
        self,
        fleet: Fleet,
        policy: Policy,
        admission: Admission[InFlightRequest],
        transport: Transport,
        metrics: Metrics,
        settings: DispatchSettings,
        time_and_chance: TimeAndChance,
        deadly: DeadlyRequests | None = None,
    ) -> None:
        self.fleet, self._policy, self.policy = fleet, policy, policy.name
        self._admission, self._metrics = admission, metrics
        self._bounds = settings
        self.clock = clock = time_and_chance.clock
        self.on_nobody_serves: Callable[[], None] = lambda: None
        """Called when a request comes for a model that has no worker: one should be started."""
        self._draining = self._closed = False
        self._lost_at = -math.inf  # when a worker was lost last
        self._cannot_start: dict[str, str] = {}
        self._unexpected_errors = errors = UnexpectedErrors(metrics)
        self._scaling = ScalingState()

        self._keepalive = StreamKeepalive(settings.keepalive_s)
        self._tables = tables = RequestTables(fleet, admission, self._keepalive)
        self._streams, self._open = tables.streams, tables.open

        drains = DrainRates()
        self._settlement = settlement = Settlement(policy, admission, metrics, drains)
        self._waiting_time = waiting = WaitingTime(fleet, admission, drains, self._scaling)

        self._deadly = deadly = DeadlyRequests() if deadly is None else deadly
        trials = Trials(tables.streams, deadly)

        sids = itertools.count(1)
        self._outbox = outbox = WorkerOutbox(transport)
        self._news = DeathNews(fleet, outbox)
        if not deadly.alone:
            deadly.tell = self._news.tell
        on_room = self._admit_waiting
        self._membership = members = Membership(
            fleet, policy, outbox, clock, self._on_lost, on_room
        )
        unreachable = members.unreachable
        self._commands = commands = WorkerCommands(fleet, outbox, sids, unreachable)
        self.answers = commands.answers
        self._placement = place = Placement(
            fleet, policy, outbox, sids, time_and_chance, trials, unreachable
        )

        self._endings = end = RequestEndings(
            tables, settlement, outbox, deadly, errors, clock, on_room
        )
        self._scheduler = Scheduler(
            tables, place, end, settlement, waiting, metrics, deadly, time_and_chance
        )
        self._failover = failover = Failover(
            tables, self._scheduler, end, members, metrics, deadly, trials, clock
        )
        events = StreamEvents(
            end, failover, self._keepalive, outbox, metrics, deadly, clock, on_room
        )
        delivery = FrameDelivery(tables.streams, events)
        self.inbox = WorkerInbox(
            tables.streams, delivery, failover, settlement, members, commands, metrics, self._heard
        )

    # ---- the client's side -----------------------------------------------------------------------

    @property
    def open_requests(self) -> int:
        return len(self._open)

    def each_open(self) -> Iterator[InFlightRequest]:
        return iter(self._open)

    @property
    def draining(self) -> bool:
        return self._draining

    def open_request(self, request_id: str) -> EndedRequest | None:
        """What is known by now of an open request with this id."""
        for request in self._open:
            if request.client_request.request_id == request_id:
                so_far = ended_request(request, OPEN)
                return msgspec.structs.replace(so_far, t_end=self.clock())
        return None

    def may_move(self, answer_id: str) -> bool:
        """Whether an answer that no worker stores may be on its way to one: it is open here, or a
        worker was lost a moment ago whose answers may be open at another gateway.
        """
        if self.clock() - self._lost_at < MOVE_S:
            return True
        return any(request.client_request.answer_id == answer_id for request in self._open)

    def queued(self, base: str) -> int:
        return self._admission.depth(base)

    def explain(self, routing_request: RoutingRequest) -> list[Candidate]:
        """Every worker that could get such a request now, the best first, with its costs."""
        return self._placement.explain(routing_request)

    def check_deadly(self, request: InFlightRequest) -> None:
        """Call it before `submit`. Raises WorkersDied if workers died of the same request a while
        ago, and ModelUnavailable if they died of several from there.
        """
        self._deadly.recall(request, self.clock())

    def submit(self, request: InFlightRequest) -> None:
        """Sends the request to a worker, or queues it.

        Raises Overloaded if too many requests are open, or if the queue is full or too long. Raises
        DeadlineExceeded if its turn would come too late. Raises WorkerUnavailable if this gateway
        shuts down, and ModelUnavailable if no worker of the model can start.
        """
        request.t_start = self.clock()
        try:
            self._let_in(request)
        except LoraplexError as refusal:
            request.note_error(refusal)
            request.t_end = self.clock()
            ended = ended_request(request, refused_as(request))
            self._metrics.refused(ended)
            if request.trace is not None:
                request.trace.ended(ended)
            raise

    def _let_in(self, request: InFlightRequest) -> None:
        if self._closed:
            raise _shutting_down()
        tenant, bounds = request.requester.tenant, self._bounds
        if self._open.too_large(tenant, len(request.client_request.body), bounds.max_body_bytes):
            raise Overloaded(
                f"The bodies of all open requests have too many bytes (limit "
                f"{bounds.max_body_bytes}).",
                retry_after_s=1.0,
            )
        full = self._open.full(tenant, bounds.max_requests)
        if full and not self._scheduler.make_way(request):
            raise Overloaded(
                f"Too many requests at once (limit {bounds.max_requests}).", retry_after_s=1.0
            )
        try:
            self._enter(request)
        except LoraplexError:
            raise
        except Exception as exc:
            self._endings.break_off(request, exc)

    def _enter(self, request: InFlightRequest) -> None:
        base = request.model.base
        request.routing_request = routing_request_of(request)
        self._open.add(request, request.requester.tenant, len(request.client_request.body))
        # Where others wait it takes its turn among them.
        if base in self._admission.queues or self._scheduler.dispatch(request) is not None:
            why = self.why_unavailable(base)
            refusal = _cannot_start(base, why) if why else self._scheduler.enqueue(request)
            if not self.fleet.routable(base):
                self.on_nobody_serves()
            if refusal is not None:
                self._open.discard(request)
                self._policy.left(request.routing_request, self.clock())
                raise refusal
        if request.client_request.streams and not request.lifecycle.over:
            self._keepalive.enter(request, request.t_start)

    def cancel(self, request: InFlightRequest) -> None:
        """The client left. See RequestEndings.cancel."""
        self._endings.cancel(request)

    def give_up(self, request: InFlightRequest, error: LoraplexError) -> None:
        """The request's time is over. It leaves the queue or its worker, and the client is told
        why. Once the request is over, it does nothing.
        """
        self._endings.give_up(request, error)

    def drain_worker(self, worker: WorkerView, wait_s: float, reason: str) -> None:
        """The worker gets no new requests. Those that have not ended within `wait_s` move to other
        workers.
        """
        self._outbox.send(worker, messages.DrainWorker(wait_s, reason))
        self._membership.leaves(worker, reason)

    def warm_with(self, wanted_on: Callable[[WorkerView], Iterable[AdapterRef]]) -> None:
        """Adapters that new workers load first, beside those that they are likely to be asked
        for.
        """
        self._membership.wanted_on = wanted_on

    def configure(self, settings: DispatchSettings) -> None:
        """Takes changed limits. The interval of comments stays."""
        self._bounds = settings

    def drain(self) -> None:
        """This process is no longer ready. Requests on open connections are still served."""
        self._draining = self._endings.ending = True
        self._give_up_waiting()
        for request in self._streams:
            if request.sink is NO_CLIENT:
                self._endings.cancel(request)

    def abort_all(self) -> None:
        """The time of the drain is over. All requests end here, and no new one begins."""
        self._closed = True
        # those that wait first, so that none of them takes a place that the others leave
        for request in [*self._admission.items(), *self._streams]:
            self.give_up(request, _shutting_down())

    def close_books(self) -> None:
        """The last step of an end: what workers have not reported yet is estimated."""
        self._settlement.expire(math.inf)

    # ---- the workers' side -----------------------------------------------------------------------

    def send_command(
        self,
        worker: WorkerView,
        action: messages.AdapterAction,
        adapter: AdapterRef,
        stored: StoredAdapter | None,
    ) -> asyncio.Future[None]:
        """See WorkerCommands.send."""
        return self._commands.send(worker, action, adapter, stored)

    def greet(self, worker: WorkerView) -> None:
        """See Membership.greet."""
        self._membership.greet(worker)

    def worker_ended(
        self, worker: messages.WorkerId, epoch: int, reason: str, killed: bool = False
    ) -> None:
        """See Membership.ended."""
        self._membership.ended(worker, epoch, reason, killed)

    def cannot_start(self, models: Mapping[str, str]) -> None:
        """The supervisor reports which models cannot start, and why. Requests that wait for one are
        answered now.
        """
        self._cannot_start = dict(models)
        self._give_up_hopeless()

    def _give_up_hopeless(self) -> None:
        """What waits for a model that cannot start is answered now."""
        for request in self._admission.items():
            why = self.why_unavailable(request.model.base)
            if request.ticket is not None and why is not None:
                self._endings.fail(request, _cannot_start(request.model.base, why))

    def why_unavailable(self, base: str) -> str | None:
        """Why the model cannot be served: no worker serves, and none can start. None: it can be
        served, or may be soon.
        """
        if self.fleet.routable(base):
            return None
        return self._cannot_start.get(base) or self.fleet.cannot_start(base, self.clock())

    def tick(self) -> None:
        """Checks leases and queue deadlines, and sends comments to streams that wait. Call it a few
        times per second.
        """
        now = self.clock()
        self.audit()
        self._membership.expire(now)
        if self._draining:
            self._give_up_waiting()
        for request in self._admission.expire(now, self._scaling.awaited(self.fleet)):
            self._endings.time_out(request, self._scheduler.too_late(request.model.base))
        self._settlement.expire(now)
        self._news.tell_waiting()
        self._send_comments(now)
        journals = (request.journal for request in self._streams)
        self._metrics.journal_bytes = keep_within(journals, self._bounds.journals)
        self._scheduler.try_deferred()

    # ---- the supervisor's side -------------------------------------------------------------------

    @property
    def scaling(self) -> Mapping[str, ModelStatus]:
        """The supervisor's last report on each base model. Empty if there is no supervisor."""
        return self._scaling.models

    @property
    def from_zero(self) -> set[str]:
        """Base models that may have no worker, because a request starts one."""
        return self._scaling.from_zero

    def started_elsewhere(self, bases: Iterable[str]) -> None:
        """The first worker of these base models is started by something other than a supervisor."""
        self._scaling.elsewhere = frozenset(bases)

    def loads(self, bases: Iterable[str]) -> dict[str, ModelLoad]:
        """The load of each base model, as it is reported to the supervisor."""
        retiring = self._scaling.retiring
        movable = movable_by_worker(self._open, retiring) if retiring else NONE_MOVABLE
        waiting, shrinking = self._admission.items(), self._scaling.shrinking
        loads = model_loads(self.fleet, waiting, bases, movable, shrinking)
        now = self.clock()
        return {
            base: msgspec.structs.replace(load, queued=self._admission.demand(base, now))
            for base, load in loads.items()
        }

    def on_scaling(self, models: Mapping[str, ModelStatus]) -> None:
        """Called with the supervisor's report. Workers that retire get no new requests."""
        self._scaling.models = models
        for status in models.values():
            for name in status.retiring:
                worker = self.fleet.get(name)
                if worker is not None and worker.routable:
                    self._membership.leaves(worker, "scaled down")

    def audit(self) -> bool:
        """True if the tables agree: each open request waits in the queue or has one reservation.
        Disagreements are logged, counted and repaired. Call it between two messages.
        """
        found = self._tables.discrepancies()
        if found is None:
            return True
        self._metrics.repaired(len(found))
        for sid in found.unowned:
            self.fleet.release(sid)
        for request in (*found.unreserved, *found.nowhere):
            self._endings.break_off(request, LookupError("its reservation is gone"))
        return False

    def _admit_waiting(self, base: str, key: AdapterKey | None = None) -> None:
        self._scheduler.admit_waiting(base, key)

    def _heard(self, known: messages.KnownDeaths) -> None:
        self._deadly.heard(known, self.clock())

    def _on_lost(self, lost: WorkerLost) -> None:
        self._lost_at = self.clock()
        self._failover.worker_lost(lost)
        self._commands.pending.lost(lost.worker, lost.epoch)
        self._give_up_hopeless()

    def _give_up_waiting(self) -> None:
        """While this gateway drains, its workers may have left already. Then no worker will take
        the waiting requests.
        """
        for request in self._admission.items():
            if request.ticket is not None and not self.fleet.routable(request.model.base):
                self._endings.fail(request, _shutting_down())

    def _send_comments(self, now: float) -> None:
        turns = self._keepalive.turns(now)
        waiting = any(request.ticket is not None for request in turns)
        positions = self._admission.positions() if waiting else {}
        awaited = self._scaling.awaited(self.fleet) if waiting else {}
        for request in turns:
            text = comment(request, positions, awaited)
            self._endings.isolated(request, request.sink.comment, text)


def _cannot_start(base: str, why: str) -> ModelUnavailable:
    return ModelUnavailable(
        f"The model `{base}` cannot start: {why}", retry_after_s=MAX_RETRY_AFTER_S
    )


def _shutting_down() -> WorkerUnavailable:
    return WorkerUnavailable("This server is shutting down.", retry_after_s=1.0)
