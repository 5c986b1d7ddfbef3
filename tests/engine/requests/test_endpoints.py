"""Shell. Every endpoint on real vLLM: a chat base and an embedding base behind one gateway."""

from __future__ import annotations

import asyncio
import base64
import json
from array import array
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from shared.runtime.children import Zygote
from tests.harness import DEMO, Cluster, chat_body, cluster, demo_config

pytestmark = pytest.mark.asyncio(loop_scope="session")
QUESTION = "How does gravity work?"


def mixed_config() -> dict[str, Any]:
    config = demo_config(max_loras=2)
    config["llm_configs"].append(
        {
            "model_loading_config": {"model_id": "vectors", "model_source": str(DEMO / "model")},
            "engine_kwargs": {
                "runner": "pooling",
                "enforce_eager": True,
                "dtype": "float32",
                "max_model_len": 512,
                "kv_cache_memory_bytes": 32 << 20,
            },
        }
    )
    return config


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def mixed(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    async with cluster(mixed_config(), tmp_path_factory.mktemp("mixed"), zygote) as c:
        await c.start_worker("chat", "demo", serving=False)
        await c.start_worker("embed", "vectors", serving=False)
        await c.until_serving("chat")
        await c.until_serving("embed")
        yield c


async def events(c: Cluster, path: str, body: dict[str, Any]) -> list[bytes]:
    async with c.http.post(c.url + path, json={**body, "stream": True}) as answer:
        assert answer.status == 200, await answer.text()
        return [part for part in (await answer.read()).split(b"\n\n") if part]


def said(response: dict[str, Any]) -> str:
    return str(response["output"][0]["content"][0]["text"])


async def test_each_base_does_its_own_tasks_and_names_them_when_asked_for_another(
    mixed: Cluster,
) -> None:
    status, body, _ = await mixed.post("/v1/embeddings", {"model": "vectors", "input": ["a", "b"]})
    assert status == 200 and len(body["data"]) == 2 and body["model"] == "vectors"
    status, body, _ = await mixed.post("/v1/embeddings", {"model": "demo", "input": "a"})
    assert status == 400 and "generate" in body["error"]["message"]
    status, body, _ = await mixed.chat("vectors")
    assert status == 400 and "embed" in body["error"]["message"]
    assert body["error"]["code"] == "invalid_request"


async def test_the_embedding_base_scores_reranks_and_pools(mixed: Cluster) -> None:
    pair = {"model": "vectors", "text_1": "gravity", "text_2": ["gravity", "soup"]}
    for path in ("/score", "/v1/score"):
        status, body, _ = await mixed.post(path, pair)
        assert status == 200 and len(body["data"]) == 2, body
    ranked = {"model": "vectors", "query": "gravity", "documents": ["soup", "gravity"]}
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        status, body, _ = await mixed.post(path, ranked)
        assert status == 200 and body["results"][0]["index"] == 1, body
    status, body, _ = await mixed.post("/pooling", {"model": "vectors", "input": "a"})
    assert status == 200, body


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/embeddings", {"input": ["gravity", "soup and bread"]}),
        ("/v1/embeddings", {"input": "gravity", "encoding_format": "bytes"}),
        ("/v2/embed", {"texts": ["gravity"], "embedding_types": ["float"]}),
        ("/pooling", {"input": "gravity"}),
        ("/score", {"text_1": "gravity", "text_2": ["gravity", "soup"]}),
        ("/v1/rerank", {"query": "gravity", "documents": ["soup", "gravity"]}),
    ],
)
async def test_the_tokens_of_what_is_pooled_are_counted(
    mixed: Cluster, path: str, asked: dict[str, Any]
) -> None:
    name = "loraplex_prompt_tokens_total"
    before = await mixed.metric(name, base="vectors")
    async with mixed.http.post(mixed.url + path, json={"model": "vectors", **asked}) as answer:
        assert answer.status == 200
        told = answer.headers.get("metadata") or await answer.text()
    counted = await mixed.metric(name, base="vectors") - before
    facts = json.loads(told)
    meta = facts.get("meta", {}).get("billed_units", {}).get("input_tokens")
    usage = facts.get("usage", {})
    assert counted == (meta or usage.get("prompt_tokens") or usage["total_tokens"]) > 0


