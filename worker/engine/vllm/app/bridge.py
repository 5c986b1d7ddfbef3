"""Shell. Sends one request through vLLM's own app in this process. The request is an ASGI scope,
and the app's ASGI events go to the Reply.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Awaitable, Callable, Collection, Iterator
from typing import Any

from shared.api_endpoints import (
    CHAT,
    RESPONSES_PATH,
    can_do,
    cannot_do,
    endpoint_of,
)
from shared.error_bodies import error_body
from shared.errors import AnswerIncomplete, CannotContinue, EngineFailure, InvalidRequest
from worker.engine.base import EngineRequest, Reply, Storing
from worker.engine.vllm.app.anthropic_errors import leave_refusals_unlogged, pass_errors
from worker.engine.vllm.app.app_answer import ENDED, AppAnswer
from worker.engine.vllm.app.large_bodies import a_turn_for
from worker.engine.vllm.app.responses import WORK, BackgroundWork, StoredResponses, with_id
from worker.engine.vllm.grammars.errors import USED
from worker.engine.vllm.resume.answer_progress import Progress

log = logging.getLogger("loraplex.vllm")


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
        USED.set(answer.used)
        failure: Exception | None = None
        try:
            await self._app(_scope(call, answer.state), _receive(call, gone), answer.send)
        except Exception as exc:
            # Starlette raises the exception again after it has answered 500. The request failed,
            # not the worker.
            log.warning(
                "request failed in the engine's app",
                extra={"request": call.request_id, "error": type(exc).__name__},
            )
            failure = exc
        finally:
            work.close()
        failure = failure or work.failure
        moves_on = self._errored() or (progress is not None and progress.failure is not None)
        if failure is not None and self._kept is not None and not moves_on:
            answer.fail(*self._kept.in_words(failure))
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
