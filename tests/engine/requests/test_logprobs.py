"""Shell. Many log probabilities are the same as few, and requests that ask for them harm nobody:
vLLM alone would hold the worker's loop, or end its engine.
"""

from __future__ import annotations

import asyncio
from typing import Any

from tests.harness import Cluster, chat_body

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TOP = 20
GREEDY = {"temperature": 1, "top_k": 1}
CLOSE = 0.05
LONG = 900
"""Tokens of a prompt. A dozen of them at once do not fit into one step."""


async def answered(c: Cluster, path: str, **body: Any) -> Any:
    status, answer, _ = await c.post(path, body)
    assert status == 200, answer
    return answer


def ids(first: int, count: int) -> list[int]:
    return [10 + (first * 37 + n) % 1000 for n in range(count)]


async def test_log_probabilities_of_many_choices_are_those_of_one(demo: Cluster) -> None:
    fields = {**GREEDY, "max_tokens": 30, "logprobs": True, "ignore_eos": True}
    one = await answered(demo, CHAT, **chat_body("demo", top_logprobs=TOP, **fields))
    many = await answered(demo, CHAT, **chat_body("demo", top_logprobs=TOP, n=8, **fields))
    assert len(one["choices"][0]["logprobs"]["content"]) == 30
    assert [choice["index"] for choice in many["choices"]] == [*range(8)]
    expected = one["choices"][0]["logprobs"]["content"]
    for choice in many["choices"]:
        for token, other in zip(choice["logprobs"]["content"], expected, strict=True):
            assert token["token"] == other["token"] and token["bytes"] == other["bytes"]
            assert abs(token["logprob"] - other["logprob"]) < CLOSE
            assert len(token["top_logprobs"]) == len(other["top_logprobs"]) == TOP
    assert many["usage"]["completion_tokens"] == 8 * 30


async def test_log_probabilities_of_completions_and_responses_are_complete(demo: Cluster) -> None:
    fields = {"model": "demo", "prompt": "Once", "logprobs": TOP, **GREEDY}
    fields |= {"max_tokens": 30, "ignore_eos": True}
    one = await answered(demo, COMPLETIONS, **fields)
    many = await answered(demo, COMPLETIONS, n=4, **fields)
    expected = one["choices"][0]["logprobs"]
    for choice in many["choices"]:
        assert choice["logprobs"]["tokens"] == expected["tokens"]
        assert choice["logprobs"]["text_offset"] == expected["text_offset"]
        assert min(len(top) for top in choice["logprobs"]["top_logprobs"]) > TOP / 2
    said = await answered(
        demo,
        "/v1/responses",
        model="demo",
        input="hello",
        temperature=0,
        max_output_tokens=60,
        include=["message.output_text.logprobs"],
        top_logprobs=TOP,
    )
    part = said["output"][0]["content"][0]
    tokens = [token["token"] for token in part["logprobs"]]
    assert "".join(tokens).startswith(part["text"])


async def test_prompts_are_scored_alike_alone_and_beside_others(demo: Cluster) -> None:
    models = ("demo", "demo:pirate", "demo:haiku")

    async def scores(model: str, top: int) -> Any:
        body = {"model": model, "prompt": ids(3, 100), "max_tokens": 1, "temperature": 0}
        answer = await answered(demo, COMPLETIONS, echo=True, logprobs=top, **body)
        return [round(p, 2) for p in answer["choices"][0]["logprobs"]["token_logprobs"][1:100]]

    alone = [await scores(model, 1) for model in models]
    assert len({str(one) for one in alone}) == len(models)
    together = await asyncio.gather(*(scores(model, TOP) for model in models * 4))
    for n, found in enumerate(together):
        off = [a for a, b in zip(found, alone[n % len(models)], strict=True) if abs(a - b) > CLOSE]
        assert off == []


async def test_seeded_requests_with_long_prompts_are_answered_alike_together(
    demo: Cluster,
) -> None:
    async def text(n: int) -> str:
        body = {"model": "demo", "prompt": ids(n, LONG), "max_tokens": 8, "seed": n}
        return str((await answered(demo, COMPLETIONS, **body))["choices"][0]["text"])

    together = await asyncio.gather(*(text(n) for n in range(12)))
    assert [await text(n) for n in range(12)] == together


async def test_an_echo_that_would_hold_a_stream_is_refused(demo: Cluster) -> None:
    body = {"model": "demo", "prompt": ids(1, 1000), "max_tokens": 1, "echo": True}
    status, answer, _ = await demo.post(COMPLETIONS, body | {"logprobs": TOP, "stream": True})
    assert status == 400 and "Leave out `stream`" in answer["error"]["message"]
    status, answer, _ = await demo.post(COMPLETIONS, body | {"logprobs": 1, "stream": True})
    assert status == 200 and "[DONE]" in answer


async def test_large_answers_at_once_are_whole_and_no_worker_is_lost(demo: Cluster) -> None:
    assert demo.gateway is not None
    lost = demo.gateway.output().count('"worker lost"')
    body = {"model": "demo", "prompt": "a " * 150_000}
    answers = await asyncio.gather(*(answered(demo, "/tokenize", **body) for _ in range(8)))
    for answer in answers:
        assert answer["count"] == len(answer["tokens"]) > 150_000
    assert demo.gateway.output().count('"worker lost"') == lost
