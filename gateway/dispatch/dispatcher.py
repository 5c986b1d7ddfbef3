"""Shell. The only room where the pure parts (fleet, routing, admission, request) meet the link.

A request comes in by `submit`, is given to a worker in one synchronous step (choose, reserve, send) or waits in the queue, and its frames go
straight from the link's callback to its Sink. No task runs per request or per token here.
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
from gateway.dispatch.commands import Tending
from gateway.dispatch.keepalive import Progress, comment
from gateway.dispatch.lifecycle import Event, Phase
from gateway.dispatch.request import Flight, adapter_key, ask_of, flow_of
from gateway.fleet.fleet import Changed, Fleet, FleetEvent, Joined, Worker
from gateway.fleet.peer_hints import peers_of
from gateway.routing.policy import Ask, Blocked, Candidate, Choice, Decision, Policy, Wait
from gateway.telemetry.prometheus import Metrics
from shared.adapters.identity import AdapterRef, StoredAdapter
from shared.errors import AdapterNotFound, EngineFailure, LoraplexError, Overloaded, WorkerUnavailable, from_refusal
from shared.link import messages as wire
from shared.link.sockets import Sent

log = logging.getLogger("loraplex.dispatcher")


class Transport(Protocol):
    """What the dispatcher needs of the link: NOBLOCK sends to a worker's control and data sockets, by routing id."""

    def send_data(self, peer: bytes, data: bytes) -> Sent: ...
    def send_control(self, peer: bytes, data: bytes) -> Sent: ...


