"""Shell. The requests of every gateway on this worker, from their arrival to their end. One task
per request runs the engine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from shared.endpoints import RESPONSES_PATH
from shared.errors import AnswerIncomplete, CannotContinue, EngineFailure
from shared.link import messages
from shared.link.token_ids import BYTES_PER_TOKEN
from worker.engine.base import Engine, EngineRequest, Loaded
from worker.session import GatewaySession, Outbox

clock = time.monotonic

PROGRESS_TOKENS = 16
"""Of an answer that is sent whole, between two words on how far it is: what a lost worker costs."""


@dataclass(slots=True)
class OpenRequest:
    """One request on this worker. `task` runs it in the engine; until then it waits for its
    adapter. `outbox` is that of the channel by which it came: answers go by no other.
    """

    number: int
    session: GatewaySession
    outbox: Outbox
    message: messages.Generate
    arrived: float
    task: asyncio.Task[None] | None = None
    started: float = 0.0
    came_from: messages.Tier = messages.Tier.GPU
    reply: StreamReply | None = None


class StreamReply:
    """Puts one stream's frames into its gateway's outbox. The facts of the request travel with the
    last frame.
    """

    __slots__ = (
        "_lines",
        "_movable",
        "_outbox",
        "_request",
        "_sid",
        "_unsent",
        "ended",
        "output_tokens",
        "prompt_tokens",
    )

    def __init__(self, request: OpenRequest) -> None:
        self._request = request
        self._outbox, self._sid = request.outbox, request.message.sid
        self._movable = request.message.movable
        self._unsent = b""
        self.prompt_tokens = self.output_tokens = 0
        self.ended = False
        self._lines = b""

    def lines(self, lines: bytes) -> None:
        self._lines = lines + b"\r\n"

    def head(self, status: int, sse: bool, data: bytes, end: bool, tokens: bytes = b"") -> None:
        self._outbox.frame(
            self._sid,
            status << messages.STATUS_SHIFT
            | (messages.SSE if sse else 0)
            | (messages.LINES if self._lines else 0)
            | (messages.END if end else 0),
            self._lines + data,
            tokens if self._movable else b"",
        )
        if end:
            self._end()

    def more(self, data: bytes, end: bool, tokens: bytes = b"") -> None:
        flags = messages.END if end else 0
        self._outbox.frame(self._sid, flags, data, tokens if self._movable else b"")
        if end:
            self._end()

    def progress(self, tokens: bytes) -> None:
        if not self._movable:
            return
        self._unsent += tokens
        if len(self._unsent) >= PROGRESS_TOKENS * BYTES_PER_TOKEN:
            self._outbox.frame(self._sid, messages.TOKENS, b"", self._unsent)
            self._unsent = b""

    def _end(self) -> None:
        self.ended = True
        self.account()

    def account(self) -> None:
        """What the request has used, up to now."""
        request = self._request
        wait_s = request.started - request.arrived
        load_s = wait_s if request.came_from is not messages.Tier.GPU else 0.0
        self._outbox.done(
            messages.Done(
                self._sid,
                self.prompt_tokens,
                self.output_tokens,
                wait_s,
                load_s,
                request.came_from,
            )
        )


class RequestTable:
    """Every open request by its number and by its stream.

    `on_end` is called once for each request that has ended, with its number, whatever ended it.
    `on_engine_death` is called if the engine turns out to be dead while it runs a request. Requests
    run in `tasks`, which is set while the worker runs.
    """

    def __init__(
        self,
        engine: Engine,
        on_end: Callable[[int], None],
        on_engine_death: Callable[[str], None],
    ) -> None:
        self._engine = engine
        self._on_end, self._on_engine_death = on_end, on_engine_death
        self._open: dict[int, OpenRequest] = {}
        self._by_stream: dict[tuple[GatewaySession, messages.StreamId], OpenRequest] = {}
        self.tasks: asyncio.TaskGroup | None = None
        self.leaving = False
        """Whether refusals say that this life of the worker takes no more requests."""
        self.suspect = False
        """Whether refusals say that the worker takes none for now."""

    def __len__(self) -> int:
        return len(self._open)

    @property
    def running(self) -> int:
        return sum(request.task is not None for request in self._open.values())

    def accept(
        self, number: int, session: GatewaySession, message: messages.Generate
    ) -> OpenRequest:
        request = OpenRequest(number, session, session.outbox, message, clock())
        self._open[number] = request
        self._by_stream[session, message.sid] = request
        session.open_requests += 1
        return request

    def start(
        self,
        number: int,
        adapter: Loaded | None,
        came_from: messages.Tier = messages.Tier.GPU,
    ) -> None:
        """Gives the request to the engine; its adapter is in a slot by now."""
        assert self.tasks is not None
        request = self._open[number]
        request.started, request.came_from = clock(), came_from
        request.task = self.tasks.create_task(
            self._run(request, adapter), name=f"request {request.message.sid}"
        )
        # Not in a `finally` of the task: a task that is cancelled before its first step never gets
        # there.
        request.task.add_done_callback(lambda _: self._forget(request))

    def cancel(self, session: GatewaySession, sid: messages.StreamId) -> None:
        """The gateway wants no more of this stream. It may have ended already."""
        request = self._by_stream.get((session, sid))
        if request is not None:
            if request.reply is not None and request.reply.prompt_tokens:
                request.reply.account()
            self._end(request)

    def refuse(self, number: int, code: str, message: str, retryable: bool) -> None:
        self._refuse(self._open[number], code, message, retryable)

    def refuse_all(self, code: str, message: str, session: GatewaySession | None = None) -> None:
        """Gives back every request, or those of one gateway; another worker may serve them."""
        for request in self.of(session):
            self._refuse(request, code, message, True)

    def of(self, session: GatewaySession | None) -> list[OpenRequest]:
        """The open requests of one gateway; None: of all."""
        return [r for r in self._open.values() if session is None or r.session is session]

    async def _run(self, request: OpenRequest, adapter: Loaded | None) -> None:
        message = request.message
        reply = request.reply = StreamReply(request)
        try:
            kept_id = (
                request.session.kept_id(message.owner) if message.path == RESPONSES_PATH else ""
            )
            await self._engine.serve(_engine_request(message, adapter, kept_id), reply)
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

    def _end(self, request: OpenRequest) -> None:
        if request.task is not None:
            request.task.cancel()
        else:
            self._forget(request)

    def _forget(self, request: OpenRequest) -> None:
        """Idempotent."""
        if self._open.pop(request.number, None) is None:
            return
        key = request.session, request.message.sid
        if self._by_stream.get(key) is request:  # stream ids begin again with each channel
            del self._by_stream[key]
        request.session.open_requests -= 1
        self._on_end(request.number)


def _engine_request(
    message: messages.Generate, adapter: Loaded | None, kept_id: str
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
        kept_id,
    )
