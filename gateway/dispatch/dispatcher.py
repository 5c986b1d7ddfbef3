"""Shell. The only room where the pure parts (fleet, routing, admission, request) meet the link.

A request comes in by `submit`, is given to a worker in one synchronous step (choose, reserve, send)
or waits in the queue, and its frames go straight from the link's callback to its Sink. No task runs
per request or per token here.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from gateway.dispatch import fairness
from gateway.dispatch.admission import Admission
from gateway.dispatch.commands import PendingCommands
from gateway.dispatch.keepalive import Keepalive, comment
from gateway.dispatch.lifecycle import RequestEvent, RequestPhase
from gateway.dispatch.request import InFlightRequest, adapter_key, flow_of, routing_request_of
from gateway.fleet.fleet import Changed, Fleet, FleetEvent, Joined, WorkerView
from gateway.fleet.peer_hints import peer_hints
from gateway.routing.policy import (
    Blocked,
    Candidate,
    Choice,
    Decision,
    Defer,
    Policy,
    RoutingRequest,
)
from gateway.telemetry.ended_request import EndedRequest
from gateway.telemetry.prometheus import Metrics
from shared.adapters.identity import AdapterRef, StoredAdapter, key_of
from shared.errors import (
    AdapterNotFound,
    EngineFailure,
    LoraplexError,
    Overloaded,
    WorkerUnavailable,
    from_refusal,
)
from shared.link import messages
from shared.link.sockets import SendResult

log = logging.getLogger("loraplex.dispatcher")


class Transport(Protocol):
    """What the dispatcher needs of the link: NOBLOCK sends to a worker's control and data sockets,
    by routing id.
    """

    def send_data(self, peer: bytes, data: bytes) -> SendResult: ...
    def send_control(self, peer: bytes, data: bytes) -> SendResult: ...


class Dispatcher:
    """Owns the flights. `policy` decides (see policies.make_policy), `fleet` remembers, `transport`
    carries.

    `wake_at` is told the time, on `clock`, at which `tick` should be called besides its regular
    calls (a policy wants to be asked again then); without it the regular calls have to do.
    `progress_s`: how often a stream that waits hears of it (0: never). `first_sid`: stream ids
    begin above it; those of a gateway's earlier life must not come again, for its workers may still
    send frames for them.
    """

    def __init__(
        self,
        fleet: Fleet,
        policy: Policy,
        admission: Admission[InFlightRequest],
        transport: Transport,
        metrics: Metrics,
        welcome: Callable[[], messages.Welcome],
        rng: random.Random,
        max_requests: int,
        clock: Callable[[], float] = time.monotonic,
        *,
        wake_at: Callable[[float], None] | None = None,
        progress_s: float = 0.0,
        first_sid: messages.StreamId = 0,
    ) -> None:
        self.fleet = fleet
        self._policy = policy
        self._admission = admission
        self._transport = transport
        self._metrics = metrics
        self._welcome = welcome
        self._rng = rng
        self._max_flights = max_requests
        self.clock = clock
        self._requests: dict[messages.StreamId, InFlightRequest] = {}
        self._streaming: dict[
            messages.StreamId, Callable[[bytes, bool], bool]
        ] = {}  # where the next frame of each goes that has had its first
        self._commands = PendingCommands()
        self._open = 0
        self._last_sid = first_sid
        self._progress = Keepalive(progress_s)
        self._draining = False
        self._wake_at = wake_at
        self._alarm = math.inf
        self._admitting: str | None = None
        self.idle = asyncio.Event()
        """Set once the dispatcher drains and no request is open."""

    # ---- the client's side -----------------------------------------------------------------------

    @property
    def open_requests(self) -> int:
        return self._open

    @property
    def draining(self) -> bool:
        return self._draining

    def queued(self, base: str) -> int:
        return self._admission.depth(base)

    def submit(self, request: InFlightRequest) -> None:
        """Sends the request to a worker or queues it.

        Raises:
            Overloaded: too many requests are open, or the queue is full.
        """
        request.t_start = self.clock()
        if self._draining:
            raise WorkerUnavailable("This server is shutting down.", retry_after_s=1.0)
        if self._open >= self._max_flights:
            raise Overloaded(
                f"Too many requests at once (limit {self._max_flights}).", retry_after_s=1.0
            )
        request.ask = routing_request_of(request)
        self._policy.arrived(request.ask, request.t_start)
        self._open += 1
        # Where others wait it takes its turn among them.
        if self._admission.depth(request.base) or self._dispatch(request) is not None:
            request.ticket = self._admission.offer(
                request.base, request, self.clock(), flow_of(request)
            )
            if request.ticket is None:
                self._open -= 1
                self._policy.left(request.ask, self.clock())
                raise self._admission.bound(request.base).refusal(self._retry_after_s(request.base))
            self._admit_waiting(request.base, request.ask)
        if request.streams:
            self._progress.enter(request, request.t_start)

    def send_command(
        self,
        worker: WorkerView,
        action: messages.AdapterAction,
        adapter: AdapterRef,
        stored: StoredAdapter | None,
    ) -> asyncio.Future[None]:
        """Asks the worker to do it; the future resolves once it is so. How long to wait is the
        caller's affair.

        It fails with: Overloaded, too many are open. WorkerUnavailable: it takes nothing, or was
        lost. Else what the worker refused it with.
        """
        self._last_sid += 1
        sid, peer = self._last_sid, messages.identity(worker.id, worker.beat.epoch)
        future = self._commands.begin(sid, worker.id, worker.beat.epoch)
        if future.done():
            return future
        if not worker.routable or self.fleet.get(worker.id) is not worker:
            self._commands.fail(
                sid, WorkerUnavailable("The worker does not serve.", retry_after_s=1.0)
            )
            return future
        if action is messages.AdapterAction.CACHE:  # what is on the disk alone is in no heartbeat
            future.add_done_callback(
                lambda f: (
                    self.fleet.cached(worker, adapter)
                    if not f.cancelled() and f.exception() is None
                    else None
                )
            )
        peers = peer_hints(self.fleet.pool(adapter.base), worker, key_of(adapter))
        sent = self._transport.send_data(
            peer, messages.encode(messages.AdapterCommand(sid, action, adapter, stored, peers))
        )
        if sent is SendResult.FULL:
            self._commands.fail(
                sid,
                WorkerUnavailable(
                    "The worker does not take messages fast enough.", retry_after_s=1.0
                ),
            )
        elif sent is not SendResult.OK:
            lost = self.fleet.unreachable(worker.id, worker.beat.epoch)
            self._apply([lost] if lost else [], None)
        return future

    def explain(self, ask: RoutingRequest) -> list[Candidate]:
        """Every worker that could get such a request now, best first, with its costs."""
        return self._policy.explain(ask, self.fleet, self.clock())

    @property
    def policy(self) -> str:
        return self._policy.name

    def cancel(self, request: InFlightRequest) -> None:
        """The client left. Idempotent; a no-op once the flight is over."""
        if request.life.over:
            return
        if request.life.phase is not RequestPhase.QUEUED:
            self._send_cancel(request)
        self._end(request, RequestEvent.CANCEL)

    def give_up(self, request: InFlightRequest, error: LoraplexError) -> None:
        """Its time is over: it leaves the queue or its worker, and the client hears why. A no-op
        once the flight is over.
        """
        if request.life.over:
            return
        if request.life.phase is not RequestPhase.QUEUED:
            self._send_cancel(request)
        self._fail(request, error)

    def drain(self) -> None:
        """No new requests from now on."""
        self._draining = True
        self._give_up_waiting()
        self._wake_if_idle()

    def _give_up_waiting(self) -> None:
        """While this gateway drains, its workers may have gone already: nobody will come for what
        waits for them.
        """
        for request in self._admission.items():
            if request.ticket is not None and not self.fleet.routable(request.base):
                self._fail(
                    request, WorkerUnavailable("This server is shutting down.", retry_after_s=1.0)
                )

    def abort_all(self) -> None:
        """The drain's time is over: whatever still runs ends here."""
        # first, so that none of them takes a place that the others leave
        for request in self._admission.items():
            if request.ticket is not None:
                self._fail(
                    request, WorkerUnavailable("This server is shutting down.", retry_after_s=1.0)
                )
        for request in [*self._requests.values()]:
            self._send_cancel(request)
            self._fail(
                request, WorkerUnavailable("This server is shutting down.", retry_after_s=1.0)
            )

    # ---- the workers' side -----------------------------------------------------------------------

    def on_control(self, peer: bytes, data: bytes) -> None:
        try:
            beat = messages.decode_worker_control(data)
        except messages.DecodeError:
            self._metrics.undecodable("control")
            return
        if beat.protocol != messages.PROTOCOL_VERSION:
            self._metrics.undecodable("protocol")
            return
        self._apply(self.fleet.beat(beat, self.clock()), peer)
        worker = self.fleet.get(beat.worker)
        if worker is not None:
            self._send_warm_set(worker)
        self._admit_waiting(beat.base)

    def on_data(self, peer: bytes, data: bytes) -> None:
        try:
            message = messages.decode_worker_data(data)
        except messages.DecodeError:
            self._metrics.undecodable("data")
            return
        if type(message) is messages.Attach:
            self.fleet.attach(message.worker, message.epoch)
            worker = self.fleet.get(message.worker)
            if worker:
                self._send_warm_set(worker)
                self._admit_waiting(worker.beat.base)
            return
        assert type(message) is messages.Step
        for done in message.done:
            request = self._requests.get(done.sid)
            if request is not None:
                request.done = done
            else:
                self._commands.done(done.sid)
        streaming = self._streaming
        for sid, flags, payload in message.frames:
            more = streaming.get(sid)
            if more is None:
                self._on_first(peer, sid, flags, payload)
            elif not more(payload, flags == messages.END):
                self._metrics.slow_reader()
                self.cancel(self._requests[sid])
            elif flags:
                self._end(self._requests[sid], RequestEvent.END)
        for refused in message.refused:
            self._on_refused(refused)

    def tick(self) -> None:
        """Leases, queue deadlines, and a word to those who wait; call it a few times per second."""
        now = self.clock()
        silent = self.fleet.expire(now)
        for lost in silent:
            # It may only have stood still, with these requests unread before it: nobody waits for
            # them any more.
            for sid in lost.streams:
                self._transport.send_data(
                    messages.identity(lost.worker, lost.epoch),
                    messages.encode(messages.Cancel(sid)),
                )
        self._apply(silent, None)
        if self._draining:
            self._give_up_waiting()
        for request in self._admission.expire(now):
            self._fail(
                request,
                Overloaded(
                    "No worker became free in time.",
                    retry_after_s=self._retry_after_s(request.base),
                ),
            )
        turns = self._progress.turns(now)
        tickets = self._admission.positions() if any(f.ticket is not None for f in turns) else {}
        for request in turns:
            request.sink.comment(comment(request, tickets))
        if now >= self._alarm:
            self._alarm = math.inf
            for base in self._admission.bases():
                self._admit_waiting(base)

    # ---- inside ----------------------------------------------------------------------------------

    def _dispatch(self, request: InFlightRequest) -> Blocked | None:
        """Choose, reserve and send in one step. None: it is on its way; else what it waits for."""
        ask = request.ask
        # their queues are at the bound: they take nothing for now, as if they had no room
        full: set[messages.WorkerId] = set()
        while True:
            now = self.clock()
            choice = self._choose(request, full, now)
            if isinstance(choice, Defer):
                if choice.until is not None:
                    self._ask_again(max(choice.until, now))
                return choice.blocked
            self._last_sid += 1
            sid = self._last_sid
            worker = choice.worker
            self.fleet.reserve(worker, sid, request.adapter, request.prompt_tokens)
            stored = None if choice.tier is messages.Tier.GPU else request.stored
            peers: tuple[str, ...] = ()
            if request.adapter is not None and choice.tier > messages.Tier.CPU:
                peers = peer_hints(
                    self.fleet.pool(request.base),
                    worker,
                    key_of(request.adapter),
                )
            message = messages.Generate(
                sid,
                request.path,
                request.request_id,
                request.body,
                request.adapter,
                stored,
                peers,
                request.model,
            )
            sent = self._transport.send_data(
                messages.identity(worker.id, worker.beat.epoch), messages.encode(message)
            )
            if sent is SendResult.OK:
                break
            self.fleet.release(sid)
            if sent is SendResult.FULL:
                full.add(worker.id)
                continue
            lost = self.fleet.unreachable(worker.id, worker.beat.epoch)
            self._apply([lost] if lost else [], None)
        if request.ticket is not None:
            self._admission.leave(request.ticket)
        request.sid, request.choice, request.ticket = sid, choice, None
        request.t_sent = now
        request.life.on(RequestEvent.DISPATCHED)
        self._requests[sid] = request
        self._policy.sent(ask, choice, now)
        self._admission.charge(
            request.base, flow_of(request), fairness.service(ask.prompt_tokens, ask.output_tokens)
        )
        self._metrics.dispatched(request.base, choice.reason._value_)
        return None

    def _choose(
        self, request: InFlightRequest, full: set[messages.WorkerId], now: float
    ) -> Decision:
        """Asks the policy for a worker. One that refused this request gets it again only if no
        other worker takes it.
        """
        choose, refused_by = self._policy.choose, request.refused_by
        if refused_by:
            choice = choose(request.ask, self.fleet, now, self._rng, full | refused_by)
            if isinstance(choice, Choice):
                return choice
        return choose(request.ask, self.fleet, now, self._rng, full)

    def _admit_waiting(self, base: str, ask: RoutingRequest | None = None) -> None:
        """Something may have become free; `ask` is the request that freed or wants it. What a pump
        sets off does not pump again inside it.
        """
        if self._admitting is None and self._admission.depth(base):
            self._admitting = base
            try:
                reserved_for = self._policy.reserved_for(base, self.fleet, self.clock())
                self._admission.admit_waiting(
                    base,
                    self._dispatch,
                    adapter_key(ask.adapter) if ask is not None else None,
                    reserved_for,
                )
            finally:
                self._admitting = None

    def _ask_again(self, when: float) -> None:
        if when < self._alarm:
            self._alarm = when
            if self._wake_at is not None:
                self._wake_at(when)

    def _on_first(self, peer: bytes, sid: messages.StreamId, flags: int, payload: bytes) -> None:
        """The first frame of an answer, or one that nobody waits for any more."""
        request = self._requests.get(sid)
        if request is not None:
            self._on_head(request, flags, payload)
        elif not flags & messages.END:  # the worker has not heard yet
            self._transport.send_data(peer, messages.encode(messages.Cancel(sid)))

    def _on_head(self, request: InFlightRequest, flags: int, payload: bytes) -> None:
        request.t_head = self.clock()
        self._progress.leave(request)
        end = bool(flags & messages.END)
        request.life.on(RequestEvent.HEAD)
        request.sink.head(flags >> messages.STATUS_SHIFT, bool(flags & messages.SSE), payload, end)
        if end:
            self._end(request, RequestEvent.END)
        else:
            self._streaming[request.sid] = request.sink.more

    def _on_refused(self, refused: messages.Refused) -> None:
        request = self._requests.get(refused.sid)
        if request is not None:
            if request.choice is not None:
                worker = request.choice.worker
                request.refused_by |= {worker.id}
                # else it would get the request again at once, and soon be asked for the last time
                if refused.leaving:
                    changed = self.fleet.leaves(worker.id, worker.beat.epoch, refused.message)
                    self._apply([changed] if changed else [], None)
            retryable = refused.retryable or (
                request.elsewhere and refused.code == AdapterNotFound.code
            )
            self._on_loss(request, from_refusal(refused.code, refused.message), retryable=retryable)
        else:
            self._commands.refused(refused)

    def _on_loss(self, request: InFlightRequest, error: LoraplexError, *, retryable: bool) -> None:
        """The worker gave the request back: another one takes it, it queues again, or the client
        hears of it.
        """
        self._unreserve(request)
        if request.life.on_loss(retryable=retryable) is RequestPhase.FAILED:
            request.sink.fail(error)
            self._over(request)
            return
        self._metrics.retried()
        if self._dispatch(request) is not None:
            request.ticket = self._admission.offer(
                request.base, request, self.clock(), flow_of(request)
            )
            if request.ticket is None:
                self._fail(request, error)

    def _apply(self, events: Sequence[FleetEvent], peer: bytes | None) -> None:
        for event in events:
            if isinstance(event, Joined):
                log.info("worker joined", extra={"worker": event.worker})
                if peer is not None:
                    self._transport.send_control(peer, messages.encode(self._welcome()))
            elif isinstance(event, Changed):
                log.info(
                    "worker state",
                    extra={
                        "worker": event.worker,
                        "state": event.now.name.lower(),
                        "reason": event.reason,
                    },
                )
            else:
                log.warning(
                    "worker lost",
                    extra={
                        "worker": event.worker,
                        "reason": event.reason,
                        "requests": len(event.streams),
                    },
                )
                for sid in event.streams:
                    request = self._requests.get(sid)
                    if request is not None:
                        lost = (
                            EngineFailure
                            if request.life.phase is RequestPhase.STREAMING
                            else WorkerUnavailable
                        )
                        self._on_loss(
                            request,
                            lost("The worker that served this request was lost."),
                            retryable=True,
                        )
                self._commands.lost(event.worker, event.epoch)

    def _send_warm_set(self, worker: WorkerView) -> None:
        """Once per life of a worker, as soon as it takes requests: what it should have before the
        first.
        """
        if worker.routable and not worker.wished:
            worker.wished = True
            for adapter in self._policy.warm_set(worker, self.fleet, self.clock()):
                self._transport.send_data(
                    messages.identity(worker.id, worker.beat.epoch),
                    messages.encode(messages.Prefetch(adapter)),
                )

    def greet(self, worker: WorkerView) -> None:
        """Says hello again to a worker whose first Welcome may have been lost (its data socket
        never attached).
        """
        peer = messages.identity(worker.id, worker.beat.epoch)
        self._transport.send_control(peer, messages.encode(self._welcome()))

    def _fail(self, request: InFlightRequest, error: LoraplexError) -> None:
        request.sink.fail(error)
        self._end(request, RequestEvent.FAIL)

    def _end(self, request: InFlightRequest, event: RequestEvent) -> None:
        request.life.on(event)
        self._unreserve(request)
        self._over(request)

    def _over(self, request: InFlightRequest) -> None:
        if request.ticket is not None:
            self._admission.leave(request.ticket)
            request.ticket = None
        self._progress.leave(request)
        self._open -= 1
        now = request.t_end = self.clock()
        ask, done = request.ask, request.done
        if request.life.phase is RequestPhase.FINISHED and request.choice is not None:
            tokens = done.output_tokens if done is not None else 0
            self._policy.finished(ask, request.choice.worker, now - request.t_sent, tokens, now)
            if done is not None:
                self._admission.charge(
                    request.base,
                    flow_of(request),
                    fairness.OUTPUT_WEIGHT * (tokens - ask.output_tokens),
                )
        else:
            self._policy.left(ask, now)
        self._metrics.finished(
            EndedRequest(
                request.base,
                request.adapter.name if request.adapter is not None else None,
                request.life.phase._value_,
                done,
                request.t_start,
                request.t_sent,
                request.t_head,
                now,
            )
        )
        self._admit_waiting(request.base, ask)
        self._wake_if_idle()

    def _wake_if_idle(self) -> None:
        if self._draining and not self._open:
            self.idle.set()

    def _unreserve(self, request: InFlightRequest) -> None:
        if self._requests.pop(request.sid, None) is not None:
            self._streaming.pop(request.sid, None)
            self.fleet.release(request.sid)

    def _send_cancel(self, request: InFlightRequest) -> None:
        if request.choice is not None:
            worker = request.choice.worker
            self._transport.send_data(
                messages.identity(worker.id, worker.beat.epoch),
                messages.encode(messages.Cancel(request.sid)),
            )

    def _retry_after_s(self, base: str) -> float:
        """A guess from what is known: queued requests over the places that serve them, at least a
        second.
        """
        tickets = sum(w.beat.capacity for w in self.fleet.routable(base))
        return max(1.0, min(60.0, self._admission.depth(base) / tickets)) if tickets else 5.0
