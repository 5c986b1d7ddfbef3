"""Shell. vLLM's front end, extended so that an answer can move from one worker to another. Tokens
come beside the bytes, and an answer goes on where it stopped on another worker.

Everything depends on one context variable, PROGRESS. For a request without it, vLLM's own code
runs. vLLM 0.32 has no public interface for any of this; `install` names what is replaced.
"""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

from vllm.entrypoints.openai.chat_completion import serving as chat_serving
from vllm.entrypoints.openai.completion import serving as completion_serving
from vllm.entrypoints.openai.responses import (
    context,
    harmony,
    protocol,
    serving,
    streaming_events,
    utils,
)
from vllm.entrypoints.speech_to_text.base import serving as speech_serving
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.renderers import chat_utils
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.utils import random_uuid
from vllm.v1.engine import async_llm
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.detokenizer import IncrementalDetokenizer
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import RequestOutputCollector

from shared.errors import EngineFailure
from shared.link.token_ids import pack
from worker.engine.vllm import logprobs
from worker.engine.vllm.grammars.errors import unless_too_costly
from worker.engine.vllm.resume import long_prompts
from worker.engine.vllm.resume.answer_ids import ids_of_answer
from worker.engine.vllm.resume.answer_progress import Progress
from worker.engine.vllm.resume.engine_core import SEEN_TOKENS
from worker.engine.vllm.resume.modes import ResumeMode, mode_of, seed_of

PROGRESS: ContextVar[Progress | None] = ContextVar("progress", default=None)
CREATED: ContextVar[int] = ContextVar("created", default=0)
_DEFAULTS = SamplingParams()


