"""Shell. Plain chat and completion streams without vLLM's HTTP layer: written where the engine's
output arrives, one call per token.

vLLM's way costs 54 to 90 us per token: a RequestOutput, a queue, a task switch, three pydantic
models, Starlette. Here vLLM's serving object still validates, renders the template and makes the
sampling parameters, but what it would have iterated is taken from it (EngineTap), and the engine's
output processor calls Stream.advance for each token, which puts the finished bytes into the reply.
Whatever is not plain, and whatever fails before the first byte, is left to vLLM's own app, so that
its errors stay its own.
"""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import msgspec
from starlette.datastructures import Headers
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.serve.utils.api_utils import should_include_usage
from vllm.exceptions import GenerationError
from vllm.v1.engine import FinishReason
from vllm.v1.engine.async_llm import AsyncLLM

from shared.endpoints import ErrorFamily
from shared.errors import EngineFailure
from shared.link.token_ids import pack, unpack
from worker.engine.base import EngineRequest, Reply
from worker.engine.vllm.app.errors import event_in_our_shape
from worker.engine.vllm.pacing import Pacing
from worker.engine.vllm.resume.modes import ResumeMode
from worker.engine.vllm.resume.movable import CREATED, PROGRESS, MovableLLM, Past, repeatable
from worker.engine.vllm.resume.progress import Progress
from worker.engine.vllm.sse import (
    DONE,
    Chunks,
    chat_chunks,
    completion_chunks,
    escape,
    is_plain_chat,
    is_plain_completion,
)

UNUSUAL_ARGS = (
    "api_key",
    "enable_force_include_usage",
    "enable_log_outputs",
    "enable_per_request_metrics",
    "enable_prompt_tokens_details",
    "enable_request_id_headers",
    "middleware",
    "sse_keep_alive_interval",
)
"""Arguments of `vllm serve` that add to a stream what only vLLM's app adds: where one is set, every
request goes there.
"""


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
    vLLM's words for an exception.
    """

    chunks: Chunks
    submission: Submission
    in_words: Callable[[Exception], str]


class EngineTap:
    """Stands where a serving object has its engine. `generate` starts nothing: it keeps what was
    asked for.
    """

    def __init__(self, engine: AsyncLLM) -> None:
        self._engine = engine
        self._asked: Submission | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(self, prompt: Any, params: Any, request_id: str, **more: Any) -> Submission:
        self._asked = Submission(prompt, params, request_id, more)
        return self._asked

    def take(self) -> Submission:
        """What was asked for last; the serving object makes its stream in the same step, so it is
        the caller's own.
        """
        asked, self._asked = self._asked, None
        assert asked is not None
        return asked


@dataclass(frozen=True, slots=True)
class Route:
    """A path of the API: which requests are plain there, what parses them, and what vLLM's serving
    object makes of them.
    """

    is_plain: Callable[[Mapping[str, Any]], bool]
    parse: Callable[[Any], Any]
    create: Callable[[Any, Any], Awaitable[Any]]


class Stream:
    """One running plain stream. In vLLM's state of the request it replaces both the making of
    outputs and the queue for them.
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
        self, draft: Draft, reply: Reply, pacing: Pacing, past: Past | None = None
    ) -> None:
        self._chunks, self._in_words, self._reply, self._pacing = (
            draft.chunks,
            draft.in_words,
            reply,
            pacing,
        )
        self._before = len(past.seen) if past is not None else 0  # tokens that were made elsewhere
        self._tokens = self._sent = self._before
        self._opening = b"" if past is not None else draft.chunks.opening
        self._begun = False
        self._held = b""
        self._unsent: list[int] = []  # tokens of which no bytes have left
        self._prompt_tokens = 0
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def attach(self, state: Any) -> None:
        """From now on the engine's output for this request comes here."""
        self._detokenizer, self._prompt_tokens = state.detokenizer, state.prompt_len
        self._interval, self._sent = state.stream_interval, state.sent_tokens_offset
        self._tokens = self._detokenizer.num_output_tokens()
        state.make_request_output = self.advance
        state.queue = self

    def catch_up(self, early: Any) -> None:
        """What the engine had said before `attach`: a RequestOutput, an exception, or None."""
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
        """In the place of `RequestState.make_request_output`: the tokens of one step, already
        detokenised. Leaves nothing for the queue.
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
        """One chunk. None is written for an output without text or tokens, which vLLM makes before
        the prompt is through.
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
            # raised from here it would end the engine's output handler and with it every stream
            self._break_off(exc)

    def put(self, output: object) -> None:
        """In the place of `RequestOutputCollector.put`, which gets the exception that ended the
        engine's output handler.
        """
        if isinstance(output, Exception) and not self.ended.done():
            self.ended.set_exception(EngineFailure(f"the engine died: {type(output).__name__}"))

    def _finish(self, text: str, finish_reason: str, stop_reason: int | str | None) -> None:
        chunks, reply = self._chunks, self._reply
        last = chunks.last(text, finish_reason, stop_reason) if text or self._tokens else b""
        reply.prompt_tokens, reply.output_tokens = self._prompt_tokens, self._tokens
        self._send(last + chunks.end(self._prompt_tokens, self._tokens), True)
        self.ended.set_result(None)

    def _break_off(self, exc: Exception) -> None:
        """An error after the status has gone is an event, as in vLLM."""
        event = b"data: %b\n\n" % self._in_words(exc).encode()
        self._send((event_in_our_shape(event, ErrorFamily.OPENAI, ()) or event) + DONE, True)
        self.ended.set_result(None)

    def _send(self, data: bytes, end: bool) -> None:
        if self._held:
            data, self._held = self._held + data, b""
        if not (self._unsent or end):  # what leaves without a token could not be continued
            self._held = data
            return
        tokens = pack(self._unsent)
        self._unsent.clear()
        if self._begun:
            self._reply.more(data, end, tokens)
        else:
            self._begun = True
            self._reply.head(200, True, self._opening + data, end, tokens)


