"""Shell. Sends one request through vLLM's own app in this process. The request is an ASGI scope,
and the app's ASGI events go to the Reply.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import re
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterator
from typing import Any

from shared.api_endpoints import (
    CHAT,
    RESPONSES_PATH,
    Endpoint,
    ErrorFamily,
    can_do,
    cannot_do,
    endpoint_of,
)
from shared.error_bodies import error_body
from shared.errors import AnswerIncomplete, CannotContinue, EngineFailure, InvalidRequest
from worker.engine.base import EngineRequest, Reply, Storing
from worker.engine.vllm.app.anthropic_errors import leave_refusals_unlogged, pass_errors
from worker.engine.vllm.app.errors import event_in_our_shape, in_our_shape, refusal
from worker.engine.vllm.app.json_pieces import CHUNK_BYTES
from worker.engine.vllm.app.large_bodies import a_turn_for
from worker.engine.vllm.app.responses import WORK, BackgroundWork, StoredResponses, with_id
from worker.engine.vllm.app.written_answers import WRITTEN
from worker.engine.vllm.resume.answer_progress import Progress

log = logging.getLogger("loraplex.vllm")

FINISH = b'"finish_reason":"'
FINISH_REASON = re.compile(rb'"finish_reason":"([a-z_]{1,32})"')
"""A model's words cannot look like it: in a JSON text its quotation marks have backslashes."""
STOP_REASON = re.compile(rb'"stop_reason":"([a-z_]{1,32})"')
"""The same in Anthropic's answers."""
PIECE_BYTES = CHUNK_BYTES
PREAMBLE = (b"event: response.created", b"event: response.queued", b"event: response.in_progress")
"""These events only say that a request has arrived. The engine may still refuse it."""
ENDED = "The engine ended this answer without saying why."
_JSON = b"application/json"


class AppBridge:
    """Calls vLLM's `app`. `tasks` are what its model can do, and `arguments` the names of vLLM's
    arguments. `errored` says whether the engine has died.
    """

    def __init__(
        self,
        app: Any,
        base: str,
        tasks: Collection[str],
        arguments: Collection[str],
        errored: Callable[[], bool],
    ) -> None:
        self._app, self._base, self._tasks = app, base, tasks
        self._arguments, self._errored = arguments, errored
        serving = getattr(app.state, "openai_serving_responses", None)
        self._kept = StoredResponses(serving, errored) if serving is not None else None
        messages = getattr(app.state, "anthropic_serving_messages", None)
        if messages is not None:
            pass_errors(messages)
            leave_refusals_unlogged()

    def stores(self, answer_id: str) -> Storing:
        return Storing.NOT if self._kept is None else self._kept.has(answer_id)

    def copies(self) -> Iterator[tuple[str, bytes]]:
        return iter(()) if self._kept is None else self._kept.copies()

    def keep_copy(self, answer_id: str, copy: bytes) -> None:
        if self._kept is not None:
            self._kept.keep_copy(answer_id, copy)

    async def serve(self, call: EngineRequest, reply: Reply, progress: Progress | None) -> None:
        """Answers the call. Raises AnswerIncomplete, CannotContinue or EngineFailure."""
        endpoint = endpoint_of(call.path) or CHAT
        if not can_do(endpoint, self._tasks):
            error = InvalidRequest(cannot_do(self._base, endpoint, self._tasks), param="model")
            reply.head(error.status, False, error_body(error, endpoint.errors), True)
            return
        gone = asyncio.Event()
        work = BackgroundWork(gone.set)
        answer = AppAnswer(reply, call, endpoint, progress, self._arguments, gone, work)
        if self._kept is not None and call.path == RESPONSES_PATH and call.answer_id:
            answer.copy = functools.partial(self._kept.copy, call.answer_id)
        # The app runs in a task of its own. Cancelling it would leave vLLM's handler running, so it
        # is told that the client disconnected.
        running = asyncio.create_task(
            self._run(call, answer, progress, gone, work), name=f"asgi {call.request_id}"
        )
        try:
            await asyncio.shield(running)
            await work.finished()  # it still uses its adapter
            if answer.goes_on:
                self._check(progress)
                answer.finish()
        except asyncio.CancelledError:
            gone.set()
            work.cancel()
            with contextlib.suppress(EngineFailure, AnswerIncomplete, CannotContinue):
                await running
            await work.finished()
            if self._kept is not None and call.background:
                self._kept.forget_unmade(call.answer_id)
            raise

    async def _run(
        self,
        call: EngineRequest,
        answer: AppAnswer,
        progress: Progress | None,
        gone: asyncio.Event,
        work: BackgroundWork,
    ) -> None:
        WORK.set(work)
        try:
            await self._app(_scope(call, answer.state), _receive(call, gone), answer.send)
        except Exception as exc:
            # Starlette raises the exception again after it has answered 500. The request failed,
            # not the worker.
            log.warning(
                "request failed in the engine's app",
                extra={"request": call.request_id, "error": type(exc).__name__},
            )
            moves_on = progress is not None and progress.failure is not None
            if self._kept is not None and not self._errored() and not moves_on:
                answer.fail(*self._kept.in_words(exc))
        finally:
            work.close()
        self._check(progress)
        if not answer.ended and (work.broken or not gone.is_set()):
            raise AnswerIncomplete(ENDED)

    def _check(self, progress: Progress | None) -> None:
        """Raises what has ended the answer in its middle."""
        if progress is not None and progress.failure is not None:
            raise progress.failure
        if self._errored():
            raise EngineFailure("the engine died")


