"""Shell. Log probabilities are made in threads where a request asks for many of them.

vLLM 0.32 makes an object for each log probability: of an answer that is sent whole when it ends, of
a prompt when the engine has read it. It makes all of them in one turn of the event loop, 5 to 20 us
each. With `n: 64` and 20 of them per token, that is half a second in which every other stream
stands still. vLLM's own code runs here, on the same values, but beside the loop.

`install` and `render_beside_the_loop` name what they replace.
"""

from __future__ import annotations

import asyncio
import contextvars
import copy
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
)
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from contextvars import ContextVar
from functools import lru_cache, partial
from typing import Any

from vllm.entrypoints.openai.chat_completion import api_router as chat_router
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionLogProbs
from vllm.entrypoints.openai.completion import api_router as completion_router
from vllm.entrypoints.openai.responses import api_router as responses_router
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import logprobs as vllm_logprobs
from vllm.v1.engine.logprobs import LogprobsProcessor

from shared.runtime import garbage
from worker.engine.vllm.app.json_pieces import encode, encode_list, give_up
from worker.engine.vllm.app.written_answers import Written, WrittenResponse

FEW = 1000
"""So many log probabilities take at most 20 ms, and are made on the loop."""
KEPT_TOKENS = 65_536
"""Texts of single tokens that are kept, about 16 MiB."""
POSITIONS = 100
"""Of an answer, whose log probabilities are in memory as models at once."""
MOST_STREAMED = 20_000
"""Of a prompt that is echoed in the first event of a stream, which vLLM writes on the loop."""

BESIDE: ContextVar[bool] = ContextVar("beside_the_loop", default=False)
"""Whether what runs is in a thread of ours, and ends as bytes."""
_threads = ThreadPoolExecutor(2, thread_name_prefix="logprobs")


async def _in_thread(work: Callable[[], Any]) -> Any:
    garbage.keep_large_value()
    context = contextvars.copy_context()

    def run() -> Any:
        BESIDE.set(True)
        return work()

    return await asyncio.get_running_loop().run_in_executor(_threads, context.run, run)


# ---- of a prompt ---------------------------------------------------------------------------------


class UnmadePromptLogprobs:
    """Takes the place of a prompt's log probabilities until `make` has made them."""

    def __init__(self, processor: LogprobsProcessor, make: Callable[..., None]) -> None:
        self._processor, self._make = copy.copy(processor), make
        self._unmade: list[Any] = []

    def add(self, tensors: Any) -> None:
        self._unmade.append(tensors)

    def make(self) -> Any:
        for tensors in self._unmade:
            self._make(self._processor, tensors)
        self._unmade.clear()
        return self._processor.prompt_logprobs


def install() -> None:
    """Replaces the method of vLLM's output processor that makes a prompt's log probabilities.
    Called once per process. `with_prompt_logprobs` makes them then.
    """
    make = LogprobsProcessor._update_prompt_logprobs
    if getattr(make, "loraplex", False):
        return
    vllm_logprobs.convert_ids_list_to_tokens = token_texts(vllm_logprobs.convert_ids_list_to_tokens)

    def update(self: LogprobsProcessor, tensors: Any) -> None:
        unmade = self.prompt_logprobs
        if not isinstance(unmade, UnmadePromptLogprobs):
            if tensors.logprobs.numel() <= FEW:
                make(self, tensors)
                return
            unmade = self.prompt_logprobs = UnmadePromptLogprobs(self, make)
        unmade.add(tensors)

    update.loraplex = True  # type: ignore[attr-defined]
    LogprobsProcessor._update_prompt_logprobs = update


def token_texts(decode: Callable[[Any, list[int]], list[str]]) -> Callable[..., list[str]]:
    """`decode` makes the text of each token alone. It takes 10 us for each, and every step of 64
    choices with 20 log probabilities has 1,344 of them, mostly the same.
    """

    kept: dict[int, Callable[[int], str]] = {}

    def texts(tokenizer: Any, tokens: list[int]) -> list[str]:
        text = kept.get(id(tokenizer))
        if text is None:  # it is kept in the closure, so no other tokenizer gets its id
            text = lru_cache(KEPT_TOKENS)(lambda token: decode(tokenizer, [token])[0])
            kept[id(tokenizer)] = text
        return list(map(text, tokens))

    return texts


