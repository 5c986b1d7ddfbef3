"""Shell. Plain chat and completion streams without vLLM's HTTP layer. They are written where the
engine's output arrives, with one call per token.

vLLM's own way costs 54 to 90 us per token: a RequestOutput, a queue, a task switch, three pydantic
models, and Starlette. Here vLLM's serving object still validates the request, renders the template
and makes the sampling parameters. But EngineTap keeps it from starting a stream. For each token,
the engine's output processor calls PlainStream.advance, which puts the bytes into the reply.
A request that is not plain, or that fails before its first byte, is left to vLLM's own app. So its
errors stay vLLM's own.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import msgspec
from starlette.datastructures import Headers
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import (
    CompletionRequest,
    CompletionResponseStreamChoice,
)
from vllm.entrypoints.serve.utils.api_utils import should_include_usage
from vllm.exceptions import GenerationError
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.version import __version__ as vllm_version

from shared.link.token_ids import unpack
from shared.vllm_versions import is_tried
from worker.engine.base import EngineRequest, Reply
from worker.engine.vllm.plain_stream import Draft, PlainStream, Submission
from worker.engine.vllm.resume.answer_progress import Progress
from worker.engine.vllm.resume.modes import ResumeMode
from worker.engine.vllm.resume.resumable_llm import (
    CREATED,
    PROGRESS,
    EarlierOutput,
    ResumableLLM,
    repeatable,
)
from worker.engine.vllm.sse import (
    V0_32,
    V0_33,
    chat_chunks,
    completion_chunks,
    is_plain_chat,
    is_plain_completion,
)
from worker.engine.vllm.write_interval import WriteInterval

FIELDS = V0_33 if "weight_versions" in CompletionResponseStreamChoice.model_fields else V0_32
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
"""Arguments of `vllm serve` with which vLLM's app adds something to a stream. If one is set, every
request goes through that app.
"""


class EngineTap:
    """Takes the place of a serving object's engine. `generate` starts nothing. It only keeps what
    it was asked for.
    """

    def __init__(self, engine: AsyncLLM) -> None:
        self._engine = engine
        self._submission: Submission | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(self, prompt: Any, params: Any, request_id: str, **more: Any) -> Submission:
        self._submission = Submission(prompt, params, request_id, more)
        return self._submission

    def take(self) -> Submission:
        """What was asked for last. The serving object makes its stream in the same step, so it is
        the caller's own.
        """
        submission, self._submission = self._submission, None
        assert submission is not None
        return submission


@dataclass(frozen=True, slots=True)
class Route:
    """A path of the API: which requests are plain there, what parses them, and which function of
    vLLM's serving object makes them a stream.
    """

    is_plain: Callable[[Mapping[str, Any]], bool]
    parse: Callable[[Any], Any]
    create: Callable[[Any, Any], Awaitable[Any]]


class FastServing:
    """Serves the plain streams of one engine. It is made once vLLM's app is ready."""

    def __init__(self, engine: ResumableLLM, state: Any, args: Any, pacing: WriteInterval) -> None:
        self._engine, self._pacing = engine, pacing
        self._tap = EngineTap(engine)
        self._routes: dict[str, Route] = {}
        self._numbers = itertools.count(1)
        self._traces = bool(getattr(args, "otlp_traces_endpoint", None))
        self.served = 0
        if not is_tried(vllm_version) or any(getattr(args, name, None) for name in UNUSUAL_ARGS):
            return
        # figures of speculative decoding are a part of the usage event
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
        """Answers the call, or returns False if vLLM's app must do that. In that case nothing was
        sent or started.

        Raises:
            EngineFailure: the engine is dead.
        """
        if call.seen and call.on_seen is not None:
            return False  # it does not render once more what the client has
        draft = await self._draft(call)
        if draft is None:
            return False
        start = self._start_of(draft.submission, call.seen)
        if start is None:
            return False
        submission, past = start
        # Clients choose request ids, so two may be alike. vLLM aborts all requests of an id.
        submission = replace(
            submission, request_id=f"{submission.request_id}-{next(self._numbers)}"
        )
        engine = self._engine
        stream = PlainStream(draft, reply, self._pacing, past)
        try:
            # The engine's front end uses `primed` while it adds the request.
            PROGRESS.set(Progress(primed=past) if past is not None else None)
            queue = await engine.add_request(
                submission.request_id, submission.prompt, submission.params, **submission.more
            )
        except asyncio.CancelledError:
            await engine.abort(submission.request_id)
            raise
        except Exception:
            # What vLLM refuses here it refuses again in its app, in its own words.
            return False
        states = engine.output_processor.request_states
        # No await until catch_up has returned. What has come so far is in the queue; what comes
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

    def _start_of(
        self, submission: Submission, seen: bytes
    ) -> tuple[Submission, EarlierOutput | None] | None:
        """What the engine is asked for, and the part of the answer that was made elsewhere. None if
        vLLM's app must serve the request.
        """
        if self._engine.mode(submission.params, submission.prompt) is ResumeMode.REGENERATE:
            params = repeatable(submission.params, submission.request_id)
            return None if seen else (replace(submission, params=params), None)
        if not seen:
            return submission, None
        past = self._past(submission, seen)
        if past.ended is not None:
            return None
        prompt, params = past.rest()
        return replace(submission, prompt=prompt, params=params), past

    def _past(self, submission: Submission, seen: bytes) -> EarlierOutput:
        tokenizer, tokens = self._engine.output_processor.tokenizer, unpack(seen)[0]
        past = EarlierOutput(
            tokenizer, submission.params, submission.request_id, submission.prompt, tokens
        )
        past.outputs()
        return past

    async def _draft(self, call: EngineRequest) -> Draft | None:
        """What vLLM's serving object makes of a plain request. None for any other request, and for
        one that it refuses.
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
        headers = {"x-request-id": call.request_id}
        if self._traces and call.traceparent:
            headers["traceparent"] = call.traceparent
            if call.tracestate:
                headers["tracestate"] = call.tracestate
        raw = SimpleNamespace(headers=Headers(headers), state=SimpleNamespace())
        try:
            made = await route.create(route.parse(body), raw)
        except Exception:
            # Pydantic, the template and vLLM raise errors of many kinds. vLLM's app turns them into
            # an answer.
            return None
        return made if isinstance(made, Draft) else None

    def _tapped(self, serving: Any, generator: str, draft: Callable[..., Draft]) -> Any:
        """A copy of a serving object that makes drafts instead of streams. vLLM's own object is not
        changed.
        """
        tapped = copy.copy(serving)
        # methods that were replaced on vLLM's own object are bound to that one, and to its engine
        for name in [n for n in vars(tapped) if callable(getattr(type(serving), n, None))]:
            delattr(tapped, name)
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
            FIELDS,
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
            request_id, created, model, serving.system_fingerprint, include_usage, FIELDS
        )
        return Draft(chunks, self._tap.take(), partial(in_words, serving))


def in_words(serving: Any, exc: Exception) -> str:
    """An error after the status has left, as vLLM's serving object words it."""
    if isinstance(exc, GenerationError):
        return str(serving._convert_generation_error_to_streaming_response(exc))
    return str(serving.create_streaming_error_response(exc))
