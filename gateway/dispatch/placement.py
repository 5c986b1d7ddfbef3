"""Shell. Gives a request to a worker. It chooses, reserves and sends in one synchronous step, so no
other decision is made on the same facts in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set

from gateway.dispatch.deadly.requests import Suspicion
from gateway.dispatch.deadly.trials import Trials
from gateway.dispatch.request import InFlightRequest
from gateway.dispatch.settings import TimeAndChance
from gateway.dispatch.workers.outbox import WorkerOutbox
from gateway.fleet.fleet import Fleet, WorkerView
from gateway.fleet.peer_hints import peer_hints
from gateway.routing.explanation import candidate_row
from gateway.routing.policy import (
    NONE_EXCLUDED,
    Blocked,
    Candidate,
    Choice,
    ChoiceReason,
    Decision,
    Defer,
    Policy,
    RoutingRequest,
    tier_of,
)
from shared.link import messages
from shared.link.sockets import SendResult

NO_PEERS: tuple[str, ...] = ()
MAX_CANDIDATES = 64
"""How many workers of one decision are kept, the best first."""


class Placement:
    """Asks `policy` and carries out what it says.

    Args:
        sids: yields stream ids that no message has carried yet.
        on_unreachable: called for a worker whose link is gone.
    """

    def __init__(
        self,
        fleet: Fleet,
        policy: Policy,
        outbox: WorkerOutbox,
        sids: Iterator[messages.StreamId],
        time_and_chance: TimeAndChance,
        trials: Trials,
        on_unreachable: Callable[[WorkerView], None],
    ) -> None:
        self._fleet = fleet
        self._policy = policy
        self._outbox = outbox
        self._sids = sids
        self._clock = time_and_chance.clock
        self._rng = time_and_chance.rng
        self._trials = trials
        self._on_unreachable = on_unreachable

    def place(self, request: InFlightRequest, now: float) -> Decision:
        """After a Choice the request is reserved and sent. Its `sid`, `choice` and `t_sent` say
        where and when. After a Defer nothing has happened.
        """
        full: Set[messages.WorkerId] = NONE_EXCLUDED
        apart, suspicion = False, self._trials.suspicion(request, now)
        request.suspicion = suspicion.deaths
        while True:
            choice = self._choose(request, full, now)
            if isinstance(choice, Defer):
                request.apart = request.apart or apart
                # not ROOM: the others in the queue may have those workers
                return Defer(Blocked.SLOT, self._trials.over_at(choice.until)) if apart else choice
            worker = choice.worker
            if suspicion.deaths and not self._trials.admits(request, worker.peer, now):
                full, apart = full | {worker.id}, True
                continue
            sid = next(self._sids)
            prompt_tokens = request.client_request.prompt_tokens
            try:
                self._fleet.reserve(worker, sid, request.model.adapter, prompt_tokens)
                sent = self._outbox.send(worker, self._message(request, sid, choice, suspicion))
            except BaseException:
                self._fleet.release(sid)
                raise
            if sent is SendResult.OK:
                request.sid, request.choice, request.t_sent = sid, choice, now
                request.apart = False
                return choice
            self._fleet.release(sid)
            if sent is SendResult.FULL:
                full = full | {worker.id}  # it takes nothing for now, as if it had no room
            else:
                self._on_unreachable(worker)

    def explain(self, routing_request: RoutingRequest) -> list[Candidate]:
        """Every worker that could get such a request now, the best first, with its costs."""
        return self._policy.explain(routing_request, self._fleet, self._clock())

    def candidates(self, request: InFlightRequest) -> tuple[dict[str, object], ...]:
        """The best workers for the request and their costs, for the record of the decision."""
        found = self.explain(request.routing_request)
        return tuple(candidate_row(c) for c in found[:MAX_CANDIDATES])

    def _choose(
        self, request: InFlightRequest, full: Set[messages.WorkerId], now: float
    ) -> Decision:
        """A worker that refused this request gets it again only if no other worker takes it."""
        routing_request, choose = request.routing_request, self._policy.choose
        model = request.model
        if model.only_on:
            lives = self._fleet.lives(model.only_on)
            found = (self._only_choice(request, one, full) for one in lives if one.routable)
            return next((one for one in found if isinstance(one, Choice)), Defer(Blocked.SLOT))
        if model.first_on and model.first_on not in request.refused_by:
            worker = self._fleet.get(model.first_on)
            if worker is not None and worker.reachable:
                return self._only_choice(request, worker, full)
        if request.refused_by:
            excluded = full | request.refused_by
            choice = choose(routing_request, self._fleet, now, self._rng, excluded)
            if isinstance(choice, Choice):
                return choice
        return choose(routing_request, self._fleet, now, self._rng, full)

    def _only_choice(
        self, request: InFlightRequest, worker: WorkerView, full: Set[messages.WorkerId]
    ) -> Decision:
        """The decision for a request that must, or should first, go to this worker. It keeps what
        the request asks for, so the policy is not asked.
        """
        key = request.key
        if not worker.accepts(full):
            return Defer(Blocked.SLOT)  # not ROOM: the others in the queue may go elsewhere
        if key is not None and not worker.takes(key):
            return Defer(Blocked.SLOT)
        return Choice(worker, ChoiceReason.KEPT, tier_of(worker, request.model.adapter))

    def _message(
        self,
        request: InFlightRequest,
        sid: messages.StreamId,
        choice: Choice,
        suspicion: Suspicion,
    ) -> messages.Generate:
        """The message to the worker. It names the adapter's files if the worker must load them, and
        peers that have them if they are not even in its memory.
        """
        client_request, model, key = request.client_request, request.model, request.key
        seen, peers = request.journal.seen, NO_PEERS
        if key is not None and choice.tier > messages.Tier.CPU:
            peers = peer_hints(self._fleet.pool(model.base), choice.worker, key)
        return messages.Generate(
            sid,
            client_request.path,
            client_request.request_id,
            client_request.body,
            model.adapter,
            None if choice.tier is messages.Tier.GPU else model.stored,
            peers,
            model.shown_as,
            client_request.created,
            not request.journal.obstacle,
            messages.Resume(seen) if seen else None,
            client_request.method,
            client_request.content_type,
            client_request.answer_id,
            client_request.traceparent,
            client_request.key,
            client_request.tracestate,
            client_request.background,
            request.requester.cache_salt,
            *suspicion,
        )
