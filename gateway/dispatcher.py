"""Shell. The only room where the pure parts (fleet, routing, admission, request) meet the link.

A request comes in by `submit`, is given to a worker in one synchronous step (choose, reserve, send) or waits in the queue, and its frames go
straight from the link's callback to its Sink. No task runs per request or per token here.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from typing import Protocol

from gateway.admission import Admission, Place
from gateway.fleet import Changed, Fleet, FleetEvent, Joined, Lost, Worker
from gateway.metrics import Metrics
from gateway.openai import from_refusal
from gateway.request import Event, Lifecycle, Phase
from gateway.routing import Choice, Policy
from shared import wire
from shared.adapters import AdapterRef, StoredAdapter
from shared.errors import EngineFailure, LoraplexError, Overloaded, WorkerUnavailable
from shared.link import Sent

log = logging.getLogger("loraplex.dispatcher")


class Sink(Protocol):
    """Where a request's answer goes. None of these may wait; `more` returns False if the client cannot take it."""

    def head(self, status: int, sse: bool, data: bytes, end: bool) -> None: ...
    def more(self, data: bytes, end: bool) -> bool: ...
    def fail(self, error: LoraplexError) -> None: ...


class Flight:
    """One request at the gateway, from submit to its end."""

    __slots__ = (
        "adapter",
        "base",
        "body",
        "choice",
        "done",
        "life",
        "path",
        "place",
        "request_id",
        "sid",
        "sink",
        "stored",
        "t_end",
        "t_head",
        "t_sent",
        "t_start",
    )

    def __init__(
        self, base: str, adapter: AdapterRef | None, stored: StoredAdapter | None, path: str, request_id: str, body: bytes, sink: Sink
    ) -> None:
        self.base, self.adapter, self.stored = base, adapter, stored
        self.path, self.request_id, self.body, self.sink = path, request_id, body, sink
        self.life = Lifecycle()
        self.sid: wire.StreamId = 0
        self.choice: Choice | None = None
        self.place: Place[Flight] | None = None
        self.done: wire.Done | None = None
        self.t_start = self.t_sent = self.t_head = self.t_end = 0.0  # set by the dispatcher, on its clock


class Transport(Protocol):
    """What the dispatcher needs of the link: NOBLOCK sends to a worker's control and data sockets, by routing id."""

    def send_data(self, peer: bytes, data: bytes) -> Sent: ...
    def send_control(self, peer: bytes, data: bytes) -> Sent: ...