def _scope(call: EngineRequest, state: dict[str, Any]) -> dict[str, Any]:
    path, _, query = call.path.partition("?")
    return {
        "type": "http",
        # from 2.4 on Starlette would not listen for the disconnect
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": call.method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "server": ("worker", 0),
        "client": ("gateway", 0),
        "headers": [
            (b"content-type", call.content_type.encode()),
            (b"content-length", str(len(call.body)).encode()),
            (b"x-request-id", call.request_id.encode()),
            *([(b"traceparent", call.traceparent.encode())] if call.traceparent else []),
            *([(b"tracestate", call.tracestate.encode())] if call.tracestate else []),
        ],
        "state": state,
    }


def _receive(call: EngineRequest, gone: asyncio.Event) -> Callable[[], Awaitable[dict[str, Any]]]:
    body = call.body
    if call.answer_id and call.path == RESPONSES_PATH:
        body = with_id(body, call.answer_id)
    unread = True

    async def receive() -> dict[str, Any]:
        nonlocal unread
        if unread:
            unread = False
            await a_turn_for(body)
            return {"type": "http.request", "body": body, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    return receive


class AppAnswer:
    """The ASGI `send` of one request. It joins the head with the first bytes, and leaves out what
    the client has seen already. It sends the bytes of one output together with the tokens of that
    output. Errors are put into our shape, and a stream that is not whole does not end.

    vLLM sends the status of a stream before its engine has accepted the request. Here the status
    waits for the first event that is a part of an answer. An error that comes before gets a status
    of its own.
    """

    __slots__ = (
        "_arguments",
        "_background",
        "_begun",
        "_endpoint",
        "_failed",
        "_finished",
        "_gone",
        "_held",
        "_on_seen",
        "_parts",
        "_progress",
        "_reply",
        "_sse",
        "_status",
        "_work",
        "_written",
        "copy",
        "ended",
        "goes_on",
        "state",
    )

    def __init__(
        self,
        reply: Reply,
        call: EngineRequest,
        endpoint: Endpoint,
        progress: Progress | None,
        arguments: Collection[str],
        gone: asyncio.Event,
        work: BackgroundWork,
    ) -> None:
        self._gone, self._work = gone, work
        self._reply, self._endpoint, self._background = reply, endpoint, call.background
        self.state: dict[str, Any] = {}
        self.copy: Callable[[], bytes] = bytes
        """What is stored of the answer, for another worker. Empty: nothing is."""
        self.goes_on = False
        """Whether the client has its answer while the rest is made in the background."""
        self._progress, self._arguments = progress, arguments
        self._on_seen = call.on_seen
        self._held = b""
        if progress is not None:
            progress.on_complete = self._complete
        self._status, self._sse, self._begun, self.ended = 0, False, False, False
        self._parts: list[bytes] = []
        self._written: deque[bytes] = deque()
        self._failed = self._finished = False

    async def send(self, event: dict[str, Any]) -> None:
        if event["type"] == "http.response.start":
            self._start(event["status"], event["headers"])
            return
        progress = self._progress
        self._work.wrote()
        if self.ended or (progress is not None and progress.failure is not None):
            return
        data, end = event.get("body", b""), not event.get("more_body", False)
        if self._status >= 400:
            self._parts.append(data)
            if not end:
                return
            data = in_our_shape(
                self._status, b"".join(self._parts), self._endpoint.errors, self._arguments
            )
        elif self._sse:
            if not self._begun:
                refused = refusal(data, self._endpoint.errors, self._arguments)
                if refused is not None:
                    self._refuse(*refused)
                    return
            data = self._watched(data)
            if end and not self._whole:
                raise AnswerIncomplete(ENDED)
        else:
            self._written = self.state.pop(WRITTEN, self._written)
            self._note_reasons(data)
        waits = not self._begun and data.startswith(PREAMBLE)
        if progress is None or not (progress.old or (waits and progress.seen)):
            self._held += data
        else:
            self._written.clear()
            if self._sse and self._on_seen is not None:
                self._on_seen(data)
        if end:
            self._count()
            self.ended = True
            if self._background and not self._sse and self._status < 400:
                self.goes_on = True
                self._reply.answered(self._status, self._held or b"".join(self._written))
                return
        if end or not (waits or (progress is not None and progress.prompts)):
            if self._written or len(self._held) > PIECE_BYTES:
                await self._put_pieces()
            self._put(end)

    def finish(self) -> None:
        """What is made in the background has ended."""
        self._count()
        self._store()
        self._reply.more(b"", True)

    def fail(self, status: int, body: bytes) -> None:
        """The app has broken off. If no status has left yet, the client gets this one."""
        if self._sse and not self._begun and not self.ended:
            self._refuse(status, in_our_shape(status, body, self._endpoint.errors, self._arguments))

    def _refuse(self, status: int, body: bytes) -> None:
        self._begun = self.ended = True
        self._reply.head(status, False, body, True)

    def _complete(self) -> None:
        """All bytes that were rendered from one output are here. If it had no token, they wait for
        the next output.
        """
        if self._held and self._progress is not None and self._progress.words:
            self._put(False)

    async def _put_pieces(self) -> None:
        """Puts all but the end of a large answer. What is sent at once would hold the loops of this
        worker and of the gateway, and fill the link.
        """
        words = b""
        if self._progress is not None:  # they stand for all of it, so they go with the last piece
            words, self._progress.words = self._progress.words, b""
        pieces, self._held = self._pieces(self._held), b""
        for piece in pieces:
            if self._held:
                self._put(False)
                await self._reply.room()
                if self._gone.is_set():
                    break
            self._held = piece
        if self._progress is not None:
            self._progress.words = words

    def _pieces(self, held: bytes) -> Iterator[bytes]:
        while self._written:  # what has left is given up
            chunk = self._written.popleft()
            self._note_reasons(chunk)
            yield chunk
        data = memoryview(held)
        for at in range(0, len(data), PIECE_BYTES):
            yield bytes(data[at : at + PIECE_BYTES])

    def _put(self, end: bool) -> None:
        data, tokens, self._held = self._held, b"", b""
        if self._progress is not None:
            tokens, self._progress.words = self._progress.words, b""
        if end:
            self._store()
        if self._begun:
            self._reply.more(data, end, tokens)
        elif data or end:
            self._begun = True
            self._reply.head(self._status, self._sse, data, end, tokens)

    def _store(self) -> None:
        """Sends the copy before the end. So whoever has seen the end can go on from the answer."""
        copy = self.copy()
        if copy:
            self._reply.stored(copy)

    def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self._status = status
        given = {name.lower(): value for name, value in headers}
        kind = given.get(b"content-type", _JSON)
        self._sse = kind.startswith(b"text/event-stream") and status < 400
        if not self._sse and not kind.startswith(_JSON) and status < 400:
            lines = b"content-type: " + kind + b"\r\n"
            if b"metadata" in given:
                lines += b"metadata: " + given[b"metadata"] + b"\r\n"
            self._reply.lines(lines)

    def _watched(self, data: bytes) -> bytes:
        """Looks in a stream's bytes for what says that the stream is whole, or that it failed."""
        if FINISH in data or not self._endpoint.tasks >= {"generate"}:
            self._finished = True
        self._note_reasons(data)
        error = event_in_our_shape(data, self._endpoint.errors, self._arguments)
        if error is not None:
            self._failed = True
        if data:
            self._parts = [data]  # keep the last event only
        return data if error is None else error

    def _note_reasons(self, data: bytes) -> None:
        """Why choices have ended, in the order in which they did."""
        anthropic = self._endpoint.errors is ErrorFamily.ANTHROPIC
        found = (STOP_REASON if anthropic else FINISH_REASON).findall(data)
        if found:
            known = self._reply.finish_reasons
            self._reply.finish_reasons = ",".join(
                [*([known] if known else []), *(reason.decode() for reason in found)]
            )

    @property
    def _whole(self) -> bool:
        if self._failed:
            return True  # the client has got an error event
        last = b"".join(self._parts)
        ends = any(end in last for end in self._endpoint.stream_ends)
        return ends and (self._finished or b"[DONE]" not in last)

    def _count(self) -> None:
        usage = getattr(self.state.get("request_metadata"), "final_usage_info", None)
        if usage is not None:
            self._reply.prompt_tokens = usage.prompt_tokens or 0
            self._reply.output_tokens = usage.completion_tokens or 0
