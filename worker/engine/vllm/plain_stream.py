"""Shell. One plain stream, written where the engine's output arrives, with one call per token. How
a stream is started is in fast_path.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm.exceptions import GenerationError
from vllm.v1.engine import FinishReason

from shared.api_endpoints import ErrorFamily
from shared.errors import EngineFailure
from shared.link.token_ids import pack
from worker.engine.base import Reply
from worker.engine.vllm.app.errors import event_in_our_shape, refusal
from worker.engine.vllm.resume.resumable_llm import (
    EarlierOutput,
)
from worker.engine.vllm.sse import (
    DONE,
    Chunks,
    escape,
)
from worker.engine.vllm.write_interval import WriteInterval


@dataclass(frozen=True, slots=True)
class Submission:
    """What vLLM's serving object asked its engine for."""

    prompt: Any
    params: Any
    request_id: str
    more: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Draft:
    """A plain stream before its first token: how it is written, what the engine is asked for, and
    how vLLM words an exception.
    """

    chunks: Chunks
    submission: Submission
    in_words: Callable[[Exception], str]


class PlainStream:
    """One plain stream in progress. In vLLM's state of the request it takes the place of both the
    making of outputs and the queue for them.
    """

    __slots__ = (
        "_before",
        "_begun",
        "_chunks",
        "_detokenizer",
        "_held",
        "_in_words",
        "_interval",
        "_opening",
        "_pacing",
        "_prompt_tokens",
        "_reply",
        "_sent",
        "_tokens",
        "_unsent",
        "ended",
    )

    def __init__(
        self, draft: Draft, reply: Reply, pacing: WriteInterval, past: EarlierOutput | None = None
    ) -> None:
        self._chunks, self._in_words, self._reply, self._pacing = (
            draft.chunks,
            draft.in_words,
            reply,
            pacing,
        )
        self._before = len(past.seen) if past is not None else 0  # tokens that another worker made
        self._tokens = self._sent = self._before
        self._opening = b"" if past is not None else draft.chunks.opening
        self._begun = False
        self._held = b""
        self._unsent: list[int] = []  # tokens whose bytes have not left yet
        self._prompt_tokens = 0
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def attach(self, state: Any) -> None:
        """From now on the engine's output for this request comes here."""
        self._detokenizer, self._prompt_tokens = state.detokenizer, state.prompt_len
        self._interval, self._sent = state.stream_interval, state.sent_tokens_offset
        self._reply.prompt_tokens = self._prompt_tokens  # for a client that leaves before the end
        self._tokens = self._detokenizer.num_output_tokens()
        state.make_request_output = self.advance
        state.queue = self

    def catch_up(self, early: Any) -> None:
        """Takes what the engine said before `attach`: a RequestOutput, an exception, or None."""
        if isinstance(early, Exception):
            self.put(early)
        elif early is not None:
            self._prompt_tokens = len(early.prompt_token_ids)
            for output in early.outputs:
                self._tokens = max(self._tokens, self._before + len(output.token_ids))
                self._unsent += output.token_ids
                self.write(output.text, output.finish_reason, output.stop_reason)

    def advance(
        self,
        new_token_ids: list[int],
        pooling_output: Any,
        finish_reason: FinishReason | None,
        stop_reason: int | str | None,
        *_: Any,
        **__: Any,
    ) -> None:
        """Takes the place of `RequestState.make_request_output`. It gets the tokens of one step,
        already detokenised, and leaves nothing for the queue.
        """
        self._tokens += len(new_token_ids)
        self._unsent += new_token_ids
        if finish_reason is not None:
            self.write(
                self._detokenizer.get_next_output_text(True, True), str(finish_reason), stop_reason
            )
            return
        if self._begun and not self._pacing.flush:
            return
        if self._interval > 1:
            if self._sent and self._tokens - self._sent < self._interval:
                return
            self._sent = self._tokens
        self.write(self._detokenizer.get_next_output_text(False, True), None, None)

    def write(self, text: str, finish_reason: str | None, stop_reason: int | str | None) -> None:
        """Writes one chunk. An output without text or tokens, which vLLM makes before the prompt
        has been computed, gets no chunk.
        """
        if self.ended.done() or not (self._tokens > self._before or finish_reason):
            return
        try:
            if finish_reason is None:
                self._send(b"".join((self._chunks.before, escape(text), self._chunks.after)), False)
            elif finish_reason == "error":
                self._break_off(GenerationError())
            else:
                self._finish(text, finish_reason, stop_reason)
        except UnicodeEncodeError as exc:
            # An exception from here would end the engine's output handler, and with it every
            # stream.
            self._break_off(exc)

    def put(self, output: object) -> None:
        """Takes the place of `RequestOutputCollector.put`, which gets the exception that ended the
        engine's output handler.
        """
        if isinstance(output, Exception) and not self.ended.done():
            self.ended.set_exception(EngineFailure(f"the engine died: {type(output).__name__}"))

    def _finish(self, text: str, finish_reason: str, stop_reason: int | str | None) -> None:
        chunks, reply = self._chunks, self._reply
        last = chunks.last(text, finish_reason, stop_reason) if text or self._tokens else b""
        reply.prompt_tokens, reply.output_tokens = self._prompt_tokens, self._tokens
        reply.finish_reasons = finish_reason
        self._send(last + chunks.end(self._prompt_tokens, self._tokens), True)
        self.ended.set_result(None)

    def _break_off(self, exc: Exception) -> None:
        """Ends the stream with an error. After the status has left the error is an event, as in
        vLLM. Before that it is an answer with a status of its own.
        """
        event = b"data: %b\n\n" % self._in_words(exc).encode()
        refused = None if self._begun else refusal(event, ErrorFamily.OPENAI, ())
        if refused is not None:
            self._begun = True
            self._reply.head(refused[0], False, refused[1], True)
        else:
            self._send((event_in_our_shape(event, ErrorFamily.OPENAI, ()) or event) + DONE, True)
        self.ended.set_result(None)

    def _send(self, data: bytes, end: bool) -> None:
        if self._held:
            data, self._held = self._held + data, b""
        if not (self._unsent or end):  # bytes that leave without a token could not be continued
            self._held = data
            return
        self._reply.output_tokens = self._tokens
        tokens = pack(self._unsent)
        self._unsent.clear()
        if self._begun:
            self._reply.more(data, end, tokens)
        else:
            self._begun = True
            self._reply.head(200, True, self._opening + data, end, tokens)