class Dispatcher:
    """Owns the flights. `policy` decides, `fleet` remembers, `transport` carries."""

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
        self._open = 0
        self._last_sid = 0
        self._draining = False
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
        if not self._dispatch(flight):
            flight.place = self._admission.offer(flight.base, flight, self.clock())
            if flight.place is None:
                raise Overloaded("All workers are busy and the queue is full.", retry_after_s=self._retry_after_s(flight.base))
        self._open += 1

    def cancel(self, flight: Flight) -> None:
        """The client left. Idempotent; a no-op once the flight is over."""
        if flight.life.over:
            return
        if flight.life.phase is not Phase.QUEUED:
            self._send_cancel(flight)
        self._end(flight, Event.CANCEL)

    def drain(self) -> None:
        """No new requests from now on."""
        self._draining = True
        self._wake_if_idle()

    def abort_all(self) -> None:
        """The drain's time is over: whatever still runs ends here."""
        for flight in [*self._flights.values()]:
            self._send_cancel(flight)
            self._fail(flight, WorkerUnavailable("This server is shutting down.", retry_after_s=1.0))
        for base in self._admission.bases():
            self._admission.pump(base, lambda f: self._fail(f, WorkerUnavailable("This server is shutting down.", retry_after_s=1.0)))

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
        self._admission.pump(beat.base, self._dispatch)

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
                self._admission.pump(worker.beat.base, self._dispatch)
            return
        assert type(message) is wire.Step
        for done in message.done:
            flight = self._flights.get(done.sid)
            if flight is not None:
                flight.done = done
        flights = self._flights
        for sid, flags, payload in message.frames:
            flight = flights.get(sid)
            if flight is None:
                if not flags & wire.END:  # nobody waits for it any more; the worker has not heard yet
                    self._transport.send_data(peer, wire.encode(wire.Cancel(sid)))
            elif flight.life.phase is Phase.STREAMING:
                if not flight.sink.more(payload, bool(flags & wire.END)):
                    self._metrics.slow_readers.inc()
                    self.cancel(flight)
                elif flags & wire.END:
                    self._end(flight, Event.END)
            else:
                self._on_head(flight, flags, payload)
        for refused in message.refused:
            self._on_refused(refused)

    def tick(self) -> None:
        """Leases and queue deadlines; call it a few times per second."""
        now = self.clock()
        self._apply(self.fleet.expire(now), None)
        for flight in self._admission.expire(now):
            self._fail(flight, Overloaded("No worker became free in time.", retry_after_s=self._retry_after_s(flight.base)))

    # ---- inside -----------------------------------------------------------------------------------------------------------------------

    def _dispatch(self, flight: Flight) -> bool:
        """Choose, reserve and send in one step. False: nobody has room."""
        while True:
            choice = self._policy(self.fleet.routable(flight.base), flight.adapter, self._rng)
            if choice is None:
                return False
            self._last_sid += 1
            sid = self._last_sid
            worker = choice.worker
            self.fleet.reserve(worker, sid, flight.adapter)
            resident = flight.adapter is None or worker.tier(flight.adapter) is wire.Tier.GPU
            stored = None if resident else flight.stored
            message = wire.Generate(sid, flight.path, flight.request_id, flight.body, flight.adapter, stored)
            sent = self._transport.send_data(wire.identity(worker.id, worker.beat.epoch), wire.encode(message))
            if sent is Sent.OK:
                break
            self.fleet.release(sid)
            if sent is Sent.FULL:  # its queue is at the bound: it takes nothing for now, as if it had no room
                return False
            lost = self.fleet.unreachable(worker.id, worker.beat.epoch)
            self._apply([lost] if lost else [], None)
        flight.sid, flight.choice, flight.place = sid, choice, None
        flight.t_sent = self.clock()
        flight.life.on(Event.DISPATCHED)
        self._flights[sid] = flight
        self._metrics.dispatched(flight.base, choice.reason)
        return True

    def _on_head(self, flight: Flight, flags: int, payload: bytes) -> None:
        flight.t_head = self.clock()
        end = bool(flags & wire.END)
        flight.life.on(Event.HEAD)
        flight.sink.head(flags >> wire.STATUS_SHIFT, bool(flags & wire.SSE), payload, end)
        if end:
            self._end(flight, Event.END)

    def _on_refused(self, refused: wire.Refused) -> None:
        flight = self._flights.get(refused.sid)
        if flight is not None:
            self._on_loss(flight, from_refusal(refused.code, refused.message), retryable=refused.retryable)

    def _on_loss(self, flight: Flight, error: LoraplexError, *, retryable: bool) -> None:
        """The worker gave the request back: another one takes it, it queues again, or the client hears of it."""
        self._unreserve(flight)
        if flight.life.on_loss(retryable=retryable) is Phase.FAILED:
            flight.sink.fail(error)
            self._over(flight)
            return
        self._metrics.retries.inc()
        if not self._dispatch(flight):
            flight.place = self._admission.offer(flight.base, flight, self.clock())
            if flight.place is None:
                self._fail(flight, error)

    def _apply(self, events: list[FleetEvent] | list[Lost], peer: bytes | None) -> None:
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

    def greet(self, worker: Worker) -> None:
        """Says hello again to a worker whose first Welcome may have been lost (its data socket never attached)."""
        peer = wire.identity(worker.id, worker.beat.epoch)
        self._transport.send_control(peer, wire.encode(self._welcome()))

    def _fail(self, flight: Flight, error: LoraplexError) -> bool:
        flight.sink.fail(error)
        self._end(flight, Event.FAIL)
        return True

    def _end(self, flight: Flight, event: Event) -> None:
        flight.life.on(event)
        self._unreserve(flight)
        self._over(flight)

    def _over(self, flight: Flight) -> None:
        if flight.place is not None:
            self._admission.leave(flight.place)
        self._open -= 1
        flight.t_end = self.clock()
        self._metrics.finished(flight)
        self._admission.pump(flight.base, self._dispatch)
        self._wake_if_idle()

    def _wake_if_idle(self) -> None:
        if self._draining and not self._open:
            self.idle.set()

    def _unreserve(self, flight: Flight) -> None:
        if self._flights.pop(flight.sid, None) is not None:
            self.fleet.release(flight.sid)

    def _send_cancel(self, flight: Flight) -> None:
        if flight.choice is not None:
            worker = flight.choice.worker
            self._transport.send_data(wire.identity(worker.id, worker.beat.epoch), wire.encode(wire.Cancel(flight.sid)))

    def _retry_after_s(self, base: str) -> float:
        """A guess from what is known: queued requests over the places that serve them, at least a second."""
        places = sum(w.beat.capacity for w in self.fleet.routable(base))
        return max(1.0, min(60.0, self._admission.depth(base) / places)) if places else 5.0
