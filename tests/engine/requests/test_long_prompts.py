"""Many choices of a long prompt begin as fast as those of a short one, and read as they would."""

from __future__ import annotations

import time
from typing import Any

import tokenizers
from transformers import AutoTokenizer
from vllm import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.detokenizer import IncrementalDetokenizer

from tests.harness import DEMO
from worker.engine.vllm.resume import long_prompts
from worker.engine.vllm.resume.long_prompts import PRIMED_TOKENS

TIMES = 5
MOST_RATIO = 12
"""It is 90 where vLLM reads the whole prompt."""
TEXT = "Käse ist 好吃的 🧀, und <|endoftext|> Brot auch.\n\n"


def begun(tokenizer: Any, prompt: list[int]) -> IncrementalDetokenizer:
    request = EngineCoreRequest("r", prompt, None, SamplingParams(), None, 0.0, None, None, None)
    return IncrementalDetokenizer.from_new_request(tokenizer, request)


def spent_s(tokenizer: Any, prompt: list[int]) -> float:
    """CPU time until the first token is text, the least of some."""
    found = []
    for _ in range(TIMES):
        began = time.thread_time()
        begun(tokenizer, prompt).update([7], False)
        found.append(time.thread_time() - began)
    return min(found)


def test_a_choice_of_a_long_prompt_begins_as_fast_as_one_of_a_short_one() -> None:
    long_prompts.install()
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    short, long = [spent_s(tokenizer, [5] * tokens) for tokens in (PRIMED_TOKENS, 100_000)]
    assert long < MOST_RATIO * short


def test_text_behind_a_long_prompt_is_what_it_is_behind_the_whole_of_it() -> None:
    long_prompts.install()
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    ids = tokenizer.encode(TEXT * 200)
    assert len(ids) > 2 * PRIMED_TOKENS
    every = tokenizer.encode(TEXT)
    for cut in range(len(ids) - 2 * len(every), len(ids) - len(every)):
        prompt, answer = ids[:cut], ids[cut : cut + len(every)]
        whole = tokenizers.decoders.DecodeStream(ids=prompt, skip_special_tokens=True)
        steps = [whole.step(tokenizer._tokenizer, token) or "" for token in answer]
        choice = begun(tokenizer, prompt)
        for token in answer:
            choice.update([token], False)
        if not tokenizer.decode(prompt).endswith("\N{REPLACEMENT CHARACTER}"):
            assert choice.output_text == "".join(steps)