class _Clock:
    """Takes the place of the module `time` in vLLM's serving layer, which asks it when an answer
    was created. The time is the same at every attempt.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    @staticmethod
    def time() -> float:
        return CREATED.get() or time.time()


class OrderedCollector(RequestOutputCollector):  # type: ignore[misc]
    """Keeps the outputs of a stream apart if each must be rendered by itself. vLLM's own collector
    merges those that its reader has not taken yet. There are never more of them than tokens.
    """

    def __init__(self, output_kind: RequestOutputKind, request_id: str) -> None:
        super().__init__(output_kind, request_id)
        progress = PROGRESS.get()
        self._apart = self.aggregate and progress is not None and progress.one_by_one
        self._later: deque[Any] = deque()

    def put(self, output: Any) -> None:
        if self._apart and self.output is not None and not isinstance(output, Exception):
            self._later.append(output)
        else:
            super().put(output)

    async def get(self) -> Any:
        output = await super().get()
        self._refill()
        return output

    def get_nowait(self) -> Any:
        output = super().get_nowait()
        self._refill()
        return output

    def _refill(self) -> None:
        if self._later:
            super().put(self._later.popleft())


def install() -> None:
    """Replaces parts of vLLM's front end. Called once per process, before the serving layer is
    made.
    """
    async_llm.RequestOutputCollector = OrderedCollector
    clock = _Clock()
    for module in (chat_serving, completion_serving, serving, speech_serving, protocol):
        module.time = clock
    for module in (context, harmony, protocol, serving, streaming_events, utils, chat_utils):
        module.random_uuid = ids_of_answer(random_uuid)
    merge = completion_serving.merge_async_iterators
    if getattr(merge, "loraplex", False):
        return

    async def merge_async_iterators(*iterators: Any) -> AsyncIterator[tuple[int, RequestOutput]]:
        """Takes note of outputs in the order in which they are rendered: the merging pulls ahead
        of that.
        """
        progress = PROGRESS.get() if len(iterators) > 1 else None
        async with aclosing(merge(*iterators)) as merged:
            async for prompt, output in merged:
                if progress is not None:
                    progress.take(prompt, output.outputs)
                yield prompt, output
        if progress is not None:
            progress.rendered()

    merge_async_iterators.loraplex = True  # type: ignore[attr-defined]
    completion_serving.merge_async_iterators = merge_async_iterators


class ResumableLLM(AsyncLLM):  # type: ignore[misc]
    """An AsyncLLM whose `generate` goes on from what the client has seen, and notes what
    it makes.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.vllm_config
        self._reasons = bool(config.structured_outputs_config.reasoning_parser)
        add = self.output_processor.add_request

        def add_request(request: Any, *more: Any, **named: Any) -> None:
            add(request, *more, **named)
            progress = PROGRESS.get()
            if progress is not None:
                _prime(progress, self.output_processor.request_states[request.request_id])

        self.output_processor.add_request = add_request
        long_prompts.take_turns(self)

    def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **more: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        if sampling_params.structured_outputs is None:
            return self._scored(prompt, sampling_params, request_id, more)
        return unless_too_costly(self._scored(prompt, sampling_params, request_id, more))

    def _scored(
        self, prompt: Any, params: SamplingParams, request_id: str, more: dict[str, Any]
    ) -> AsyncGenerator[RequestOutput, None]:
        """The outputs, with the log probabilities of the prompt if they are asked for."""
        if params.prompt_logprobs is None:
            return self._generate(prompt, logprobs.flat(params), request_id, more)
        logprobs.check_streamed(params, prompt)
        return logprobs.with_prompt_logprobs(self._generate(prompt, params, request_id, more))

    def _generate(
        self, prompt: Any, params: SamplingParams, request_id: str, more: dict[str, Any]
    ) -> AsyncGenerator[RequestOutput, None]:
        progress = PROGRESS.get()
        if progress is None:
            passed: AsyncGenerator[RequestOutput, None] = super().generate(
                prompt, params, request_id, **more
            )
            return passed
        number = progress.enter_prompt()
        return self._noted(progress, number, prompt, params, request_id, more)

    def mode(self, params: SamplingParams, prompt: Any, prompts: int = 1) -> ResumeMode:
        """How such an answer would go on on another worker."""
        if not isinstance(prompt, dict) or prompt.get("type") != "token":
            return ResumeMode.REGENERATE
        return mode_of(_changed(params), prompts, self._reasons)

    async def _noted(
        self,
        progress: Progress,
        number: int,
        prompt: Any,
        params: SamplingParams,
        request_id: str,
        more: dict[str, Any],
    ) -> AsyncGenerator[RequestOutput, None]:
        progress.choices = params.n
        streams = params.output_kind is RequestOutputKind.DELTA
        mode = self.mode(params, prompt, progress.prompts)
        if mode is ResumeMode.REGENERATE:
            params = repeatable(params, request_id)
            generated = super().generate(prompt, params, request_id, **more)
        elif progress.seen:
            generated = self._continued(progress, prompt, params, request_id, more)
        else:
            progress.primed = _FROM_THE_START
            generated = super().generate(prompt, params, request_id, **more)
        noted = streams and (progress.prompts == 1 or progress.in_turn)
        try:
            async with aclosing(generated) as outputs:
                async for output in outputs:
                    if noted:
                        progress.take(number, output.outputs)
                    yield output
            if noted and number == progress.prompts - 1:
                progress.rendered()
        except EngineDeadError:
            progress.fail(EngineFailure("the engine died"))
            raise

    async def _continued(
        self,
        progress: Progress,
        prompt: Any,
        params: SamplingParams,
        request_id: str,
        more: dict[str, Any],
    ) -> AsyncGenerator[RequestOutput, None]:
        """The outputs as they were, one per token, and then those of the engine. The engine gets
        the earlier tokens as a part of the prompt.
        """
        tokenizer = self.output_processor.tokenizer
        past = EarlierOutput(tokenizer, params, request_id, prompt, progress.seen[0])
        for output in past.outputs():
            yield output
        ended = past.ended
        if ended is not None:
            yield ended
            return
        progress.primed = past
        whole, rest = past.rest()
        async with aclosing(super().generate(whole, rest, request_id, **more)) as outputs:
            async for output in outputs:
                yield output