async def test_each_of_many_inputs_gets_its_own_vector_in_every_form(mixed: Cluster) -> None:
    texts = [f"text number {n}" for n in range(150)]

    async def ask(path: str, **body: Any) -> Any:
        status, answer, _ = await mixed.post(path, {"model": "vectors", **body})
        assert status == 200, answer
        return answer

    many = await ask("/v1/embeddings", input=texts)
    assert [it["index"] for it in many["data"]] == [*range(150)]
    for n in (0, 31, 32, 149):
        one = await ask("/v1/embeddings", input=texts[n])
        assert many["data"][n]["embedding"] == pytest.approx(one["data"][0]["embedding"], abs=1e-4)
    packed = await ask("/v1/embeddings", input=texts, encoding_format="base64")
    for numbers, text in zip(many["data"], packed["data"], strict=True):
        unpacked = array("f", base64.b64decode(text["embedding"]))
        assert numbers["embedding"] == pytest.approx(unpacked, abs=1e-4)
    kinds = await ask("/v2/embed", texts=texts, embedding_types=["float", "binary"])
    signs = [[number >= 0 for number in row] for row in kinds["embeddings"]["float"]]
    for row, bits in zip(signs, kinds["embeddings"]["binary"], strict=True):
        assert [bool((byte + 128) >> (7 - k) & 1) for byte in bits for k in range(8)] == row
    status, body, _ = await mixed.post(
        "/v1/embeddings", {"model": "vectors", "input": [*texts, "long " * 600]}
    )
    assert status == 400 and "maximum" in body["error"]["message"], body


async def test_who_leaves_in_the_midst_of_many_inputs_ends_them_in_the_engine(
    mixed: Cluster,
) -> None:
    asked = {"model": "vectors", "input": ["long " * 400] * 1000}
    leaving = asyncio.create_task(mixed.post("/v1/embeddings", asked))
    async with asyncio.timeout(60):
        while not await mixed.metric("loraplex_worker_load", worker="embed"):
            await asyncio.sleep(0.02)
        leaving.cancel()
        while await mixed.metric("loraplex_worker_load", worker="embed"):
            await asyncio.sleep(0.02)
    status, body, _ = await mixed.post("/v1/embeddings", {"model": "vectors", "input": "a"})
    assert status == 200, body


async def test_embeddings_as_bytes_keep_their_type_and_their_metadata(mixed: Cluster) -> None:
    asked = {"model": "vectors", "input": "a", "encoding_format": "bytes"}
    async with mixed.http.post(mixed.url + "/v1/embeddings", json=asked) as answer:
        assert answer.status == 200
        assert answer.content_type == "application/octet-stream"
        assert json.loads(answer.headers["metadata"])["data"]
        assert len(await answer.read()) == 192 * 4


async def test_a_response_is_kept_for_its_owner_and_continued(mixed: Cluster) -> None:
    asked = {"model": "demo:pirate", "input": QUESTION, "temperature": 0, "max_output_tokens": 24}
    status, first, _ = await mixed.post("/v1/responses", asked)
    assert status == 200 and first["model"] == "demo:pirate"
    assert said(first) == await mixed.text("demo:pirate", QUESTION, max_tokens=24)
    status, again = await mixed.get(f"/v1/responses/{first['id']}")
    assert status == 200 and again["id"] == first["id"] and said(again) == said(first)
    more = asked | {"input": "And then?", "previous_response_id": first["id"]}
    status, second, _ = await mixed.post("/v1/responses", more)
    assert status == 200 and second["previous_response_id"] == first["id"]
    assert second["usage"]["input_tokens"] > first["usage"]["input_tokens"]


async def test_a_response_in_the_background_can_be_waited_for_and_cancelled(
    mixed: Cluster,
) -> None:
    asked = {"model": "demo:pirate", "input": QUESTION, "background": True, "temperature": 0}
    status, queued, _ = await mixed.post("/v1/responses", asked | {"max_output_tokens": 8})
    assert status == 200 and queued["status"] == "queued"
    async with asyncio.timeout(60):
        while (await mixed.get(f"/v1/responses/{queued['id']}"))[1]["status"] in (
            "queued",
            "in_progress",
        ):
            await asyncio.sleep(0.05)
    long = {"max_output_tokens": 900, "ignore_eos": True}  # else it has often ended before
    status, queued, _ = await mixed.post("/v1/responses", asked | long)
    status, gone, _ = await mixed.post(f"/v1/responses/{queued['id']}/cancel", b"")
    assert status == 200 and gone["status"] in ("cancelled", "completed"), gone


