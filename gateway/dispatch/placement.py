"""Shell. Gives a request to a worker: choose, reserve and send in one synchronous step, so that no
other decision is made on the same facts in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set

from gateway.dispatch.outbox import WorkerOutbox
from gateway.dispatch.request import InFlightRequest
from gateway.dispatch.settings import TimeAndChance
from gateway.fleet.fleet import Fleet, WorkerView
from gateway.fleet.peer_hints import peer_hints
from gateway.routing.policy import (
    NONE_EXCLUDED,
    Blocked,
    Choice,
    ChoiceReason,
    Decision,
    Defer,
    Policy,
    tier_of,
)
from shared.link import messages
from shared.link.sockets import SendResult

NO_PEERS: tuple[str, ...] = ()


class Placement:
    """Asks `policy` and does what it says.

    Args:
        sids: yields stream ids that no message has carried yet.
        on_unreachable: is told of a worker whose link is gone.
    """

    def __init__(
        self,
        fleet: Fleet,
        policy: Policy,
        outbox: WorkerOutbox,
        sids: Iterator[messages.StreamId],
        time_and_chance: TimeAndChance,
        on_unreachable: Callable[[WorkerView], None],
    ) -> None:
        self._fleet = fleet
        self._policy = policy
        self._outbox = outbox
        self._sids = sids
        self._clock = time_and_chance.clock
        self._rng = time_and_chance.rng
        self._on_unreachable = on_unreachable

    def place(self, request: InFlightRequest) -> Decision:
        """After a Choice the request is reserved and sent: its `sid`, `choice` and `t_sent` say
        where and when. After a Defer nothing has happened.
        """
        full: Set[messages.WorkerId] = NONE_EXCLUDED
        while True:
            now = self._clock()
            choice = self._choose(request, full, now)
            if isinstance(choice, Defer):
                return choice
            sid, worker = next(self._sids), choice.worker
            prompt_tokens = request.asked.prompt_tokens
            try:
                self._fleet.reserve(worker, sid, request.model.adapter, prompt_tokens)
                sent = self._outbox.send(worker, self._message(request, sid, choice))
            except BaseException:
                self._fleet.release(sid)
                raise
            if sent is SendResult.OK:
                request.sid, request.choice, request.t_sent = sid, choice, now
                return choice
            self._fleet.release(sid)
            if sent is SendResult.FULL:
                full = full | {worker.id}  # it takes nothing for now, as if it had no room
            else:
                self._on_unreachable(worker)

    def _choose(
        self, request: InFlightRequest, full: Set[messages.WorkerId], now: float
    ) -> Decision:
        """A worker that refused this request gets it again only if no other worker takes it."""
        routing_request, choose = request.routing_request, self._policy.choose
        if request.model.only_on:
            return self._only_choice(request, full)
        if request.refused_by:
            excluded = full | request.refused_by
            choice = choose(routing_request, self._fleet, now, self._rng, excluded)
            if isinstance(choice, Choice):
                return choice
        return choose(routing_request, self._fleet, now, self._rng, full)

    def _only_choice(self, request: InFlightRequest, full: Set[messages.WorkerId]) -> Decision:
        """No policy is asked where one worker alone has what is asked for."""
        worker, key = self._fleet.get(request.model.only_on), request.key
        if worker is None or not worker.routable or not worker.accepts(full):
            return Defer(Blocked.SLOT)  # not ROOM: the others in the queue may go elsewhere
        if key is not None and not worker.takes(key):
            return Defer(Blocked.SLOT)
        return Choice(worker, ChoiceReason.KEPT, tier_of(worker, request.model.adapter))

    def _message(
        self, request: InFlightRequest, sid: messages.StreamId, choice: Choice
    ) -> messages.Generate:
        """With the adapter's files where the worker must load them, and the peers that have them
        where they are not even in its memory.
        """
        asked, model, key = request.asked, request.model, request.key
        seen, peers = request.journal.seen, NO_PEERS
        if key is not None and choice.tier > messages.Tier.CPU:
            peers = peer_hints(self._fleet.pool(model.base), choice.worker, key)
        return messages.Generate(
            sid,
            asked.path,
            asked.request_id,
            asked.body,
            model.adapter,
            None if choice.tier is messages.Tier.GPU else model.stored,
            peers,
            model.shown_as,
            asked.created,
            not request.journal.obstacle,
            messages.Resume(seen) if seen else None,
            asked.method,
            asked.content_type,
            asked.owner,
        )