class EarlierOutput:
    """The part of an answer that was made elsewhere. Call `outputs` first.

    Its detokenizer becomes the engine's own. So half a character, or the beginning of a stop string
    that was held back, goes on as well.
    """

    def __init__(
        self, tokenizer: Any, params: SamplingParams, request_id: str, prompt: Any, seen: list[int]
    ) -> None:
        self._params, self._request_id, self._prompt = params, request_id, prompt
        self.seen = seen
        self.prompt_token_ids = list(prompt["prompt_token_ids"])
        self._delta = params.output_kind is RequestOutputKind.DELTA
        self._stop: str | None = None
        self.detokenizer = IncrementalDetokenizer.from_new_request(
            tokenizer if params.detokenize else None,
            SimpleNamespace(
                request_id=request_id,
                prompt_token_ids=self.prompt_token_ids,
                prompt_embeds=None,
                sampling_params=params,
            ),
        )

    def outputs(self) -> list[RequestOutput]:
        """The outputs as they were. Empty for an answer that is sent whole, which needs none of
        them.
        """
        made = []
        for token in self.seen:
            self._stop = self.detokenizer.update([token], False)
            if self._delta:
                text = self.detokenizer.get_next_output_text(False, True)
                made.append(self._output(text, [token], None))
        return made

    def rest(self) -> tuple[Any, SamplingParams]:
        """The prompt and the parameters with which the engine goes on."""
        params, made = self._params, len(self.seen)
        rest = copy.copy(params)  # its clone() may return the same object
        rest.max_tokens = params.max_tokens - made
        rest.min_tokens = max(0, params.min_tokens - made)
        if rest.structured_outputs is not None:
            rest.extra_args = {SEEN_TOKENS: list(self.seen)}
        ids = [*self.prompt_token_ids, *self.seen]
        return {**self._prompt, "prompt_token_ids": ids}, rest

    @property
    def ended(self) -> RequestOutput | None:
        """The end of an answer whose tokens had all been made. None if the engine has to
        make more.
        """
        if self._stop is None and len(self.seen) < self._params.max_tokens:
            return None
        text = self.detokenizer.get_next_output_text(True, self._delta)
        tokens = [] if self._delta else list(self.seen)
        return self._output(text, tokens, "length" if self._stop is None else "stop")

    def _output(self, text: str, ids: list[int], finish_reason: str | None) -> RequestOutput:
        one = CompletionOutput(
            index=0,
            text=text,
            token_ids=ids,
            cumulative_logprob=None,
            logprobs=None,
            finish_reason=finish_reason,
            stop_reason=self._stop,
        )
        return RequestOutput(
            request_id=self._request_id,
            prompt=self._prompt.get("prompt"),
            prompt_token_ids=self.prompt_token_ids,
            prompt_logprobs=None,
            outputs=[one],
            finished=finish_reason is not None,
            num_cached_tokens=0,
        )


_FROM_THE_START = object()


def _prime(progress: Progress, state: Any) -> None:
    """Called when the engine's front end has just made its state of the request."""
    past, progress.primed = progress.primed, None
    if past is None:
        return
    if past is not _FROM_THE_START:
        carry_on(state, past)
    if state.output_kind is RequestOutputKind.FINAL_ONLY:
        _tell_tokens(progress, state)


def carry_on(state: Any, past: EarlierOutput) -> None:
    """Makes `state`, of the engine's front end, go on where the answer stopped."""
    state.detokenizer, state.sent_tokens_offset = past.detokenizer, len(past.seen)
    state.prompt_token_ids = past.prompt_token_ids
    state.prompt_len = len(past.prompt_token_ids)


def _tell_tokens(progress: Progress, state: Any) -> None:
    """Reports the tokens of an answer that is sent whole, step by step. Those of its last step come
    with the answer itself.
    """
    make = state.make_request_output

    # vLLM passes these by position when an answer goes on, and by name when it is aborted.
    def make_request_output(
        new_token_ids: list[int], pooling_output: Any, finish_reason: Any, *more: Any, **named: Any
    ) -> Any:
        if finish_reason is None and new_token_ids:
            progress.tell(pack(new_token_ids))
        return make(new_token_ids, pooling_output, finish_reason, *more, **named)

    state.make_request_output = make_request_output


def repeatable(params: SamplingParams, request_id: str) -> SamplingParams:
    """The parameters with which another worker makes the same answer."""
    if params.seed is not None or params.temperature == 0:
        return params
    seeded = copy.copy(params)
    seeded.seed = seed_of(request_id)
    return seeded


def _changed(params: SamplingParams) -> set[str]:
    """The fields that differ from their defaults. The default of every array is None, and that of
    a dict, too.
    """
    return {
        field
        for field in params.__struct_fields__
        if (value := getattr(params, field)) is not (default := getattr(_DEFAULTS, field))
        and not (isinstance(value, dict) and not value)
        and (type(value) is not type(default) or value != default)
    }