class FastServing:
    """Serves plain streams of one engine. Made once vLLM's app is ready."""

    def __init__(self, engine: MovableLLM, state: Any, args: Any, pacing: Pacing) -> None:
        self._engine, self._pacing = engine, pacing
        self._tap = EngineTap(engine)
        self._routes: dict[str, Route] = {}
        self.served = 0
        if any(getattr(args, name, None) for name in UNUSUAL_ARGS):
            return
        # its figures ride on the usage event
        speculative = engine.vllm_config.speculative_config is not None
        chat, completion = (
            getattr(state, "openai_serving_chat", None),
            getattr(state, "openai_serving_completion", None),
        )
        if chat is not None and chat.parser_cls is None and not speculative:
            chat = self._tapped(chat, "chat_completion_stream_generator", self._draft_chat)
            self._routes["/v1/chat/completions"] = Route(
                is_plain_chat, ChatCompletionRequest.model_validate, chat.create_chat_completion
            )
        if completion is not None and not speculative:
            completion = self._tapped(
                completion, "completion_stream_generator", self._draft_completion
            )
            self._routes["/v1/completions"] = Route(
                is_plain_completion, CompletionRequest.model_validate, completion.create_completion
            )

    async def serve(self, call: EngineRequest, reply: Reply) -> bool:
        """Answers the call, or returns False if that is for vLLM's app to do; nothing has been said
        or started then.

        Raises:
            EngineFailure: the engine is dead.
        """
        draft = await self._draft(call)
        if draft is None:
            return False
        engine, asked, past = self._engine, draft.submission, None
        if engine.mode(asked.params, asked.prompt) is ResumeMode.REGENERATE:
            if call.seen:
                return False
            asked = replace(asked, params=repeatable(asked.params, asked.request_id))
        elif call.seen:
            past = self._past(asked, call.seen)
            if past.ended is not None:
                return False
            prompt, params = past.rest()
            asked = replace(asked, prompt=prompt, params=params)
        stream = Stream(draft, reply, self._pacing, past)
        try:
            # The engine's front end looks for what is `primed` while it adds the request.
            PROGRESS.set(Progress(primed=past) if past is not None else None)
            queue = await engine.add_request(
                asked.request_id, asked.prompt, asked.params, **asked.more
            )
        except asyncio.CancelledError:
            await engine.abort(asked.request_id)
            raise
        except Exception:
            # whatever vLLM refuses here it refuses again in its app, in its own words
            return False
        states = engine.output_processor.request_states
        # No await up to the end of catch_up: what has come until now is in the queue, what comes
        # later goes to the stream.
        if queue.request_id in states:
            stream.attach(states[queue.request_id])
        stream.catch_up(queue.output)
        self.served += 1
        try:
            await stream.ended
        finally:
            if queue.request_id in states and not engine.errored:
                await engine.abort(queue.request_id, internal=True)
        return True

    def _past(self, asked: Submission, seen: bytes) -> Past:
        tokenizer, tokens = self._engine.output_processor.tokenizer, unpack(seen)[0]
        past = Past(tokenizer, asked.params, asked.request_id, asked.prompt, tokens)
        past.outputs()
        return past

    async def _draft(self, call: EngineRequest) -> Draft | None:
        """What vLLM's serving object makes of a plain request; None for any other, and for one that
        it refuses.
        """
        route = self._routes.get(call.path)
        if route is None or b'"stream"' not in call.body:
            return None
        try:
            body = msgspec.json.decode(call.body)
        except msgspec.MsgspecError:
            return None
        if not isinstance(body, dict) or not route.is_plain(body):
            return None
        raw = SimpleNamespace(
            headers=Headers({"x-request-id": call.request_id}), state=SimpleNamespace()
        )
        try:
            made = await route.create(route.parse(body), raw)
        except Exception:
            # pydantic, the template and vLLM raise what they like; its app turns it into an answer
            return None
        return made if isinstance(made, Draft) else None

    def _tapped(self, serving: Any, generator: str, draft: Callable[..., Draft]) -> Any:
        """A copy of a serving object that makes drafts instead of streams; vLLM's own stays as it
        is.
        """
        tapped = copy.copy(serving)
        tapped.engine_client = self._tap
        setattr(tapped, generator, partial(draft, serving))
        return tapped

    def _draft_chat(
        self,
        serving: Any,
        request: Any,
        _generator: object,
        request_id: str,
        model: str,
        *_: object,
        **__: object,
    ) -> Draft:
        include_usage, _continuous = should_include_usage(request.stream_options, False)
        role = serving.get_chat_request_role(request)
        chunks = chat_chunks(
            request_id,
            CREATED.get() or int(time.time()),
            model,
            role,
            serving.system_fingerprint,
            include_usage,
        )
        return Draft(chunks, self._tap.take(), partial(in_words, serving))

    def _draft_completion(
        self,
        serving: Any,
        request: Any,
        _inputs: object,
        _generator: object,
        request_id: str,
        created: int,
        model: str,
        *_: object,
        **__: object,
    ) -> Draft:
        include_usage, _continuous = should_include_usage(request.stream_options, False)
        chunks = completion_chunks(
            request_id, created, model, serving.system_fingerprint, include_usage
        )
        return Draft(chunks, self._tap.take(), partial(in_words, serving))


def in_words(serving: Any, exc: Exception) -> str:
    """An error after the status has gone, as vLLM's serving object says it."""
    if isinstance(exc, GenerationError):
        return str(serving._convert_generation_error_to_streaming_response(exc))
    return str(serving.create_streaming_error_response(exc))
