"""Pure. In which of two ways an answer goes on, read off its sampling parameters.

CONTINUE: the prompt and the tokens so far are the new prompt. That is exact where the next token
depends on the text so far and on nothing else, which is so for the parameters in OF_THE_TEXT_ALONE.

REGENERATE: the answer is made once more from the start, and what the client has seen is not sent.
That is exact for whatever is greedy or seeded, so an answer of this kind that is sampled without a
seed gets one of ours (`seed_of`), at its first attempt already. It costs the time to make the
tokens again.
"""

from __future__ import annotations

import zlib
from collections.abc import Set
from enum import Enum


class ResumeMode(Enum):
    CONTINUE = "continue"
    REGENERATE = "regenerate"


OF_THE_TEXT_ALONE = frozenset(
    {
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        # of prompt and output alike, so it does not matter which of them a token is part of
        "repetition_penalty",
        "logit_bias",
        "allowed_token_ids",
        # the grammar is told of the tokens so far, see engine_core.py
        "structured_outputs",
        # bounds, which are lowered by what has been made
        "max_tokens",
        "min_tokens",
        # when it ends, by its last token or its text
        "stop",
        "stop_token_ids",
        "ignore_eos",
        "include_stop_str_in_output",
        "_eos_token_id",
        "_all_stop_token_ids",
        # how it is written and handed on
        "detokenize",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "output_text_buffer_length",
        "output_kind",
        "stream_interval",
        "skip_clone",
        "skip_reading_prefix_cache",
    }
)
"""Fields of vLLM's SamplingParams. Those that are not here count what came before as output (the
other penalties, bad words, thinking budgets, repetition detection), tell of it (logprobs), need the
state of a generator (seed), or are unknown: a field of a later version is regenerated with.
"""


def mode_of(changed: Set[str], prompts: int, reasons: bool) -> ResumeMode:
    """`changed` are the fields that differ from their defaults; `reasons`: the engine has a
    reasoning parser, and a grammar begins only after the reasoning.
    """
    if prompts > 1 or not changed <= OF_THE_TEXT_ALONE:
        return ResumeMode.REGENERATE
    if reasons and "structured_outputs" in changed:
        return ResumeMode.REGENERATE
    return ResumeMode.CONTINUE


def seed_of(request_id: str) -> int:
    """The same at every attempt of a request."""
    return zlib.crc32(request_id.encode())
