"""Shell. No attack holds the loop of a worker with real vLLM, whose front end runs on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.harness import Cluster, cluster, demo_config
from tests.hostile.attacks import KEY
from tests.hostile.turns import held, too_long

LONG = 100_000
ROOM = {"max_model_len": LONG + 1000, "kv_cache_memory_bytes": 512 << 20}
WIDE = 1024
"""Numbers of a vector, as of most models."""


def post(path: str, asked: dict[str, Any]) -> bytes:
    body = json.dumps(asked).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body


@pytest.mark.long
async def test_no_attack_holds_the_loop_of_a_vllm_worker_for_more_than_50_ms(
    tmp_path: Path,
) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY}\n")
    config = demo_config(api_keys_file=str(keys))
    config["llm_configs"][0]["model_loading_config"]["model_id"] = "sim"
    async with cluster(config, tmp_path, measured=True) as c:
        await c.start_worker("w0")
        assert await too_long(c) == {}


@pytest.mark.long
async def test_many_choices_of_a_long_prompt_hold_no_loop_for_more_than_50_ms(
    tmp_path: Path,
) -> None:
    longer = {"hf_overrides": {"max_position_embeddings": LONG + 1000}}
    asked = {"model": "demo", "prompt": [5] * LONG, "max_tokens": 2, "n": 64, "stream": True}
    data = post("/v1/completions", asked)
    async with cluster(demo_config(engine=ROOM | longer), tmp_path, measured=True) as c:
        await c.start_worker("w0")
        assert await held(c, data) == {}


@pytest.mark.long
async def test_many_inputs_and_wide_vectors_hold_no_loop_for_more_than_50_ms(
    tmp_path: Path,
) -> None:
    """Another thread that keeps the interpreter counts as well: it writes the answer."""
    texts = [f"text {n}" for n in range(2048)]
    kinds = ["float", "binary", "ubinary", "base64"]
    asked: dict[str, tuple[str, dict[str, Any]]] = {
        "numbers": ("/v1/embeddings", {"input": texts}),
        "base64": ("/v1/embeddings", {"input": texts, "encoding_format": "base64"}),
        "token ids": ("/v1/embeddings", {"input": [[5, 6, 7]] * len(texts)}),
        "kinds": ("/v2/embed", {"texts": texts, "embedding_types": kinds}),
        "pooling": ("/pooling", {"input": texts}),
        "score": ("/score", {"text_1": "a", "text_2": texts}),
        "rerank": ("/v1/rerank", {"query": "a", "documents": texts}),
    }
    wide = {"hidden_size": WIDE, "num_attention_heads": 16, "num_key_value_heads": 4}
    wide |= {"head_dim": WIDE // 16, "num_hidden_layers": 1, "intermediate_size": 256}
    engine = {"runner": "pooling", "hf_overrides": wide, "load_format": "dummy"}
    config = demo_config(engine=engine | {"enable_lora": False})
    del config["llm_configs"][0]["lora_config"]
    async with cluster(config, tmp_path, measured=True) as c:
        await c.start_worker("w0")
        await hold_nothing(c, asked)


@pytest.mark.long
async def test_half_a_million_log_probabilities_hold_no_loop_for_more_than_50_ms(
    tmp_path: Path,
) -> None:
    fields = {"temperature": 1, "ignore_eos": True, "max_tokens": 400}
    hi = [{"role": "user", "content": "hi"}]
    scored = {"temperature": 1, "ignore_eos": True, "max_output_tokens": 900, "top_logprobs": 20}
    scored["include"] = ["message.output_text.logprobs"]
    prompt = {"prompt": [5] * 900, "max_tokens": 2}
    asked: dict[str, tuple[str, dict[str, Any]]] = {
        "chat": (
            "/v1/chat/completions",
            {"messages": hi, "n": 64, "logprobs": True, "top_logprobs": 20, **fields},
        ),
        "completion": ("/v1/completions", {"prompt": "hi", "n": 64, "logprobs": 20, **fields}),
        "echo": ("/v1/completions", {**prompt, "n": 64, "logprobs": 20, "echo": True}),
        "prompts": (
            "/v1/completions",
            {**prompt, "prompt": [[5] * 900] * 64, "prompt_logprobs": 20},
        ),
        "response": ("/v1/responses", {"input": "hi", **scored}),
    }
    async with cluster(demo_config(), tmp_path, measured=True) as c:
        await c.start_worker("w0")
        await hold_nothing(c, asked)


async def hold_nothing(c: Cluster, asked: dict[str, tuple[str, dict[str, Any]]]) -> None:
    found = {}
    for name, (path, body) in asked.items():
        status, answer, _ = await c.post(path, {"model": "demo", **body})
        assert status == 200, (name, answer)
        found[name] = await held(c, post(path, {"model": "demo", **body}))
    assert found == {name: {} for name in asked}
