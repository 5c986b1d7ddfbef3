"""Shell. The open requests of every gateway on this worker, from arrival to end. Each request runs
the engine in a task of its own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from shared.errors import (
    REUSED_KEY,
    AnswerIncomplete,
    CannotContinue,
    EngineFailure,
    IdempotencyKeyReused,
)
from shared.link import messages
from worker.engine.base import Engine, EngineRequest, Loaded, Storing
from worker.requests.kept_answers import AnswerListener, KeptAnswer, KeptAnswers
from worker.requests.open_request import NOBODY, OpenRequest, StreamReply
from worker.requests.trials import OpenTrials
from worker.session import GatewaySession
from worker.settings import KeepBounds

clock = time.monotonic

MAX_ALONE = 1024
"""As many answers as vLLM's app stores (see app/responses.py)."""


class RequestTable:
    """Every open request, by its number and by its stream.

    `on_end` is called once for each request, with its number, whatever ended it. `on_engine_death`
    is called if a request finds the engine dead. Requests run in `tasks`, which the agent sets
    while it runs.
    """

    def __init__(
        self,
        engine: Engine,
        on_end: Callable[[int], None],
        on_engine_death: Callable[[str], None],
        bounds: KeepBounds,
    ) -> None:
        self._engine = engine
        self._kept = KeptAnswers(bounds)
        self._alone: dict[str, int] = {}
        """The answers that have gone on alone, by their ids, the oldest first: their numbers."""
        self._on_end, self._on_engine_death = on_end, on_engine_death
        self._open: dict[int, OpenRequest] = {}
        self._by_stream: dict[tuple[GatewaySession, messages.StreamId], OpenRequest] = {}
        self._trials = OpenTrials()
        self.tasks: asyncio.TaskGroup | None = None
        self.started = 0
        """Requests that were given to the engine so far."""
        self.leaving = False
        """Whether refusals say that this life of the worker takes no more requests."""
        self.suspect = False
        """Whether refusals say that the worker takes none for now."""

    def __len__(self) -> int:
        return len(self._open)

    @property
    def running(self) -> int:
        """How many requests the engine has; the others wait for their adapters."""
        return sum(request.task is not None for request in self._open.values())

    def admits(self, message: messages.Generate) -> bool:
        """Whether a request of which workers died may come in now (see OpenTrials)."""
        return self._trials.admits(_what(message), message.deaths)

    def accept(
        self, number: int, session: GatewaySession, message: messages.Generate
    ) -> OpenRequest:
        """Adds a request that has come from a gateway. If its answer goes on here alone, that ends:
        the gateway has it made anew.
        """
        alone = self._open.get(self._alone.pop(message.answer_id, -1))
        if alone is not None:
            self._end(alone)
        request = OpenRequest(number, session, session.outbox, message, clock())
        first = AnswerListener(session, session.outbox, message.sid)
        before = self._kept.get(message.key.tag) if message.key is not None else None
        kept = self._kept.go_on(number, message, first)
        if kept is not None:
            request.kept = request.outbox = kept
        if before is not None and before.number in self._open:  # it was lost here, and is back
            self._end_unheard(self._open[before.number], before)
        if message.deaths:
            what, deaths, to_its_end = _what(message), message.deaths, message.to_its_end
            request.trial = self._trials.begin(number, what, deaths, to_its_end)
            session.outbox.frame(message.sid, messages.TAKEN, b"")  # kept answers are without it
        self._open[number] = request
        self._by_stream[session, message.sid] = request
        session.open_requests += 1
        return request

    def find(self, session: GatewaySession, message: messages.FindAnswer) -> None:
        """Tells the gateway whether the answer is kept or stored here."""
        kept = self._kept.get(message.tag)
        stored = self._engine.stores(message.answer_id) if message.answer_id else Storing.NOT
        found = messages.FoundAnswer(
            message.sid,
            stored=stored is not Storing.NOT,
            copied=stored is Storing.COPY,
            alone=message.answer_id in self._alone,
        )
        if kept is not None:
            found = messages.FoundAnswer(
                message.sid, kept.key.digest, kept.request_id, kept.created
            )
        session.outbox.found(found)

    def join(self, session: GatewaySession, message: messages.Generate) -> bool:
        """True: the answer is kept here, and the stream gets it."""
        kept = self._kept.get(message.key.tag) if message.key is not None else None
        if kept is None or message.key is None or message.resume is not None:
            return False
        if kept.key != message.key:
            error = IdempotencyKeyReused(REUSED_KEY)
            session.outbox.refuse(
                messages.Refused(message.sid, error.code, error.message, retryable=False)
            )
            return True
        if not kept.ended:
            self._by_stream[session, message.sid] = self._open[kept.number]
            session.open_requests += 1
        kept.join(AnswerListener(session, session.outbox, message.sid))
        return True

    def expire(self, now: float) -> None:
        """Ends requests whose kept answers nobody has asked for in time."""
        for kept in self._kept.expire(now):
            request = self._open.get(kept.number)
            if request is not None and not request.message.background:
                self._end(request)

    def start(
        self,
        number: int,
        adapter: Loaded | None,
        came_from: messages.Tier = messages.Tier.GPU,
        slot_wait_s: float = 0.0,
    ) -> None:
        """Gives the request to the engine. Its adapter is in a slot by now (see Start)."""
        assert self.tasks is not None
        request = self._open[number]
        self.started += 1
        request.started, request.came_from, request.adapter = clock(), came_from, adapter
        request.slot_wait_s = slot_wait_s
        request.task = self.tasks.create_task(
            self._run(request, adapter), name=f"request {request.message.sid}"
        )
        # Not in a `finally` of the task: a task that is cancelled before its first step never
        # enters it.
        request.task.add_done_callback(lambda _: self._forget(request))

    def cancel(
        self, session: GatewaySession, sid: messages.StreamId, *, over: bool = False
    ) -> None:
        """The gateway wants no more of this stream. The stream may have ended already. `over`: its
        client will not ask again, so an answer that is kept ends too, unless others listen.
        """
        request = self._by_stream.get((session, sid))
        if request is not None:
            # of several who listen, one of those that stay is charged at the end
            alone = request.kept is None or len(request.kept.listeners) == 1
            if alone and request.reply is not None and request.reply.prompt_tokens:
                request.reply.account()
            if request.kept is not None:
                self._leave(request, request.kept, session, sid)
                if over and not request.kept.listeners:
                    self._end(request)
                else:
                    self._end_unheard(request, request.kept)
            elif request.message.background and not over:
                self._go_on_alone(request)
            else:
                self._end(request)

    def refuse(self, number: int, code: str, message: str, retryable: bool) -> None:
        """Refuses one request; the gateway learns why."""
        self._refuse(self._open[number], code, message, retryable)

    def refuse_all(self, code: str, message: str, session: GatewaySession | None = None) -> None:
        """Gives back every request, or those of one gateway. Another worker may serve them."""
        for request in self.of(session):
            if session is not None and (kept := request.kept) is not None:
                for listener in kept.listeners:
                    if listener.session is session:
                        refused = messages.Refused(listener.sid, code, message, True)
                        session.outbox.refuse(refused)
                        self._leave(request, kept, session, listener.sid)
                self._end_unheard(request, kept)
            elif session is not None and request.message.background:
                session.outbox.refuse(messages.Refused(request.message.sid, code, message, True))
                self._go_on_alone(request)
            elif request.alone and not self.leaving:
                continue  # no other worker would take it
            else:
                self._refuse(request, code, message, True)

    def of(self, session: GatewaySession | None) -> list[OpenRequest]:
        """The open requests of one gateway; with None those of all gateways."""
        if session is None:
            return list(self._open.values())
        found = (r for (of, _), r in self._by_stream.items() if of is session)
        return list(dict.fromkeys(found))

    async def _run(self, request: OpenRequest, adapter: Loaded | None) -> None:
        message = request.message
        reply = request.reply = StreamReply(request)
        try:
            on_seen = request.kept.seen if request.kept is not None else None
            await self._engine.serve(_engine_request(message, adapter, on_seen), reply)
        except (CannotContinue, AnswerIncomplete) as exc:
            request.outbox.refuse(
                messages.Refused(message.sid, exc.code, exc.message, retryable=False)
            )
        except EngineFailure as exc:
            if not reply.ended:
                request.outbox.refuse(
                    messages.Refused(message.sid, exc.code, exc.message, True, leaving=True)
                )
            self._on_engine_death(exc.message)

    def _refuse(self, request: OpenRequest, code: str, message: str, retryable: bool) -> None:
        request.outbox.refuse(
            messages.Refused(
                request.message.sid, code, message, retryable, self.leaving, self.suspect
            )
        )
        self._end(request)

    def _go_on_alone(self, request: OpenRequest) -> None:
        """The answer in the background has lost its gateway, or its gateway ends. It is made to its
        end, because its client may ask for it by its id.
        """
        if request.alone:
            return
        self._forget_stream(request)
        request.alone, request.outbox = True, NOBODY
        self._alone[request.message.answer_id] = request.number
        while len(self._alone) > MAX_ALONE:
            del self._alone[next(iter(self._alone))]

    def _forget_stream(self, request: OpenRequest) -> None:
        # stream ids begin again with each channel, so the entry may be another request's
        key = request.session, request.message.sid
        if self._by_stream.get(key) is request:
            del self._by_stream[key]
        request.session.open_requests -= 1

    def _leave(
        self,
        request: OpenRequest,
        kept: KeptAnswer,
        session: GatewaySession,
        sid: messages.StreamId,
    ) -> None:
        """One stream less gets the answer; it goes on without any, for a while."""
        kept.leave(session, sid, clock())
        if self._by_stream.get((session, sid)) is request:
            del self._by_stream[session, sid]
            session.open_requests -= 1

    def _end_unheard(self, request: OpenRequest, kept: KeptAnswer) -> None:
        """Ends an answer that nobody listens to and nobody can ask for: it was too large to keep,
        or one of too many.
        """
        if not (kept.listeners or self._kept.holds(kept) or request.message.background):
            self._end(request)

    def _end(self, request: OpenRequest) -> None:
        if request.task is not None:
            request.task.cancel()
        else:
            self._forget(request)

    def _forget(self, request: OpenRequest) -> None:
        """Removes the request. A second call does nothing."""
        if self._open.pop(request.number, None) is None:
            return
        self._trials.end(request.number)
        if (kept := request.kept) is not None:
            for listener in list(kept.listeners):
                assert isinstance(listener.session, GatewaySession)
                self._leave(request, kept, listener.session, listener.sid)
            self._kept.over(kept, clock())
        elif not request.alone:
            self._forget_stream(request)
        self._on_end(request.number)


def _what(message: messages.Generate) -> object:
    """The same for each copy of a request."""
    return message.path, message.adapter, message.body


def _engine_request(
    message: messages.Generate, adapter: Loaded | None, on_seen: Callable[[bytes], None] | None
) -> EngineRequest:
    return EngineRequest(
        message.path,
        message.request_id,
        message.body,
        adapter,
        message.model,
        message.created,
        message.resume.tokens if message.resume is not None else b"",
        message.movable,
        message.method,
        message.content_type,
        message.answer_id,
        message.traceparent,
        message.tracestate,
        message.background,
        message.cache_salt,
        on_seen,
    )
