"""Shell. Grammars that cost the engine more with every token, on real vLLM: their answers end, and
all others go on.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import statistics
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from shared.config.gateway import GatewayConfig
from shared.runtime.children import Zygote
from tests.harness import Cluster, chat_body, cluster, demo_config

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
AMBIGUOUS, COSTLY = 'root ::= root root | "a"', "(a{2,99}){90,99}"
"""A text of the second has 180 letters at least, so no model ends it before it costs too much."""
STRICT_S = 0.0003
"""A thirtieth of the default: inside of JSON the second costs a tenth of what it does alone."""
TOKENS = 900
HONEST_TOKENS = 300
BAD = "invalid_request"
TOKEN_CPU_S = GatewayConfig().grammar_cpu_s or 0.0
MOST_SLOWER = 1.5
"""For the other answers' own tokens, which share the step. Without the bound a token of the other
key waits for 20 to 60 ms.
"""
TRIES = 3
"""More than one where the machine was busy."""
KEYS = ("tenant-a-key-000000", "tenant-b-key-000000")
PARSING = {
    "enable_auto_tool_choice": True,
    "tool_call_parser": "hermes",
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
}


def schema_of(pattern: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"text": {"type": "string", "pattern": pattern}},
        "required": ["text"],
        "additionalProperties": False,
    }


def big_schema() -> dict[str, Any]:
    """Forty fields of every kind, of which some hold a list of objects with fields."""
    kinds: list[dict[str, Any]] = [
        {"type": "integer", "minimum": 0, "maximum": 1000},
        {"enum": ["red", "green", "blue"]},
        {"type": "string", "maxLength": 6},
        {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
        {"type": "string", "format": "date"},
    ]
    inner = dict(zip("abcde", kinds, strict=True))
    listed = {"type": "object", "properties": inner, "required": list(inner)}
    kinds.append({"type": "array", "items": listed, "minItems": 1, "maxItems": 1})
    fields = {f"f{n}": kinds[n % len(kinds)] for n in range(40)}
    return {
        "type": "object",
        "properties": fields,
        "required": list(fields),
        "additionalProperties": False,
    }


def as_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}


def tool() -> dict[str, Any]:
    function = {"name": "say", "strict": True, "parameters": schema_of(COSTLY)}
    return {
        "tools": [{"type": "function", "function": function}],
        "tool_choice": {"type": "function", "function": {"name": "say"}},
    }


TOLD = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": TOKENS}
REGEX = {"structured_outputs": {"regex": COSTLY}}
GRAMMAR = {"structured_outputs": {"grammar": AMBIGUOUS}, "min_tokens": TOKENS - 1}
SCHEMA_FORMAT = {"type": "json_schema", "schema": schema_of(COSTLY)}
RESPONSE = {
    "model": "demo",
    "input": "Hi",
    "max_output_tokens": TOKENS,
    "text": {"format": SCHEMA_FORMAT | {"name": "x"}},
}
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    (CHAT, TOLD | REGEX),
    (CHAT, TOLD | GRAMMAR),
    (CHAT, TOLD | REGEX | {"n": 3}),
    (CHAT, TOLD | {"structured_outputs": {"json": schema_of(COSTLY)}}),
    (CHAT, TOLD | {"response_format": as_format(schema_of(COSTLY))}),
    (CHAT, TOLD | tool()),
    (COMPLETIONS, {"model": "demo", "prompt": ["Hi", "Ho"], "max_tokens": TOKENS} | REGEX),
    (MESSAGES, TOLD | {"output_config": {"format": SCHEMA_FORMAT}}),
    (RESPONSES, RESPONSE),
]


def keyed(folder: Path, **gateway: Any) -> dict[str, Any]:
    """A config with the keys of two tenants."""
    keys = folder / "keys"
    keys.write_text("\n".join(KEYS))
    return demo_config(engine=PARSING, api_keys_file=str(keys), **gateway)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def usual(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    folder = tmp_path_factory.mktemp("usual")
    async with cluster(keyed(folder), folder, zygote) as c:
        await c.start_worker("w0")
        yield c


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def strict(
    zygote: Zygote, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Cluster]:
    folder = tmp_path_factory.mktemp("strict")
    async with cluster(keyed(folder, grammar_cpu_s=STRICT_S), folder, zygote) as c:
        await c.start_worker("w0")
        yield c


def headers(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def ask(c: Cluster, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
    async with c.http.post(c.url + path, json=body, headers=headers(KEYS[0])) as answer:
        return answer.status, await answer.read()


@pytest.mark.parametrize(("path", "body"), REQUESTS)
async def test_an_answer_ends_whose_grammar_costs_too_much(
    strict: Cluster, path: str, body: dict[str, Any]
) -> None:
    """With a 400 that says why. A client that has begun to read gets the same as an event."""
    status, said = await ask(strict, path, body)
    error = json.loads(said)["error"]
    assert (status, error["type"], error["code"]) == (400, "invalid_request_error", BAD), said
    assert "read in many ways" in error["message"]
    status, said = await ask(strict, path, body | {"stream": True})
    assert status == 200 and BAD.encode() in said and b"read in many ways" in said, said[-900:]
    assert b'"finish_reason":"' not in said and b"response.completed" not in said


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(("path", "body"), REQUESTS)
async def test_what_was_made_until_then_is_charged(
    strict: Cluster, path: str, body: dict[str, Any], streams: bool
) -> None:
    """Else a client gets the work on its prompt for nothing, as often as it likes."""
    before = [await strict.metric(f"loraplex_{kind}_tokens_total") for kind in ("prompt", "output")]
    await ask(strict, path, body | {"stream": streams})
    after = [await strict.metric(f"loraplex_{kind}_tokens_total") for kind in ("prompt", "output")]
    prompt, output = (b - a for a, b in zip(before, after, strict=True))
    assert prompt > 0 and 1 < output <= 3 * TOKENS


async def test_a_response_in_the_background_fails_whose_grammar_costs_too_much(
    strict: Cluster,
) -> None:
    body = RESPONSE | {"background": True, "stream": True}
    status, said = await ask(strict, RESPONSES, body)
    assert status == 200 and b"read in many ways" in said, said[-900:]
    made = json.loads(said.split(b"data: ")[1].partition(b"\n")[0])["response"]["id"]
    url = f"{strict.url}{RESPONSES}/{made}"
    async with strict.http.get(url, headers=headers(KEYS[0])) as answer:
        assert (await answer.json())["status"] == "failed"


async def test_a_large_schema_is_followed_to_its_end(usual: Cluster) -> None:
    body = chat_body("demo", "Hi", max_tokens=TOKENS, response_format=as_format(big_schema()))
    for _ in range(3):
        status, said = await ask(usual, CHAT, body)
        assert status == 200, said
        (choice,) = json.loads(said)["choices"]
        assert choice["finish_reason"] == "stop"
        assert len(json.loads(choice["message"]["content"])) == len(big_schema()["properties"])


async def token_s(c: Cluster, worker: str) -> float:
    """Seconds for each token of a plain stream on that worker, of the other key."""
    body = chat_body("demo", "Hi", stream=True, max_tokens=HONEST_TOKENS, ignore_eos=True)
    at: list[float] = []
    async with c.http.post(c.url + CHAT, json=body, headers=headers(KEYS[1])) as answer:
        assert answer.status == 200 and answer.headers["x-loraplex-worker"] == worker
        async for line in answer.content:
            assert b'"error"' not in line
            if line.startswith(b"data: "):
                at.append(time.monotonic())
    return statistics.mean(after - before for before, after in itertools.pairwise(at))


async def paces(c: Cluster) -> tuple[float, float]:
    """Of a stream alone, and beside answers of another key that are ended one after the other."""
    alone = await token_s(c, "w0")
    ended: list[int] = []
    first = asyncio.Event()

    async def again_and_again() -> None:
        while True:
            ended.append((await ask(c, CHAT, TOLD | REGEX))[0])
            first.set()

    attack = asyncio.create_task(again_and_again())
    await first.wait()
    beside = await token_s(c, "w0")
    attack.cancel()
    assert set(ended) == {400}
    return alone, beside


async def test_a_stream_of_another_key_keeps_its_pace_beside_them(usual: Cluster) -> None:
    for _ in range(TRIES):
        alone, beside = await paces(usual)
        if beside < MOST_SLOWER * alone + TOKEN_CPU_S:
            return
    raise AssertionError(f"{beside} s for each token beside them, {alone} s alone")


async def test_an_answer_that_has_moved_ends_where_it_goes_on(usual: Cluster) -> None:
    c = usual
    await c.start_worker("w1")  # the last test: the others have one worker
    sent = await c.metric("loraplex_dispatched_total")
    moved = await c.metric("loraplex_streams_moved_total")
    said, body = b"", TOLD | GRAMMAR | {"stream": True}
    async with c.http.post(c.url + CHAT, json=body, headers=headers(KEYS[0])) as answer:
        first = c.workers.pop(answer.headers["x-loraplex-worker"])
        async for piece in answer.content.iter_any():
            if not said:
                first.signal(signal.SIGKILL)
            said += piece
    await first.wait()
    assert said.count(b'"error":{') == 1 and b"read in many ways" in said, said[-900:]
    assert await c.metric("loraplex_streams_moved_total") == moved + 1
    assert await c.metric("loraplex_dispatched_total") == sent + 2
    assert await c.metric("loraplex_streams_lost_total") == 0
