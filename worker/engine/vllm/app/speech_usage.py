"""Shell. Counts the tokens of a transcription that is answered whole. vLLM counts those of streams
alone. Without it such a request would cost its key nothing.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

from vllm.entrypoints.speech_to_text.base import serving as speech


class SpeechUsage:
    """What one request has used so far."""

    def __init__(self) -> None:
        self.audio_tokens = self.prompt_tokens = self.output_tokens = 0

    def take(self, output: Any) -> None:
        """The last output of one part of the sound."""
        self.prompt_tokens += len(output.prompt_token_ids or ())
        self.output_tokens += sum(len(one.token_ids) for one in output.outputs)


USAGE: ContextVar[SpeechUsage | None] = ContextVar("speech_usage", default=None)


def install() -> None:
    """Called once per process, before vLLM makes its serving objects."""
    serving, merge = speech.SpeechToTextBaseServing, speech.merge_async_iterators
    create, preprocess = serving._create_speech_to_text, serving._preprocess_speech_to_text
    if getattr(create, "loraplex", False):
        return

    async def merged(*iterators: AsyncGenerator[Any, None]) -> AsyncIterator[tuple[int, Any]]:
        """vLLM merges only what it answers whole."""
        usage = USAGE.get()
        async with aclosing(merge(*iterators)) as outputs:
            async for part, output in outputs:
                if usage is not None and output.finished:
                    usage.take(output)
                yield part, output

    async def _preprocess_speech_to_text(self: Any, *args: Any, **named: Any) -> Any:
        found = await preprocess(self, *args, **named)
        usage, duration_s = USAGE.get(), found[1]
        if usage is not None:
            count = self.model_cls.get_num_audio_tokens
            usage.audio_tokens = count(duration_s, self.asr_config, self.model_config) or 0
        return found

    async def _create_speech_to_text(self: Any, *args: Any, **named: Any) -> Any:
        usage = SpeechUsage()
        USAGE.set(usage)
        answer = await create(self, *args, **named)
        if usage.prompt_tokens:
            named["raw_request"].state.request_metadata.final_usage_info = SimpleNamespace(
                prompt_tokens=usage.prompt_tokens + usage.audio_tokens,
                completion_tokens=usage.output_tokens,
            )
        return answer

    _create_speech_to_text.loraplex = True  # type: ignore[attr-defined]
    speech.merge_async_iterators = merged
    serving._preprocess_speech_to_text = _preprocess_speech_to_text
    serving._create_speech_to_text = _create_speech_to_text