async def with_prompt_logprobs(outputs: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
    """The outputs of one request, with their prompt's log probabilities made."""
    async with aclosing(outputs) as unmade:
        async for output in unmade:
            if isinstance(output.prompt_logprobs, UnmadePromptLogprobs):
                output.prompt_logprobs = await _in_thread(output.prompt_logprobs.make)
            yield output


def check_streamed(params: SamplingParams, prompt: Any) -> None:
    """Raises VLLMValidationError if a stream would begin with too many log probabilities."""
    if params.output_kind is RequestOutputKind.DELTA:
        ids = prompt.get("prompt_token_ids", ()) if isinstance(prompt, dict) else ()
        count = len(ids) * (params.prompt_logprobs + 1)
        if count > MOST_STREAMED:
            raise VLLMValidationError(
                f"The echo of this prompt has {count} log probabilities, and at most "
                f"{MOST_STREAMED} are streamed. Leave out `stream`, or ask for fewer `logprobs`.",
                parameter="logprobs",
                value=params.prompt_logprobs,
            )


def flat(params: SamplingParams) -> SamplingParams:
    """The parameters with which an answer that is sent whole keeps its log probabilities without an
    object for each.
    """
    whole = params.output_kind is RequestOutputKind.FINAL_ONLY
    if params.logprobs is None or params.prompt_logprobs is not None or not whole:
        return params
    flattened = copy.copy(params)
    flattened.flat_logprobs = True
    return flattened


# ---- of an answer that is sent whole -------------------------------------------------------------


def render_beside_the_loop(state: Any) -> None:
    """Changes the serving objects of one app, so that they make large answers in threads."""
    for router in (chat_router, completion_router, responses_router):
        router.JSONResponse = WrittenResponse
    chat = getattr(state, "openai_serving_chat", None)
    if chat is not None:
        chat.chat_completion_full_generator = partial(_chat, chat.chat_completion_full_generator)
        chat._create_chat_logprobs = partial(_chat_logprobs, chat._create_chat_logprobs)
    completion = getattr(state, "openai_serving_completion", None)
    if completion is not None:
        completion.request_output_to_completion_response = partial(
            _completion, completion.request_output_to_completion_response
        )
        completion.create_completion = partial(_finished, completion.create_completion)
    responses = getattr(state, "openai_serving_responses", None)
    if responses is not None:
        _responses(responses)


async def _chat(
    make: Callable[..., Coroutine[Any, Any, Any]],
    request: Any,
    outputs: AsyncIterator[Any],
    *more: Any,
    **named: Any,
) -> Any:
    """vLLM's function waits for the last output, and goes on without another wait."""
    last: list[Any] = []
    async for output in outputs:
        last = [output]
    rendering = make(request, _each(last), *more, **named)
    if _count(last) <= FEW:
        return await rendering
    return await _in_thread(lambda: _as_bytes(_run(rendering), last))


def _chat_logprobs(
    make: Callable[..., Any], token_ids: Any, top_logprobs: Any, *more: Any, **named: Any
) -> Any:
    """vLLM makes a model for each log probability, 1 kB of memory. Beside the loop they are made
    and written position by position.
    """
    if not BESIDE.get():
        return make(token_ids, top_logprobs, *more, **named)

    def slices() -> Iterator[Any]:
        for at in range(0, len(token_ids), POSITIONS):
            some = slice(at, at + POSITIONS)
            yield make(token_ids[some], top_logprobs[some], *more, **named).content

    return ChatCompletionLogProbs.model_construct(content=encode_list(slices()))


def _completion(make: Callable[..., Any], outputs: list[Any], *more: Any, **named: Any) -> Any:
    rendering = partial(make, outputs, *more, **named)
    if _count(outputs) <= FEW:
        return rendering()
    return _Unfinished(lambda: _as_bytes(rendering(), outputs))


class _Unfinished:
    """Takes the place of a completion that is still to be made."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make


async def _finished(create: Callable[..., Any], *given: Any, **named: Any) -> Any:
    made = await create(*given, **named)
    return await _in_thread(made.make) if isinstance(made, _Unfinished) else made


async def _each(items: Iterable[Any]) -> AsyncIterator[Any]:
    for item in items:
        yield item


def _run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine that waits for nothing."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    coroutine.close()
    raise RuntimeError("vLLM waits while it makes an answer, which it does not do in 0.32.")


def _count(outputs: Iterable[Any]) -> int:
    """How many log probabilities the answer has. Each of its choices repeats those of the
    prompt.
    """
    count = 0
    for output in outputs:
        prompt = output.prompt_logprobs
        for choice in output.outputs:
            for some in (choice.logprobs, prompt):
                if some:
                    count += len(some) * len(some[-1] or ())
    return count


def _as_bytes(answer: Any, outputs: Iterable[Any]) -> Any:
    """The answer as its router takes it, written already. What it was made from is given up here,
    because that takes long, too.
    """
    choices = getattr(answer, "choices", None)
    if choices is None:
        return answer  # an error
    body = encode(answer)
    object.__setattr__(answer, "model_dump", lambda: Written(body))
    choices.clear()
    for output in outputs:
        prompt, output.prompt_logprobs = output.prompt_logprobs, None
        for choice in output.outputs:
            choice.logprobs = None
        if isinstance(prompt, list):
            give_up(prompt)
    return answer


# ---- of /v1/responses ----------------------------------------------------------------------------

_MADE: ContextVar[tuple[Any, Any]] = ContextVar("made_logprobs", default=(None, None))
"""(the log probabilities of an answer, what vLLM makes of them)."""


def _responses(serving: Any) -> None:
    calls = _ResponseLogprobs(serving)
    serving.responses_full_generator = calls.generate
    serving._create_response_logprobs = calls.find
    serving.create_responses = calls.create


class _ResponseLogprobs:
    """vLLM makes the log probabilities in the middle of the answer. Here they are made before, and
    found there. The methods take the places of those of the serving object.
    """

    def __init__(self, serving: Any) -> None:
        self._generate, self._make = (
            serving.responses_full_generator,
            serving._create_response_logprobs,
        )
        self._create = serving.create_responses

    async def generate(
        self,
        request: Any,
        sampling_params: Any,
        result_generator: Any,
        context: Any,
        model_name: str,
        tokenizer: Any,
        *more: Any,
        **named: Any,
    ) -> Any:
        outputs = result_generator
        if request.is_include_output_logprobs():
            outputs = self._with_logprobs(outputs, context, tokenizer, request.top_logprobs)
        return await self._generate(
            request, sampling_params, outputs, context, model_name, tokenizer, *more, **named
        )

    async def _with_logprobs(
        self, outputs: Any, context: Any, tokenizer: Any, top: int | None
    ) -> Any:
        async for output in outputs:
            yield output
        final = getattr(context, "final_output", None)
        if final is not None and _count([final]) > FEW:
            one = final.outputs[0]
            made = await _in_thread(lambda: self._make(one.token_ids, one.logprobs, tokenizer, top))
            _MADE.set((one.logprobs, made))

    def find(self, token_ids: Any, logprobs: Any, tokenizer: Any, top_logprobs: Any = None) -> Any:
        of, made = _MADE.get()
        if logprobs is not None and of is logprobs:
            return made
        return self._make(token_ids, logprobs, tokenizer, top_logprobs)

    async def create(self, request: Any, *more: Any, **named: Any) -> Any:
        answer = await self._create(request, *more, **named)
        if _MADE.get()[0] is not None and hasattr(answer, "output"):
            body = await _in_thread(lambda: encode(answer, mode="json", by_alias=True))
            object.__setattr__(answer, "model_dump", lambda **_: Written(body))
        return answer