async def test_a_response_streams_to_its_completed_event(mixed: Cluster) -> None:
    asked = {"model": "demo:haiku", "input": QUESTION, "temperature": 0, "max_output_tokens": 16}
    seen = await events(mixed, "/v1/responses", asked)
    assert seen[0].startswith(b"event: response.created")
    # vLLM 0.33 says that it had no more tokens
    ends = (b"event: response.completed", b"event: response.incomplete")
    assert seen[-1].startswith(ends)


async def test_messages_answer_as_anthropic_does(mixed: Cluster) -> None:
    asked = {
        "model": "demo:pirate",
        "max_tokens": 24,
        "temperature": 0,
        "messages": [{"role": "user", "content": QUESTION}],
    }
    status, body, _ = await mixed.post("/v1/messages", asked)
    assert status == 200 and body["type"] == "message"
    assert body["content"][0]["text"] == await mixed.text("demo:pirate", QUESTION, max_tokens=24)
    status, counted, _ = await mixed.post("/v1/messages/count_tokens", asked)
    assert status == 200 and counted["input_tokens"] == body["usage"]["input_tokens"]
    seen = await events(mixed, "/v1/messages", asked)
    assert seen[0].startswith(b"event: message_start")
    assert any(b"message_stop" in event for event in seen[-2:])
    status, refused, _ = await mixed.post("/v1/messages", asked | {"max_tokens": "many"})
    assert status == 400 and refused["type"] == "error"
    assert isinstance(refused["error"]["code"], str) and "message" in refused["error"]


async def test_tokens_go_there_and_back(mixed: Cluster) -> None:
    for model in ("demo", "demo:pirate", "vectors"):
        status, body, _ = await mixed.post("/tokenize", {"model": model, "prompt": QUESTION})
        assert status == 200 and body["count"] == len(body["tokens"]) > 0
        back = {"model": model, "tokens": body["tokens"]}
        status, text, _ = await mixed.post("/detokenize", back)
        assert status == 200 and text["prompt"].endswith(QUESTION)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"messages": []},
        {"n": 0},
        {"max_tokens": 5000},
        {"response_format": {"type": "json_schema"}},
        {"messages": [{"role": "user", "content": "gravity " * 1500}]},
        {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required"},
    ],
)
async def test_what_vllm_refuses_comes_in_the_one_shape(
    mixed: Cluster, wrong: dict[str, Any], stream: bool
) -> None:
    asked = chat_body("demo:pirate", stream=stream) | wrong
    status, body, _ = await mixed.post("/v1/chat/completions", asked)
    assert 400 <= status < 500, body
    error = body["error"]
    assert {*error} == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and not error["code"].isdigit()
    assert "--" not in error["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"logprobs": True, "top_logprobs": 100}),
        ("/v1/chat/completions", {"allowed_token_ids": [10**6]}),
        ("/v1/completions", {"prompt": "a", "logprobs": 100}),
        (
            "/v1/responses",
            {"input": "a", "top_logprobs": 100, "include": ["message.output_text.logprobs"]},
        ),
        (
            "/v1/messages",
            {"output_config": {"format": {"type": "json_schema", "schema": {"type": "nosuch"}}}},
        ),
    ],
)
async def test_a_stream_that_the_engine_does_not_take_is_a_400_and_no_stream(
    mixed: Cluster, path: str, body: dict[str, Any]
) -> None:
    asked = {"model": "demo", "stream": True, "max_tokens": 4} | body
    if path in ("/v1/chat/completions", "/v1/messages"):
        asked["messages"] = [{"role": "user", "content": "a"}]
    status, refused, _ = await mixed.post(path, asked)
    assert status == 400, refused
    assert refused["error"]["type"] == "invalid_request_error" and refused["error"]["message"]
    assert (refused.get("type") == "error") == (path == "/v1/messages")
