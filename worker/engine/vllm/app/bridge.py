"""Shell. One request through vLLM's own app in this process: an ASGI scope in, the app's events out
to the Reply.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Collection
from typing import Any

from shared.endpoints import CHAT, RESPONSES_PATH, Endpoint, can_do, cannot_do, endpoint_of
from shared.error_bodies import error_body
from shared.errors import AnswerIncomplete, CannotContinue, EngineFailure, InvalidRequest
from worker.engine.base import EngineRequest, Reply
from worker.engine.vllm.app.errors import event_in_our_shape, in_our_shape
from worker.engine.vllm.app.responses import KeptResponses, with_id
from worker.engine.vllm.resume.progress import Progress

log = logging.getLogger("loraplex.vllm")

FINISH = b'"finish_reason":"'
ENDED = "The engine ended this answer without saying why."
_JSON = b"application/json"


class AppBridge:
    """`app` is vLLM's, `tasks` are what its model can do, `arguments` the names of vLLM's
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
        self._kept = KeptResponses(serving) if serving is not None else None

    async def serve(self, call: EngineRequest, reply: Reply, progress: Progress | None) -> None:
        """Raises AnswerIncomplete, CannotContinue or EngineFailure."""
        endpoint = endpoint_of(call.path) or CHAT
        if not can_do(endpoint, self._tasks):
            error = InvalidRequest(cannot_do(self._base, endpoint, self._tasks), param="model")
            reply.head(error.status, False, error_body(error, endpoint.errors), True)
            return
        gone = asyncio.Event()
        # The app runs in a task of its own: cancelling it would leave vLLM's handler running, so it
        # is told of a disconnect instead.
        running = asyncio.create_task(
            self._run(call, endpoint, reply, progress, gone), name=f"asgi {call.request_id}"
        )
        try:
            await asyncio.shield(running)
            await self._background(call)
        except asyncio.CancelledError:
            gone.set()
            if self._kept is not None and call.kept_id:
                self._kept.cancel(call.kept_id)
            with contextlib.suppress(EngineFailure, AnswerIncomplete, CannotContinue):
                await running
            raise

    async def _background(self, call: EngineRequest) -> None:
        """An answer that goes on after its client has been told of it still uses its adapter."""
        if self._kept is not None and call.kept_id:
            await self._kept.finished(call.kept_id)

    async def _run(
        self,
        call: EngineRequest,
        endpoint: Endpoint,
        reply: Reply,
        progress: Progress | None,
        gone: asyncio.Event,
    ) -> None:
        state: dict[str, Any] = {}
        out = AppAnswer(reply, state, endpoint, progress, self._arguments)
        try:
            await self._app(_scope(call, state), _receive(call, gone), out.send)
        except Exception as exc:
            # Starlette re-raises after it has answered 500; the request failed, not the worker
            log.warning(
                "request failed in the engine's app",
                extra={"request": call.request_id, "error": type(exc).__name__},
            )
        if progress is not None and progress.failure is not None:
            raise progress.failure
        if self._errored():
            raise EngineFailure("the engine died")
        if not out.ended and not gone.is_set():
            raise AnswerIncomplete(ENDED)


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
        ],
        "state": state,
    }


def _receive(call: EngineRequest, gone: asyncio.Event) -> Callable[[], Awaitable[dict[str, Any]]]:
    body = call.body
    if call.kept_id and call.path == RESPONSES_PATH:
        body = with_id(body, call.kept_id)
    unread = True

    async def receive() -> dict[str, Any]:
        nonlocal unread
        if unread:
            unread = False
            return {"type": "http.request", "body": body, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    return receive


class AppAnswer:
    """ASGI `send`: joins the head with the first bytes, leaves out what the client has seen or must
    not see when the engine dies, and sends the bytes of one output and its tokens together. Errors
    come into our shape, and a stream does not end that is not whole.
    """

    __slots__ = (
        "_arguments",
        "_begun",
        "_endpoint",
        "_failed",
        "_finished",
        "_held",
        "_parts",
        "_progress",
        "_reply",
        "_sse",
        "_state",
        "_status",
        "ended",
    )

    def __init__(
        self,
        reply: Reply,
        state: dict[str, Any],
        endpoint: Endpoint,
        progress: Progress | None,
        arguments: Collection[str],
    ) -> None:
        self._reply, self._state, self._endpoint = reply, state, endpoint
        self._progress, self._arguments = progress, arguments
        self._held = b""
        if progress is not None:
            progress.on_complete = self._complete
        self._status, self._sse, self._begun, self.ended = 0, False, False, False
        self._parts: list[bytes] = []
        self._failed = self._finished = False

    async def send(self, event: dict[str, Any]) -> None:
        if event["type"] == "http.response.start":
            self._start(event["status"], event["headers"])
            return
        progress = self._progress
        if progress is not None and progress.failure is not None:
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
            data = self._watched(data)
            if end and not self._whole:
                raise AnswerIncomplete(ENDED)
        if progress is None or not progress.old:
            self._held += data
        if end:
            self._count()
            self.ended = True
        if end or progress is None or not progress.prompts:
            self._put(end)

    def _complete(self) -> None:
        """All that was rendered of one output is here. Without a token it waits for the next."""
        if self._held and self._progress is not None and self._progress.words:
            self._put(False)

    def _put(self, end: bool) -> None:
        data, tokens, self._held = self._held, b"", b""
        if self._progress is not None:
            tokens, self._progress.words = self._progress.words, b""
        if self._begun:
            self._reply.more(data, end, tokens)
        elif data or end:
            self._begun = True
            self._reply.head(self._status, self._sse, data, end, tokens)

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
        """What of a stream's bytes says that it is whole, or that it failed."""
        if FINISH in data or not self._endpoint.tasks >= {"generate"}:
            self._finished = True
        error = event_in_our_shape(data, self._endpoint.errors, self._arguments)
        if error is not None:
            self._failed = True
        if data:
            self._parts = [data]  # the last that was said
        return data if error is None else error

    @property
    def _whole(self) -> bool:
        if self._failed:
            return True  # the error event has said so
        last = b"".join(self._parts)
        ends = any(end in last for end in self._endpoint.stream_ends)
        return ends and (self._finished or b"[DONE]" not in last)

    def _count(self) -> None:
        usage = getattr(self._state.get("request_metadata"), "final_usage_info", None)
        if usage is not None:
            self._reply.prompt_tokens = usage.prompt_tokens or 0
            self._reply.output_tokens = usage.completion_tokens or 0
