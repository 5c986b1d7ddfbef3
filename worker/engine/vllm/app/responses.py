"""Shell. The answers of `/v1/responses`, which clients may ask for again. vLLM keeps them for ever;
here number, size and age are bounded.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import aclosing
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

import msgspec
from pydantic_core import PydanticSerializationError, to_json

from worker.engine.base import Storing

log = logging.getLogger("loraplex.vllm")

MAX_KEPT = 1024
KEPT_S = 3600.0
MAX_KEPT_BYTES = 64 << 20
"""Size of each table. A value counts with the length of its JSON."""
MAX_COPY_BYTES = 1 << 20
"""Of a response with all that was said before it, as it goes to another worker."""
UNDER_WAY = frozenset({"queued", "in_progress"})
WHOLE = frozenset({"completed", "incomplete"})
METADATA = 6
"""Place of a request's metadata among the arguments of vLLM's `responses_full_generator`."""


def _size(value: Any) -> int:
    try:
        return len(to_json(value, fallback=repr))
    except PydanticSerializationError:  # a text that is not UTF-8
        return len(repr(value))


class ExpiringTable(OrderedDict[str, Any]):
    """A dict with bounds on number, age and size. What was put in first leaves first."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._put: dict[str, tuple[float, int]] = {}
        self._bytes = 0

    def __setitem__(self, key: str, value: Any) -> None:
        self._forget(key)
        size = _size(value)
        super().__setitem__(key, value)
        self.move_to_end(key)
        self._put[key] = (self._clock(), size)
        self._bytes += size
        while self and (len(self) > MAX_KEPT or self._bytes > MAX_KEPT_BYTES or self._late()):
            del self[next(iter(self))]

    def __delitem__(self, key: str) -> None:
        super().__delitem__(key)
        self._forget(key)

    def __getitem__(self, key: str) -> Any:
        while self and self._late():
            del self[next(iter(self))]
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        try:
            return self[key]
        except KeyError:
            return default

    def size(self, key: str) -> int:
        return self._put[key][1]

    def _late(self) -> bool:
        return self._put[next(iter(self))][0] + KEPT_S < self._clock()

    def _forget(self, key: str) -> None:
        found = self._put.pop(key, None)
        if found is not None:
            self._bytes -= found[1]


class BackgroundWork:
    """The response of one request, if it is made in the background. One that is read as a stream
    keeps the pace of its reader. So the reader has written all events of one output before the
    next output is made. `on_failure` is called if it breaks off; its reader would wait for ever.
    """

    def __init__(self, on_failure: Callable[[], None]) -> None:
        self._on_failure = on_failure
        self._task: asyncio.Task[Any] | None = None
        self._written = 0
        self._changed = asyncio.Event()
        self._closed = self.broken = False
        self.failure: Exception | None = None

    def begun(self) -> None:
        """This task makes the response."""
        self._task = asyncio.current_task()

    async def finished(self) -> None:
        """Returns once nothing more is generated for it."""
        if self._task is not None:
            await asyncio.wait([self._task])

    def cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def wrote(self) -> None:
        """The reader has written one more event."""
        self._written += 1
        self._changed.set()

    def close(self) -> None:
        """Nobody reads any more."""
        self._closed = True
        self._changed.set()

    def fail(self, exc: Exception) -> None:
        self.failure, self.broken = exc, True
        self._on_failure()

    async def until_written(self, events: int) -> None:
        while self._written < events and not self._closed:
            self._changed.clear()
            await self._changed.wait()


WORK: ContextVar[BackgroundWork | None] = ContextVar("background_work", default=None)


class RunningTasks(dict[str, Any]):
    """Takes the place of vLLM's table of tasks in the background. A task takes its entry out when
    it is done. By then the entry may be that of a later task for the same response.
    """

    def pop(self, key: str, default: Any = None) -> Any:
        task = self.get(key)
        return default if task is None or not task.done() else super().pop(key)


