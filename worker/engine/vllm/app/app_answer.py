"""Shell. What vLLM's app answers to one request, on its way to the Reply: whole, in our shape, and
without what the client has seen already.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Callable, Collection, Iterator
from typing import Any

from shared.api_endpoints import Endpoint, ErrorFamily
from shared.error_bodies import answer_event
from shared.errors import AnswerIncomplete, EngineFailure
from worker.engine.base import EngineRequest, Reply
from worker.engine.vllm.app.errors import event_in_our_shape, in_our_shape, refusal
from worker.engine.vllm.app.json_pieces import CHUNK_BYTES
from worker.engine.vllm.app.responses import BackgroundWork
from worker.engine.vllm.app.written_answers import WRITTEN
from worker.engine.vllm.grammars.errors import TokensSoFar
from worker.engine.vllm.resume.answer_progress import Progress

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
        "used",
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
        self.used = TokensSoFar()
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
        """The app has broken off a stream. If no status has left yet, the client gets this one.
        After that, what is wrong with the request itself is the last event.
        """
        if not self._sse or self.ended:
            return
        error = in_our_shape(status, body, self._endpoint.errors, self._arguments)
        if not self._begun:
            self._refuse(status, error)
        elif status < EngineFailure.status:
            self._held += answer_event(error, self._endpoint.errors)
            self._count()
            self.ended = True
            self._put(True)

    def _refuse(self, status: int, body: bytes) -> None:
        self._begun = self.ended = True
        self._count()
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
        else:  # it was ended in its middle, or was none
            self._reply.prompt_tokens = self.used.prompt_tokens
            self._reply.output_tokens = self.used.output_tokens
