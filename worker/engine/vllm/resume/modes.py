"""Pure. In which of two ways an answer goes on on another worker. The sampling parameters decide.

CONTINUE: the prompt and the tokens so far become the new prompt. That is exact if the next token
depends on nothing but the text so far. The parameters in OF_THE_TEXT_ALONE keep it so.

REGENERATE: the answer is made once more from the start, and what the client has seen is not sent.
That is exact for greedy and for seeded sampling. An answer of this kind that is sampled without a
seed gets one of ours (`seed_of`) at its first attempt. Making the tokens again takes time.
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
        # counts prompt and output alike, so it does not matter which of them a token is in
        "repetition_penalty",
        "logit_bias",
        "allowed_token_ids",
        # the grammar is told the tokens so far, see engine_core.py
        "structured_outputs",
        # bounds, which are lowered by the number of tokens so far
        "max_tokens",
        "min_tokens",
        # the end, which depends on the last token or the text
        "stop",
        "stop_token_ids",
        "ignore_eos",
        "include_stop_str_in_output",
        "_eos_token_id",
        "_all_stop_token_ids",
        # how the answer is written and sent
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
"""Fields of vLLM's SamplingParams with which an answer can be continued.

Other fields prevent it. Some treat the earlier tokens as output (the other penalties, bad words,
thinking budgets, repetition detection). `logprobs` reports on them, and `seed` needs the state of a
generator. A field of a later version is unknown, so it leads to REGENERATE.
"""


def mode_of(changed: Set[str], prompts: int, reasons: bool) -> ResumeMode:
    """`changed` are the fields that differ from their defaults, and `prompts` is the number of
    prompts. `reasons`: the engine has a reasoning parser, so a grammar begins only after the
    reasoning.
    """
    if prompts > 1 or not changed <= OF_THE_TEXT_ALONE:
        return ResumeMode.REGENERATE
    if reasons and "structured_outputs" in changed:
        return ResumeMode.REGENERATE
    return ResumeMode.CONTINUE


def seed_of(request_id: str) -> int:
    """A seed that is the same at every attempt of a request."""
    return zlib.crc32(request_id.encode())