class StoredResponses:
    """vLLM's serving object for responses, with bounded tables in place of its own. `errored` says
    whether the engine has died.
    """

    def __init__(self, serving: Any, errored: Callable[[], bool]) -> None:
        self._serving, self._errored = serving, errored
        self._copies = ExpiringTable()
        serving.enable_store = True
        serving.response_store = ExpiringTable()
        serving.msg_store = ExpiringTable()
        serving.event_store = ExpiringTable()
        serving.background_tasks = RunningTasks()
        serving._run_background_request_stream = self._stream_in_background
        self._run_in_background = serving._run_background_request
        serving._run_background_request = self._make_in_background
        self._whole = serving.responses_full_generator
        serving.responses_full_generator = self._counted
        serving._convert_generation_error_to_streaming_response = _raise

    def has(self, answer_id: str) -> Storing:
        if self._serving.response_store.get(answer_id) is None:
            return Storing.NOT
        return Storing.COPY if self._copies.get(answer_id) else Storing.ORIGINAL

    def copy(self, answer_id: str) -> bytes:
        """What another worker needs to answer for this response, and to go on from it. Empty if it
        is not stored, too large, or of a form that has no JSON.
        """
        response = self._serving.response_store.get(answer_id)
        if response is None or self._serving.use_harmony:
            return b""
        if self._serving.response_store.size(answer_id) > MAX_COPY_BYTES:
            return b""
        stored = {"response": response, "messages": self._serving.msg_store.get(answer_id)}
        try:
            copy = to_json(stored, by_alias=True)
        except PydanticSerializationError:
            return b""
        return copy if len(copy) <= MAX_COPY_BYTES else b""

    def copies(self) -> Iterator[tuple[str, bytes]]:
        """All that are whole, the newest first: the worker may have no time for all."""
        for answer_id, response in reversed(list(self._serving.response_store.items())):
            if response.status not in UNDER_WAY and (copy := self.copy(answer_id)):
                yield answer_id, copy

    def keep_copy(self, answer_id: str, copy: bytes) -> None:
        """Keeps what `copy` has made on another worker. What was made here stays."""
        if self.has(answer_id) is Storing.ORIGINAL:
            return
        try:
            stored = msgspec.json.decode(copy, type=_Copy)
            response = self._validated(stored.response)
        except (msgspec.MsgspecError, ValueError) as exc:
            log.warning("copy of a response dropped", extra={"error": type(exc).__name__})
            return
        self._serving.response_store[answer_id] = response
        self._serving.msg_store[answer_id] = stored.messages
        self._copies[answer_id] = True

    def in_words(self, exc: Exception) -> tuple[int, bytes]:
        """The status and body that vLLM would answer for an exception of its engine."""
        # Starlette wraps an exception that comes after the head.
        cause = exc.__cause__ if isinstance(exc, RuntimeError) else None
        answer = self._serving.create_error_response(cause if cause is not None else exc)
        return int(answer.error.code), answer.model_dump_json().encode()

    async def _counted(self, *args: Any, **named: Any) -> Any:
        """As vLLM's own, which tells the tokens of a response to its client alone. Here they are
        noted where its other answers have them.
        """
        response = await self._whole(*args, **named)
        usage = getattr(response, "usage", None)
        if usage is not None:
            args[METADATA].final_usage_info = SimpleNamespace(
                prompt_tokens=usage.input_tokens, completion_tokens=usage.output_tokens
            )
        return response

    def forget_unmade(self, answer_id: str) -> None:
        """This worker has given the response up. It may go on elsewhere, so nobody is to be told of
        what this one has of it. One that was begun here once more, or is whole, stays.
        """
        task = self._serving.background_tasks.get(answer_id)
        response = self._serving.response_store.get(answer_id)
        if response is None or response.status in WHOLE or (task and not task.done()):
            return
        serving = self._serving
        for table in (serving.response_store, serving.msg_store, serving.event_store):
            if answer_id in table:
                del table[answer_id]

    async def _make_in_background(self, request: Any, *args: Any, **named: Any) -> None:
        """As vLLM's own, but if it breaks off, the response says so."""
        if (work := WORK.get()) is not None:
            work.begun()
        try:
            await self._run_in_background(request, *args, **named)
        except Exception:
            self._fail(request.request_id)
            raise

    async def _stream_in_background(self, request: Any, *args: Any, **named: Any) -> None:
        """As vLLM's own, at the pace of the reader who has asked for the response."""
        events, grown, work = deque[Any](), asyncio.Event(), WORK.get()
        if work is not None:
            work.begun()
        self._serving.event_store[request.request_id] = events, grown
        made = self._serving.responses_stream_generator(request, *args, **named)
        try:
            async with aclosing(made):
                async for event in made:
                    events.append(event)
                    grown.set()
                    if work is not None:
                        await work.until_written(len(events))
        except Exception as exc:
            self._fail(request.request_id)
            if work is not None:
                work.fail(exc)
            raise
        finally:
            grown.set()

    def _validated(self, response: dict[str, Any]) -> Any:
        from vllm.entrypoints.openai.responses.protocol import ResponsesResponse

        return ResponsesResponse.model_validate(response)

    def _fail(self, answer_id: str) -> None:
        """Whoever asks for the response must not wait for ever. If the engine has died, the
        response goes on elsewhere.
        """
        response = self._serving.response_store.get(answer_id)
        if response is not None and not self._errored():
            response.status = "failed"


def _raise(exc: Exception) -> None:
    """In place of what words an exception of the engine. In a stream of a response vLLM takes these
    words for an event, and raises another exception, of what is wrong with that.
    """
    raise exc


class _Copy(msgspec.Struct):
    response: dict[str, Any]
    messages: list[Any] | None


def with_id(body: bytes, answer_id: str) -> bytes:
    """The request body with the id that its answer gets. An id that the client wrote is replaced:
    it could be that of another tenant's answer.
    """
    try:
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return _with_id_leniently(body, answer_id)
    return msgspec.json.encode({**fields, "request_id": answer_id})


def _with_id_leniently(body: bytes, answer_id: str) -> bytes:
    """For what vLLM reads and msgspec does not, as half of a surrogate pair in a name."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return body  # vLLM reports what is wrong with it
    if not isinstance(fields, dict):
        return body
    return json.dumps({**fields, "request_id": answer_id}).encode()