class Dispatcher:
    """Owns the flights. `policy` decides (see policies.make_policy), `fleet` remembers, `transport` carries.

    `wake_at` is told the time, on `clock`, at which `tick` should be called besides its regular calls (a policy wants to be asked again then);
    without it the regular calls have to do. `progress_s`: how often a stream that waits hears of it (0: never). `first_sid`: stream ids begin
    above it; those of a gateway's earlier life must not come again, for its workers may still send frames for them.
    """

    def __init__(
        self,
        fleet: Fleet,
        policy: Policy,
        admission: Admission[Flight],
        transport: Transport,
        metrics: Metrics,
        welcome: Callable[[], wire.Welcome],
        rng: random.Random,
        max_flights: int,
        clock: Callable[[], float] = time.monotonic,
        *,
        wake_at: Callable[[float], None] | None = None,
        progress_s: float = 0.0,
        first_sid: wire.StreamId = 0,
    ) -> None:
        self.fleet = fleet
        self._policy = policy
        self._admission = admission
        self._transport = transport
        self._metrics = metrics
        self._welcome = welcome
        self._rng = rng
        self._max_flights = max_flights
        self.clock = clock
        self._flights: dict[wire.StreamId, Flight] = {}
        self._streaming: dict[wire.StreamId, Callable[[bytes, bool], bool]] = {}  # where the next frame of each goes that has had its first
        self._tending = Tending()
        self._open = 0
        self._last_sid = first_sid
        self._progress = Progress(progress_s)
        self._draining = False
        self._wake_at = wake_at
        self._alarm = math.inf
        self._pumping: str | None = None
        self.idle = asyncio.Event()
        """Set once the dispatcher drains and no request is open."""

    # ---- the client's side ----------------------------------------------------------------------------------------------------------

    @property
    def open_flights(self) -> int:
        return self._open

    @property
    def draining(self) -> bool:
        return self._draining

    def queued(self, base: str) -> int:
        return self._admission.depth(base)

    def submit(self, flight: Flight) -> None:
        """Sends the request to a worker or queues it.

        Raises:
            Overloaded: too many requests are open, or the queue is full.
        """
        flight.t_start = self.clock()
        if self._draining:
            raise WorkerUnavailable("This server is shutting down.", retry_after_s=1.0)
        if self._open >= self._max_flights:
            raise Overloaded(f"Too many requests at once (limit {self._max_flights}).", retry_after_s=1.0)
        flight.ask = ask_of(flight)
        self._policy.arrived(flight.ask, flight.t_start)
        self._open += 1
        # Where others wait it takes its turn among them.
        if self._admission.depth(flight.base) or self._dispatch(flight) is not None:
            flight.place = self._admission.offer(flight.base, flight, self.clock(), flow_of(flight))
            if flight.place is None:
                self._open -= 1
                self._policy.left(flight.ask, self.clock())
                raise self._admission.bound(flight.base).refusal(self._retry_after_s(flight.base))
            self._pump(flight.base, flight.ask)
        if flight.streams:
            self._progress.enter(flight, flight.t_start)

    def tend(self, worker: Worker, action: wire.Action, adapter: AdapterRef, stored: StoredAdapter | None) -> asyncio.Future[None]:
        """Asks the worker to do it; the future resolves once it is so. How long to wait is the caller's affair.

        It fails with: Overloaded, too many are open. WorkerUnavailable: it takes nothing, or was lost. Else what the worker refused it with.
        """
        self._last_sid += 1
        sid, peer = self._last_sid, wire.identity(worker.id, worker.beat.epoch)
        future = self._tending.begin(sid, worker.id, worker.beat.epoch)
        if future.done():
            return future
        if not worker.routable or self.fleet.get(worker.id) is not worker:
            self._tending.fail(sid, WorkerUnavailable("The worker does not serve.", retry_after_s=1.0))
            return future
        if action is wire.Action.CACHE:  # what is on the disk alone is in no heartbeat
            future.add_done_callback(lambda f: self.fleet.cached(worker, adapter) if not f.cancelled() and f.exception() is None else None)
        peers = peers_of(self.fleet.pool(adapter.base), worker, (adapter.name, adapter.digest))
        sent = self._transport.send_data(peer, wire.encode(wire.Tend(sid, action, adapter, stored, peers)))
        if sent is Sent.FULL:
            self._tending.fail(sid, WorkerUnavailable("The worker does not take messages fast enough.", retry_after_s=1.0))
        elif sent is not Sent.OK:
            lost = self.fleet.unreachable(worker.id, worker.beat.epoch)
            self._apply([lost] if lost else [], None)
        return future

    def explain(self, ask: Ask) -> list[Candidate]:
        """Every worker that could get such a request now, best first, with its costs."""
        return self._policy.explain(ask, self.fleet, self.clock())

    @property
    def policy(self) -> str:
        return self._policy.name

    def cancel(self, flight: Flight) -> None:
        """The client left. Idempotent; a no-op once the flight is over."""
        if flight.life.over:
            return
        if flight.life.phase is not Phase.QUEUED:
            self._send_cancel(flight)
        self._end(flight, Event.CANCEL)

    def give_up(self, flight: Flight, error: LoraplexError) -> None:
        """Its time is over: it leaves the queue or its worker, and the client hears why. A no-op once the flight is over."""
        if flight.life.over:
            return
        if flight.life.phase is not Phase.QUEUED:
            self._send_cancel(flight)
        self._fail(flight, error)

    def drain(self) -> None:
        """No new requests from now on."""
        self._draining = True
        self._give_up_waiting()
        self._wake_if_idle()

    def _give_up_waiting(self) -> None:
        """While this gateway drains, its workers may have gone already: nobody will come for what waits for them."""
        for flight in self._admission.items():
            if flight.place is not None and not self.fleet.routable(flight.base):
                self._fail(flight, WorkerUnavailable("This server is shutting down.", retry_after_s=1.0))

    def abort_all(self) -> None:
        """The drain's time is over: whatever still runs ends here."""
        for flight in self._admission.items():  # first, so that none of them takes a place that the others leave
            if flight.place is not None:
                self._fail(flight, WorkerUnavailable("This server is shutting down.", retry_after_s=1.0))
        for flight in [*self._flights.values()]:
            self._send_cancel(flight)
            self._fail(flight, WorkerUnavailable("This server is shutting down.", retry_after_s=1.0))

    # ---- the workers' side ----------------------------------------------------------------------------------------------------------

    def on_control(self, peer: bytes, data: bytes) -> None:
        try:
            beat = wire.decode_worker_control(data)
        except wire.DecodeError:
            self._metrics.undecodable("control")
            return
        if beat.protocol != wire.PROTOCOL_VERSION:
            self._metrics.undecodable("protocol")
            return
        self._apply(self.fleet.beat(beat, self.clock()), peer)
        worker = self.fleet.get(beat.worker)
        if worker is not None:
            self._send_wishes(worker)
        self._pump(beat.base)

    def on_data(self, peer: bytes, data: bytes) -> None:
        try:
            message = wire.decode_worker_data(data)
        except wire.DecodeError:
            self._metrics.undecodable("data")
            return
        if type(message) is wire.Attach:
            self.fleet.attach(message.worker, message.epoch)
            worker = self.fleet.get(message.worker)
            if worker:
                self._send_wishes(worker)
                self._pump(worker.beat.base)
            return
        assert type(message) is wire.Step
        for done in message.done:
            flight = self._flights.get(done.sid)
            if flight is not None:
                flight.done = done
            else:
                self._tending.done(done.sid)
        streaming = self._streaming
        for sid, flags, payload in message.frames:
            more = streaming.get(sid)
            if more is None:
                self._on_first(peer, sid, flags, payload)
            elif not more(payload, flags == wire.END):
                self._metrics.slow_reader()
                self.cancel(self._flights[sid])
            elif flags:
                self._end(self._flights[sid], Event.END)
        for refused in message.refused:
            self._on_refused(refused)

    def tick(self) -> None:
        """Leases, queue deadlines, and a word to those who wait; call it a few times per second."""
        now = self.clock()
        silent = self.fleet.expire(now)
        for lost in silent:
            # It may only have stood still, with these requests unread before it: nobody waits for them any more.
            for sid in lost.streams:
                self._transport.send_data(wire.identity(lost.worker, lost.epoch), wire.encode(wire.Cancel(sid)))
        self._apply(silent, None)
        if self._draining:
            self._give_up_waiting()
        for flight in self._admission.expire(now):
            self._fail(flight, Overloaded("No worker became free in time.", retry_after_s=self._retry_after_s(flight.base)))
        turns = self._progress.turns(now)
        places = self._admission.positions() if any(f.place is not None for f in turns) else {}
        for flight in turns:
            flight.sink.comment(comment(flight, places))
        if now >= self._alarm:
            self._alarm = math.inf
            for base in self._admission.bases():
                self._pump(base)

    # ---- inside -----------------------------------------------------------------------------------------------------------------------

    def _dispatch(self, flight: Flight) -> Blocked | None:
        """Choose, reserve and send in one step. None: it is on its way; else what it waits for."""
        ask = flight.ask
        full: set[wire.WorkerId] = set()  # their queues are at the bound: they take nothing for now, as if they had no room
        while True:
            now = self.clock()
            choice = self._choose(flight, full, now)
            if isinstance(choice, Wait):
                if choice.until is not None:
                    self._ask_again(max(choice.until, now))
                return choice.blocked
            self._last_sid += 1
            sid = self._last_sid
            worker = choice.worker
            self.fleet.reserve(worker, sid, flight.adapter, flight.prompt_tokens)
            stored = None if choice.tier is wire.Tier.GPU else flight.stored
            peers: tuple[str, ...] = ()
            if flight.adapter is not None and choice.tier > wire.Tier.CPU:
                peers = peers_of(self.fleet.pool(flight.base), worker, (flight.adapter.name, flight.adapter.digest))
            message = wire.Generate(sid, flight.path, flight.request_id, flight.body, flight.adapter, stored, peers, flight.model)
            sent = self._transport.send_data(wire.identity(worker.id, worker.beat.epoch), wire.encode(message))
            if sent is Sent.OK:
                break
            self.fleet.release(sid)
            if sent is Sent.FULL:
                full.add(worker.id)
                continue
            lost = self.fleet.unreachable(worker.id, worker.beat.epoch)
            self._apply([lost] if lost else [], None)
        if flight.place is not None:
            self._admission.leave(flight.place)
        flight.sid, flight.choice, flight.place = sid, choice, None
        flight.t_sent = now
        flight.life.on(Event.DISPATCHED)
        self._flights[sid] = flight
        self._policy.sent(ask, choice, now)
        self._admission.charge(flight.base, flow_of(flight), fairness.service(ask.prompt_tokens, ask.output_tokens))
        self._metrics.dispatched(flight.base, choice.reason)
        return None

    def _choose(self, flight: Flight, full: set[wire.WorkerId], now: float) -> Decision:
        """Without those that refused this request, unless nobody else takes it."""
        if not full and not flight.refused_by:
            return self._policy.choose(flight.ask, self.fleet, now, self._rng)
        if flight.refused_by:
            with self.fleet.without(full | flight.refused_by):
                choice = self._policy.choose(flight.ask, self.fleet, now, self._rng)
            if isinstance(choice, Choice):
                return choice
        with self.fleet.without(full):
            return self._policy.choose(flight.ask, self.fleet, now, self._rng)

    def _pump(self, base: str, ask: Ask | None = None) -> None:
        """Something may have become free; `ask` is the request that freed or wants it. What a pump sets off does not pump again inside it."""
        if self._pumping is None and self._admission.depth(base):
            self._pumping = base
            try:
                heirs = self._policy.heirs(base, self.fleet, self.clock())
                self._admission.pump(base, self._dispatch, adapter_key(ask.adapter) if ask is not None else None, heirs)
            finally:
                self._pumping = None

    def _ask_again(self, when: float) -> None:
        if when < self._alarm:
            self._alarm = when
            if self._wake_at is not None:
                self._wake_at(when)

    def _on_first(self, peer: bytes, sid: wire.StreamId, flags: int, payload: bytes) -> None:
        """The first frame of an answer, or one that nobody waits for any more."""
        flight = self._flights.get(sid)
        if flight is not None:
            self._on_head(flight, flags, payload)
        elif not flags & wire.END:  # the worker has not heard yet
            self._transport.send_data(peer, wire.encode(wire.Cancel(sid)))

    def _on_head(self, flight: Flight, flags: int, payload: bytes) -> None:
        flight.t_head = self.clock()
        self._progress.leave(flight)
        end = bool(flags & wire.END)
        flight.life.on(Event.HEAD)
        flight.sink.head(flags >> wire.STATUS_SHIFT, bool(flags & wire.SSE), payload, end)
        if end:
            self._end(flight, Event.END)
        else:
            self._streaming[flight.sid] = flight.sink.more

    def _on_refused(self, refused: wire.Refused) -> None:
        flight = self._flights.get(refused.sid)
        if flight is not None:
            if flight.choice is not None:
                worker = flight.choice.worker
                flight.refused_by |= {worker.id}
                if refused.leaving:  # else it would get the request again at once, and soon be asked for the last time
                    changed = self.fleet.leaves(worker.id, worker.beat.epoch, refused.message)
                    self._apply([changed] if changed else [], None)
            retryable = refused.retryable or (flight.elsewhere and refused.code == AdapterNotFound.code)
            self._on_loss(flight, from_refusal(refused.code, refused.message), retryable=retryable)
        else:
            self._tending.refused(refused)

    def _on_loss(self, flight: Flight, error: LoraplexError, *, retryable: bool) -> None:
        """The worker gave the request back: another one takes it, it queues again, or the client hears of it."""
        self._unreserve(flight)
        if flight.life.on_loss(retryable=retryable) is Phase.FAILED:
            flight.sink.fail(error)
            self._over(flight)
            return
        self._metrics.retried()
        if self._dispatch(flight) is not None:
            flight.place = self._admission.offer(flight.base, flight, self.clock(), flow_of(flight))
            if flight.place is None:
                self._fail(flight, error)

    def _apply(self, events: Sequence[FleetEvent], peer: bytes | None) -> None:
        for event in events:
            if isinstance(event, Joined):
                log.info("worker joined", extra={"worker": event.worker})
                if peer is not None:
                    self._transport.send_control(peer, wire.encode(self._welcome()))
            elif isinstance(event, Changed):
                log.info("worker state", extra={"worker": event.worker, "state": event.now.name.lower(), "reason": event.reason})
            else:
                log.warning("worker lost", extra={"worker": event.worker, "reason": event.reason, "requests": len(event.streams)})
                for sid in event.streams:
                    flight = self._flights.get(sid)
                    if flight is not None:
                        lost = EngineFailure if flight.life.phase is Phase.STREAMING else WorkerUnavailable
                        self._on_loss(flight, lost("The worker that served this request was lost."), retryable=True)
                self._tending.lost(event.worker, event.epoch)

    def _send_wishes(self, worker: Worker) -> None:
        """Once per life of a worker, as soon as it takes requests: what it should have before the first."""
        if worker.routable and not worker.wished:
            worker.wished = True
            for adapter in self._policy.wishes(worker, self.fleet, self.clock()):
                self._transport.send_data(wire.identity(worker.id, worker.beat.epoch), wire.encode(wire.Prefetch(adapter)))

    def greet(self, worker: Worker) -> None:
        """Says hello again to a worker whose first Welcome may have been lost (its data socket never attached)."""
        peer = wire.identity(worker.id, worker.beat.epoch)
        self._transport.send_control(peer, wire.encode(self._welcome()))

    def _fail(self, flight: Flight, error: LoraplexError) -> None:
        flight.sink.fail(error)
        self._end(flight, Event.FAIL)

    def _end(self, flight: Flight, event: Event) -> None:
        flight.life.on(event)
        self._unreserve(flight)
        self._over(flight)

    def _over(self, flight: Flight) -> None:
        if flight.place is not None:
            self._admission.leave(flight.place)
            flight.place = None
        self._progress.leave(flight)
        self._open -= 1
        now = flight.t_end = self.clock()
        ask, done = flight.ask, flight.done
        if flight.life.phase is Phase.FINISHED and flight.choice is not None:
            tokens = done.output_tokens if done is not None else 0
            self._policy.finished(ask, flight.choice.worker, now - flight.t_sent, tokens, now)
            if done is not None:
                self._admission.charge(flight.base, flow_of(flight), fairness.OUTPUT_WEIGHT * (tokens - ask.output_tokens))
        else:
            self._policy.left(ask, now)
        self._metrics.finished(flight)
        self._pump(flight.base, ask)
        self._wake_if_idle()

    def _wake_if_idle(self) -> None:
        if self._draining and not self._open:
            self.idle.set()

    def _unreserve(self, flight: Flight) -> None:
        if self._flights.pop(flight.sid, None) is not None:
            self._streaming.pop(flight.sid, None)
            self.fleet.release(flight.sid)

    def _send_cancel(self, flight: Flight) -> None:
        if flight.choice is not None:
            worker = flight.choice.worker
            self._transport.send_data(wire.identity(worker.id, worker.beat.epoch), wire.encode(wire.Cancel(flight.sid)))

    def _retry_after_s(self, base: str) -> float:
        """A guess from what is known: queued requests over the places that serve them, at least a second."""
        places = sum(w.beat.capacity for w in self.fleet.routable(base))
        return max(1.0, min(60.0, self._admission.depth(base) / places)) if places else 5.0
