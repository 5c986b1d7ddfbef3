"""Shell. The room where the pure parts (fleet, routing, admission, request) meet the link.

A request comes in by `submit`, is given to a worker in one synchronous step (see placement.py) or
waits in the queue, and its frames go straight from the link's callback to its Sink (see
streams.py). No task runs per request or per token here.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import ParamSpec

from gateway.dispatch.commands import WorkerCommands
from gateway.dispatch.journal import keep_within
from gateway.dispatch.keepalive import Keepalive, comment
from gateway.dispatch.lifecycle import MAX_DEATHS, RequestEvent, RequestPhase, RetryBudget
from gateway.dispatch.membership import Membership
from gateway.dispatch.outbox import Transport, WorkerOutbox
from gateway.dispatch.placement import Placement
from gateway.dispatch.queue import fairness
from gateway.dispatch.queue.admission import Admission
from gateway.dispatch.queue.overload import Drain
from gateway.dispatch.report import REFUSED, ended_request
from gateway.dispatch.request import NOTHING_USED, InFlightRequest, UsedTokens, routing_request_of
from gateway.dispatch.scaling import ScalingState, model_loads
from gateway.dispatch.settings import DispatchSettings, TimeAndChance
from gateway.dispatch.streams import StreamTable
from gateway.fleet.fleet import Fleet, Lost, WorkerView
from gateway.routing.explanation import candidate_row
from gateway.routing.policy import Blocked, Candidate, Choice, Defer, Policy, RoutingRequest
from gateway.supervisor.autoscaling.reports import ModelLoad, ModelStatus
from gateway.telemetry.failures import Failures
from gateway.telemetry.prometheus import Metrics
from shared.adapters.identity import AdapterKey, AdapterRef, StoredAdapter
from shared.errors import (
    AdapterNotFound,
    CannotContinue,
    DeadlineExceeded,
    EngineFailure,
    LoraplexError,
    ModelUnavailable,
    Overloaded,
    WorkerUnavailable,
    from_refusal,
)
from shared.link import messages

MAX_UNSETTLED = 10_000
LAST_WORD_S = 2.0
"""How long a worker may take to say what a cancelled request has used; then it is estimated."""
MIN_RETRY_AFTER_S, MAX_RETRY_AFTER_S = 1.0, 60.0
NO_WORKER_RETRY_AFTER_S = 5.0
"""What a client is told to wait while no worker serves: about as long as one takes to come back."""
FIRST_IN_LINE = -(1 << 40)
"""The priority of a request that has lost its worker: clients can name none as low."""
MAX_CANDIDATES = 64
"""Workers of one decision that are kept, best first."""
P = ParamSpec("P")


class Dispatcher:
    """Owns the requests in flight. `policy` decides where each goes, `fleet` knows the workers, and
    `transport` carries the messages.
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
    ) -> None:
        self.fleet = fleet
        self._policy = policy
        self._admission = admission
        self._metrics = metrics
        self._max_requests = settings.max_requests
        self._journals = settings.journals
        self._retries = RetryBudget()
        self.clock = time_and_chance.clock
        self._call_at = time_and_chance.call_at
        sids = itertools.count(1)
        self._outbox = WorkerOutbox(transport)
        self._membership = Membership(fleet, policy, self._outbox, self.clock, self._on_lost)
        unreachable = self._membership.unreachable
        self._placement = Placement(fleet, policy, self._outbox, sids, time_and_chance, unreachable)
        self._commands = WorkerCommands(fleet, self._outbox, sids, unreachable)
        self._streams = StreamTable(self)
        self._keepalive = Keepalive(settings.keepalive_s)
        self._scaling = ScalingState()
        self.on_nobody_serves: Callable[[], None] = lambda: None
        """Called when a request waits for a model that has no worker: one should be started."""
        self._open: set[InFlightRequest] = set()
        self._drains: dict[str, Drain] = {}  # by base model
        # cancelled, until their workers say how far they had come
        self._unsettled: dict[messages.StreamId, InFlightRequest] = {}
        self._failures = Failures(metrics)
        self._draining = self._closed = False
        self._cannot_start: dict[str, str] = {}
        self._alarm = math.inf  # when the policy wants to be asked again, whatever happens
        self._admitting: str | None = None

    # ---- the client's side -----------------------------------------------------------------------

    @property
    def open_requests(self) -> int:
        return len(self._open)

    @property
    def draining(self) -> bool:
        return self._draining

    @property
    def policy(self) -> str:
        return self._policy.name

    def queued(self, base: str) -> int:
        return self._admission.depth(base)

    def explain(self, routing_request: RoutingRequest) -> list[Candidate]:
        """Every worker that could get such a request now, best first, with its costs."""
        return self._policy.explain(routing_request, self.fleet, self.clock())

    def submit(self, request: InFlightRequest) -> None:
        """Sends the request to a worker or queues it.

        Raises:
            Overloaded: too many requests are open, or the queue is full or too long.
            DeadlineExceeded: its turn would come too late for it.
            WorkerUnavailable: this gateway shuts down.
            ModelUnavailable: no worker of the model can start.
        """
        request.t_start = self.clock()
        try:
            self._let_in(request)
        except LoraplexError as refusal:
            request.code, request.t_end = refusal.code, self.clock()
            self._metrics.refused(ended_request(request, REFUSED))
            raise

    def _let_in(self, request: InFlightRequest) -> None:
        if self._closed:
            raise _shutting_down()
        if len(self._open) >= self._max_requests and not self._make_way(request):
            raise Overloaded(
                f"Too many requests at once (limit {self._max_requests}).", retry_after_s=1.0
            )
        try:
            self._enter(request)
        except LoraplexError:
            raise
        except Exception as exc:
            self._break(request, exc)

    def _enter(self, request: InFlightRequest) -> None:
        base = request.model.base
        if (why := self.why_unavailable(base)) is not None:
            raise _cannot_start(base, why)
        request.routing_request = routing_request_of(request)
        self._policy.arrived(request.routing_request, request.t_start)
        self._open.add(request)
        # Where others wait it takes its turn among them.
        if self._admission.depth(base) or self._dispatch(request) is not None:
            refusal = self._hopeless(request)
            if refusal is None and not self._queue(request):
                refusal = self._admission.bound(base).refusal(self._retry_after_s(base))
            if refusal is not None:
                self._open.discard(request)
                self._policy.left(request.routing_request, self.clock())
                raise refusal
            self._admit_waiting(base, request.key)
            if not self.fleet.routable(base):
                self.on_nobody_serves()
        if request.asked.streams and not request.life.over:
            self._keepalive.enter(request, request.t_start)

    def cancel(self, request: InFlightRequest) -> None:
        """The client left. Idempotent; a no-op once the request is over."""
        if not request.life.over:
            if not request.t_head:
                self._admission.impatience.ended(request.requester.tenant, in_vain=True)
            self._send_cancel(request)
            self._end(request, RequestEvent.CANCEL)

    def give_up(self, request: InFlightRequest, error: LoraplexError) -> None:
        """Its time is over: it leaves the queue or its worker, and the client hears why. A no-op
        once the request is over.
        """
        if not request.life.over:
            self._send_cancel(request)
            self._fail(request, error)

    def drain_worker(self, worker: WorkerView, wait_s: float, reason: str) -> None:
        """It gets nothing new from now on; what has not ended within `wait_s` moves."""
        self._outbox.send(worker, messages.DrainWorker(wait_s, reason))
        self._membership.leaves(worker, reason)

    def drain(self) -> None:
        """This process is not ready any more. What its open connections still ask is served."""
        self._draining = True
        self._give_up_waiting()

    def abort_all(self) -> None:
        """The drain's time is over: whatever still runs ends here, and nothing new begins."""
        self._closed = True
        # those that wait first, so that none of them takes a place that the others leave
        for request in [*self._admission.items(), *self._streams]:
            self.give_up(request, _shutting_down())

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

    def worker_ended(self, worker: messages.WorkerId, epoch: int, reason: str) -> None:
        """See Membership.ended."""
        self._membership.ended(worker, epoch, reason)

    def cannot_start(self, models: Mapping[str, str]) -> None:
        """`serve` says which models cannot start, and why. What waits for one is answered now."""
        self._cannot_start = dict(models)
        for request in self._admission.items():
            why = self.why_unavailable(request.model.base)
            if request.ticket is not None and why is not None:
                self._fail(request, _cannot_start(request.model.base, why))

    def why_unavailable(self, base: str) -> str | None:
        """The reason, if no worker of the model serves and none can start."""
        return None if self.fleet.routable(base) else self._cannot_start.get(base)

    def on_control(self, peer: bytes, data: bytes) -> None:
        try:
            beat = messages.decode_worker_control(data)
        except messages.DecodeError:
            self._metrics.undecodable("control")
            return
        if beat.protocol != messages.PROTOCOL_VERSION:
            self._metrics.undecodable("protocol")
            return
        self._membership.beat(peer, beat)
        self._admit_waiting(beat.base)

    def on_data(self, peer: bytes, data: bytes) -> None:
        try:
            message = messages.decode_worker_data(data)
        except messages.DecodeError:
            self._metrics.undecodable("data")
            return
        if type(message) is messages.Attach:
            self._membership.attach(message)
            worker = self.fleet.get(message.worker)
            if worker is not None:
                self._admit_waiting(worker.beat.base)
            return
        if type(message) is messages.Stopped:
            self._membership.stopped(message)
            return
        assert type(message) is messages.Step
        for done in message.done:
            request = self._streams.get(done.sid)
            if request is not None:
                request.done = done
            elif (left := self._unsettled.pop(done.sid, None)) is not None:
                left.done = done  # its client left before
                self._settle_bill(left)
            else:
                self._commands.pending.done(done.sid)
        self._streams.deliver(peer, message.frames)
        for refused in message.refused:
            request = self._streams.get(refused.sid)
            if request is None:
                self._commands.pending.refused(refused)
            else:
                self._isolated(request, self._on_refused, request, refused)

    def on_link(self, peer: bytes, carries: bool, heard: bool) -> None:
        """See LinkEvents."""
        base = self._membership.link(peer, carries, heard)
        if base is not None:
            self._admit_waiting(base)

    def tick(self) -> None:
        """Leases, queue deadlines, and a comment to streams that wait. Call it a few times per
        second.
        """
        now = self.clock()
        self.audit()
        self._membership.expire(now)
        if self._draining:
            self._give_up_waiting()
        for request in self._admission.expire(now, self._scaling.awaited(self.fleet)):
            after_s = self._retry_after_s(request.model.base)
            late = Overloaded("No worker became free in time.", retry_after_s=after_s)
            self._admission.impatience.ended(request.requester.tenant, in_vain=True)
            self._isolated(request, self._fail, request, late)
        for left in [r for r in self._unsettled.values() if now > r.t_end + LAST_WORD_S]:
            del self._unsettled[left.sid]
            self._settle_bill(left)
        self._send_comments(now)
        keep_within((request.journal for request in self._streams), self._journals)
        if now >= self._alarm:
            self._alarm = math.inf
            for base in self._admission.bases():
                self._admit_waiting(base)

    # ---- the supervisor's side -------------------------------------------------------------------

    @property
    def scaling(self) -> Mapping[str, ModelStatus]:
        """What the supervisor has said of each base model; empty without one."""
        return self._scaling.models

    def loads(self, bases: Iterable[str]) -> dict[str, ModelLoad]:
        """What this process tells the supervisor."""
        return model_loads(self.fleet, self._admission.items(), bases)

    def on_scaling(self, models: Mapping[str, ModelStatus]) -> None:
        """The supervisor's word: workers that retire get no new requests."""
        self._scaling.models = models
        for status in models.values():
            for name in status.retiring:
                worker = self.fleet.get(name)
                if worker is not None and worker.routable:
                    self._membership.leaves(worker, "scaled down")

    # ---- what follows from a frame (StreamOwner) -------------------------------------------------

    def stream_began(self, request: InFlightRequest) -> None:
        request.t_head = request.t_head or self.clock()
        self._keepalive.leave(request)
        request.life.on(RequestEvent.HEAD)

    def stream_diverged(self, request: InFlightRequest) -> None:
        self._send_cancel(request)
        self._unreserve(request)
        why = "The worker that was to continue this answer began another one."
        request.life.on(RequestEvent.FAIL)
        self._lost(request, CannotContinue(why), "answered_otherwise")

    def stream_ended(self, request: InFlightRequest) -> None:
        self._end(request, RequestEvent.END)

    def stream_stuck(self, request: InFlightRequest) -> None:
        self._metrics.slow_reader()
        self.cancel(request)

    def stream_broke(self, request: InFlightRequest, exc: Exception) -> None:
        """A client that has left is no failure, but its stream is over; anything else is ours."""
        if isinstance(exc, ConnectionError) and not request.life.over:
            self._isolated(request, self.cancel, request)
        else:
            self._break(request, exc)

    def stream_unknown(self, peer: bytes, sid: messages.StreamId) -> None:
        self._outbox.cancel(peer, sid)  # the worker has not heard yet

    # ---- dispatch and queue ----------------------------------------------------------------------

    def _drain(self, base: str) -> Drain:
        return self._drains.setdefault(base, Drain())

    def _places(self, base: str) -> int:
        return sum(w.beat.capacity for w in self.fleet.routable(base))

    def _hopeless(self, request: InFlightRequest) -> LoraplexError | None:
        """By the measured rate its turn does not come in its time."""
        base, asked, requester = request.model.base, request.asked, request.requester
        drain, places = self._drain(base), self._places(base)
        ahead = self._admission.ahead(base, requester.tenant, requester.weight)
        wait_s = drain.wait_s(ahead, places)
        if places and wait_s > self._admission.timeout_s:
            return Overloaded(
                f"All workers are busy; about {wait_s:.0f} s of requests wait already.",
                retry_after_s=self._retry_after_s(base),
            )
        if asked.timeout_s and wait_s + drain.service_s(asked.output_tokens) > asked.timeout_s:
            return DeadlineExceeded(
                f"The request cannot be finished within {asked.timeout_s:g} s: others wait.",
                retry_after_s=self._retry_after_s(base),
            )
        return None

    def _make_way(self, request: InFlightRequest) -> bool:
        """One request of a tenant with more places leaves the queue for this one."""
        base, requester = request.model.base, request.requester
        gone = self._admission.give_way(base, requester.tenant, requester.weight)
        if gone is None:
            return False
        late = Overloaded(
            "The queue is full; this request has given its place to another one.",
            retry_after_s=self._retry_after_s(base),
        )
        self._isolated(gone, self._fail, gone, late)
        return True

    def _dispatch_waiting(self, request: InFlightRequest) -> Blocked | None:
        """As `_dispatch`, but what can no longer be finished in its time is not begun."""
        asked = request.asked
        if asked.timeout_s and not request.t_head:
            service_s = self._drain(request.model.base).service_s(asked.output_tokens)
            if self.clock() + service_s > request.t_start + asked.timeout_s:
                late = DeadlineExceeded(
                    f"The request could not be begun in time to finish within "
                    f"{asked.timeout_s:g} s."
                )
                self._isolated(request, self._fail, request, late)
                return None
        return self._dispatch(request)

    def _dispatch(self, request: InFlightRequest) -> Blocked | None:
        """None: the request no longer waits: it is on its way to a worker, or has failed here.
        Else what it waits for.
        """
        try:
            return self._place(request)
        except Exception as exc:  # it is often called at the end of somebody else's request
            self._break(request, exc)
            return None

    def _place(self, request: InFlightRequest) -> Blocked | None:
        now = self.clock()
        explained = self._explained(request) if self._metrics.recorder.explains(now) else ()
        decision = self._placement.place(request)
        if isinstance(decision, Defer):
            request.blocked = decision.blocked._value_
            if decision.until is not None:
                self._ask_again(max(decision.until, self.clock()))
            return decision.blocked
        self._leave_queue(request)
        request.life.on(RequestEvent.DISPATCHED)
        self._streams.add(request)
        request.candidates = explained
        request.t_first_sent = request.t_first_sent or request.t_sent
        if request.t_lost:
            request.moved_s += request.t_sent - request.t_lost
            request.t_lost = 0.0
        routing_request, base = request.routing_request, request.model.base
        self._policy.sent(routing_request, decision, request.t_sent)
        self._admission.charge(base, request.flow, self._cost(request, decision))
        self._metrics.dispatched(base, decision.reason._value_)
        return None

    def _explained(self, request: InFlightRequest) -> tuple[dict[str, object], ...]:
        """The candidates as they are before the choice, which changes them."""
        found = self.explain(request.routing_request)
        return tuple(candidate_row(c) for c in found[:MAX_CANDIDATES])

    def _cost(self, request: InFlightRequest, choice: Choice) -> float:
        """What its tenant is charged: the tokens that it will likely take, and for an adapter that
        is loaded for it those that the engine could have made meanwhile.
        """
        asked, cost = request.routing_request, choice.cost
        load_s = 0.0 if cost is None else cost.load_s + cost.stall_s + cost.evict_s
        lost_tokens = load_s * self._drain(request.model.base).stream_tokens_per_s()
        return fairness.service(asked.prompt_tokens, asked.output_tokens + lost_tokens)

    def _queue(self, request: InFlightRequest, *, admitted: bool = False) -> bool:
        """False: the queue is full."""
        for _ in range(2):
            request.ticket = self._admission.offer(
                request.model.base,
                request,
                self.clock(),
                request.flow,
                request.requester.weight,
                admitted=admitted,
            )
            if request.ticket is not None or not self._make_way(request):
                break
        return request.ticket is not None

    def _leave_queue(self, request: InFlightRequest) -> None:
        if request.ticket is not None:
            self._admission.leave(request.ticket)
            request.ticket = None

    def _admit_waiting(self, base: str, key: AdapterKey | None = None) -> None:
        """Something may have become free, for requests for the adapter `key` in particular. What
        is set off from here does not start over inside it.
        """
        if self._admitting is None and self._admission.depth(base):
            self._admitting = base
            try:
                reserved_for = self._policy.reserved_for(base, self.fleet, self.clock())
                self._admission.admit_waiting(base, self._dispatch_waiting, key, reserved_for)
            finally:
                self._admitting = None

    def _ask_again(self, when: float) -> None:
        if when < self._alarm:
            self._alarm = when
            if self._call_at is not None:
                self._call_at(when, self.tick)

    def _give_up_waiting(self) -> None:
        """While this gateway drains, its workers may have gone already: nobody will come for what
        waits for them.
        """
        for request in self._admission.items():
            if request.ticket is not None and not self.fleet.routable(request.model.base):
                self._fail(request, _shutting_down())

    def _send_comments(self, now: float) -> None:
        turns = self._keepalive.turns(now)
        waiting = any(request.ticket is not None for request in turns)
        positions = self._admission.positions() if waiting else {}
        awaited = self._scaling.awaited(self.fleet) if waiting else {}
        for request in turns:
            text = comment(request, positions, awaited)
            self._isolated(request, request.sink.comment, text)

    def _retry_after_s(self, base: str) -> float:
        """Until the queue of now has been served, by the measured rate; a guess where that is not
        known. Where no worker serves, the time that the next one takes to start.
        """
        places = self._places(base)
        if not places:
            start_s = self._scaling.start_s(base)
            return max(MIN_RETRY_AFTER_S, start_s) if start_s else NO_WORKER_RETRY_AFTER_S
        depth = self._admission.depth(base)
        guess_s = self._drain(base).wait_s(depth, places) or depth / places
        return max(MIN_RETRY_AFTER_S, min(MAX_RETRY_AFTER_S, guess_s))

    # ---- a worker gives a request back -----------------------------------------------------------

    def _on_refused(self, request: InFlightRequest, refused: messages.Refused) -> None:
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
        self._on_loss(request, error, refused.retryable or others_may_have_it, died)

    def _on_lost(self, lost: Lost) -> None:
        for sid in lost.streams:
            request = self._streams.get(sid)
            if request is not None:
                streaming = request.life.phase is RequestPhase.STREAMING
                error = EngineFailure if streaming else WorkerUnavailable
                why = "The worker that served this request was lost."
                self._isolated(request, self._on_loss, request, error(why), True, True)
        self._commands.pending.lost(lost.worker, lost.epoch)

    def _on_loss(
        self, request: InFlightRequest, error: LoraplexError, retryable: bool, died: bool = False
    ) -> None:
        """Another worker takes the request, or goes on with the answer that the client has seen the
        begin of; or it queues again, first in line; or the client hears of `error`.
        """
        self._unreserve(request)
        obstacle = self._obstacle(request, retryable)
        if request.life.on_loss(retryable=not obstacle, died=died) is RequestPhase.FAILED:
            if request.life.deaths >= MAX_DEATHS:
                why = f"{MAX_DEATHS} workers died before they answered this request."
                error = EngineFailure(f"{why} It is given to no other one.")
            self._lost(request, error, obstacle or "attempts")
            return
        self._note_retry(request, error)
        if self._dispatch(request) is not None:
            self._queue(request, admitted=True)
            if request.asked.streams:
                self._keepalive.enter(request, self.clock())

    def _obstacle(self, request: InFlightRequest, retryable: bool) -> str:
        """Why no other worker can have the request; empty: one can."""
        if not retryable:
            return "refused"
        if request.journal.begun and request.journal.obstacle:
            return request.journal.obstacle
        return "" if self._retries.take(len(self._open), self.clock()) else "retry_budget"

    def _note_retry(self, request: InFlightRequest, error: LoraplexError) -> None:
        request.done = None
        request.t_lost = self.clock()
        request.flow = (FIRST_IN_LINE, *request.flow[1:])
        if request.journal.begun:
            request.moves += 1
            self._metrics.moved(type(error).code)
        else:
            self._metrics.retried()

    def _lost(self, request: InFlightRequest, error: LoraplexError, reason: str) -> None:
        """For good; its phase says so already."""
        if request.journal.begun:
            self._metrics.lost(reason)
            error = type(error)(f"{error.message} It cannot be continued elsewhere: {reason}.")
        request.code = error.code
        request.sink.fail(error)
        self._close(request)

    # ---- a request's end -------------------------------------------------------------------------

    def _fail(self, request: InFlightRequest, error: LoraplexError) -> None:
        if isinstance(error, DeadlineExceeded):
            self._admission.impatience.ended(request.requester.tenant, in_vain=True)
        request.code = error.code
        request.sink.fail(error)
        self._end(request, RequestEvent.FAIL)

    def _end(self, request: InFlightRequest, event: RequestEvent) -> None:
        request.life.on(event)
        self._unreserve(request)
        self._close(request)

    def _close(self, request: InFlightRequest) -> None:
        """The only place where a request leaves the dispatcher: its phase is final, and its
        reservation has been released.
        """
        self._forget(request)
        request.t_end = self.clock()
        self._settle_account(request)
        self._admit_waiting(request.model.base, request.key)

    def _settle_account(self, request: InFlightRequest) -> None:
        """Tells the policy, the fair shares and the metrics how the request ended."""
        base = request.model.base
        routing_request, done, now = request.routing_request, request.done, request.t_end
        if request.life.phase is RequestPhase.FINISHED and request.choice is not None:
            tokens = done.output_tokens if done is not None else 0
            served_s = now - request.t_sent
            self._policy.finished(routing_request, request.choice.worker, served_s, tokens, now)
            if tokens:
                self._drain(base).served(served_s, tokens // request.asked.choices)
            self._admission.impatience.ended(request.requester.tenant, in_vain=False)
        else:
            self._policy.left(routing_request, now)
        used = request.used = self._used(request)
        if request.t_sent:
            beyond_expected = fairness.service(
                used.prompt_tokens - routing_request.prompt_tokens,
                used.output_tokens - routing_request.output_tokens,
            )
            self._admission.charge(base, request.flow, beyond_expected)
        cancelled = request.life.phase is RequestPhase.ABORTED and request.t_sent
        if cancelled and done is None and len(self._unsettled) < MAX_UNSETTLED:
            self._unsettled[request.sid] = request
        else:
            self._settle_bill(request)
        self._metrics.finished(ended_request(request, request.life.phase._value_))

    def _settle_bill(self, request: InFlightRequest) -> None:
        request.used = self._used(request)
        if request.bill is not None:
            request.bill.settle(request)

    def _used(self, request: InFlightRequest) -> UsedTokens:
        """As the worker counted; else, where the client left, by the time that it was worked on."""
        done, asked = request.done, request.asked
        if done is not None:
            return UsedTokens(done.prompt_tokens, done.output_tokens)
        if not request.t_sent or request.life.phase is not RequestPhase.ABORTED:
            return NOTHING_USED
        rate = self._drain(request.model.base).stream_tokens_per_s()
        tokens = int((request.t_end - request.t_sent) * rate)
        most = asked.output_tokens or tokens
        return UsedTokens(asked.prompt_tokens, min(tokens, most) * asked.choices)

    def _unreserve(self, request: InFlightRequest) -> None:
        if self._streams.remove(request):
            self.fleet.release(request.sid)

    def _forget(self, request: InFlightRequest) -> None:
        """Idempotent."""
        self._leave_queue(request)
        self._keepalive.leave(request)
        self._open.discard(request)

    # ---- when code of ours raises ----------------------------------------------------------------

    def _isolated(
        self, request: InFlightRequest, step: Callable[P, object], *args: P.args, **kw: P.kwargs
    ) -> None:
        """Takes a step in the life of one request among others."""
        try:
            step(*args, **kw)
        except Exception as exc:
            self._break(request, exc)

    def _break(self, request: InFlightRequest, exc: Exception) -> None:
        """Ends the request with an error, wherever it stands, and gives back what it holds. Each
        step stands alone, for any of them may be the one that raised.
        """
        error = self._failures.note(exc, request.asked.request_id)

        def fail() -> None:
            request.code = error.code
            request.life.on(RequestEvent.FAIL)
            request.t_end = self.clock()
            self._settle_account(request)

        # the client of one that was over has heard, or its Sink is at it
        told = [] if request.life.over else [lambda: request.sink.fail(error), fail]
        steps: list[Callable[[], object]] = [
            lambda: self._send_cancel(request),
            lambda: self._unreserve(request),
            lambda: self.fleet.release(request.sid),
            lambda: self._forget(request),
            *told,
            lambda: self._admit_waiting(request.model.base, request.key),
        ]
        for undo in steps:
            try:
                undo()
            except Exception as again:
                self._failures.note(again, request.asked.request_id)

    def audit(self) -> bool:
        """True if the books agree: each open request waits or has one reservation. What does not
        agree is logged, counted and put right. Call it between two messages.
        """
        streams, reserved = len(self._streams), len(self.fleet.reserved)
        if streams == reserved and len(self._open) == streams + len(self._admission):
            return True
        found = self._streams.compare(self._open, self.fleet.reserved)
        if not found:
            return True
        self._metrics.repaired(len(found))
        for sid in found.unowned:
            self.fleet.release(sid)
        for request in (*found.unreserved, *found.nowhere):
            self._break(request, LookupError("its reservation is gone"))
        return False

    def _send_cancel(self, request: InFlightRequest) -> None:
        if request.life.phase is not RequestPhase.QUEUED and request.choice is not None:
            self._outbox.send(request.choice.worker, messages.Cancel(request.sid))


def _cannot_start(base: str, why: str) -> ModelUnavailable:
    return ModelUnavailable(
        f"The model `{base}` cannot start: {why}", retry_after_s=MAX_RETRY_AFTER_S
    )


def _shutting_down() -> WorkerUnavailable:
    return WorkerUnavailable("This server is shutting down.", retry_after_s=1.0)
