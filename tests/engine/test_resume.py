"""Answers that began on one engine and go on at another: what a client gets is what it would have
got from one. The engine is the same one here, which remembers nothing of the first attempt.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import pytest_asyncio
import yaml

from shared.adapters.identity import AdapterRef
from shared.config.settings_file import read_settings
from shared.errors import CannotContinue
from shared.link.token_ids import pack, unpack
from tests.harness import DEMO, demo_config
from worker.engine.base import EngineRequest, Loaded, Swap

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
QUESTION = [{"role": "user", "content": "Tell me about the sea."}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "of a place", "parameters": SCHEMA},
}
USAGE = {"include_usage": True}
ADAPTER = Loaded(AdapterRef("demo", "pirate", "1" * 64), 1, DEMO / "adapters" / "pirate", 8, 0)


@dataclass
class Sent:
    """A Reply that keeps what it gets: bytes and tokens of every call."""

    status: int = 0
    parts: list[tuple[bytes, bytes]] = field(default_factory=list)
    told: bytes = b""
    ended: bool = False
    prompt_tokens: int = 0
    output_tokens: int = 0

    def head(self, status: int, sse: bool, data: bytes, end: bool, tokens: bytes = b"") -> None:
        assert not self.parts
        self.status = status
        self.more(data, end, tokens)

    def more(self, data: bytes, end: bool, tokens: bytes = b"") -> None:
        assert not self.ended
        self.parts.append((data, tokens))
        self.ended = end

    def progress(self, tokens: bytes) -> None:
        self.told += tokens

    def data(self, parts: int | None = None) -> bytes:
        return b"".join(data for data, _ in self.parts[:parts])

    def tokens(self, parts: int | None = None) -> bytes:
        return b"".join(tokens for _, tokens in self.parts[:parts])


def heard(stream: bytes) -> Any:
    """What a client makes of a stream, without the boundaries of its events."""
    assert stream.endswith(b"data: [DONE]\n\n") and stream.count(b"[DONE]") == 1, stream[-300:]
    said: dict[Any, Any] = {"ids": set(), "usage": [], "fingerprint": set()}
    for event in stream.split(b"\n\n")[:-2]:
        body = json.loads(event.removeprefix(b"data: "))
        assert "error" not in body, body
        said["ids"].add((body["id"], body["object"], body["created"], body["model"]))
        if body.get("usage") and not body["choices"]:
            said["usage"].append(body["usage"])
        for choice in body["choices"]:
            one = said.setdefault(choice["index"], {"text": "", "tools": {}, "logprobs": []})
            delta = choice.get("delta", {})
            if "role" in delta:
                one["roles"] = one.get("roles", 0) + 1
            one["text"] += choice.get("text") or delta.get("content") or ""
            one["reasoning"] = one.get("reasoning", "") + (delta.get("reasoning") or "")
            for tool in delta.get("tool_calls") or ():
                call = one["tools"].setdefault(tool["index"], {"name": "", "arguments": ""})
                for key in call:
                    call[key] += tool["function"].get(key) or ""
            logprobs = choice.get("logprobs")
            if logprobs:
                one["logprobs"] += logprobs.get("content") or logprobs["token_logprobs"]
            if choice.get("finish_reason"):
                one["ends"] = one.get("ends", [])
                one["ends"].append((choice["finish_reason"], choice.get("stop_reason")))
            if body.get("usage"):
                one["counted"] = body["usage"]
    return said


async def answer(
    engine: Any, path: str, body: dict[str, Any], seen: bytes = b"", *, adapter: bool = True
) -> Sent:
    sent = Sent()
    call = EngineRequest(
        path,
        "request-1",
        json.dumps({"model": "demo", "stream": True, **body}).encode(),
        ADAPTER if adapter else None,
        created=1_700_000_000,
        seen=seen,
        movable=True,
    )
    await engine.serve(call, sent)
    assert sent.ended
    return sent


async def _engine(folder: Any, **more: Any) -> Any:
    from worker.engine.vllm.engine import VLLMEngine

    config = demo_config()
    config["llm_configs"][0]["engine_kwargs"] |= {
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
        **more,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    engine = VLLMEngine(read_settings(str(folder / "config.yaml")).models[0])
    await engine.start()
    await engine.prepare(ADAPTER)
    assert not (await engine.swap(Swap((ADAPTER,)))).refused
    return engine


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def engine(
    vllm_environment: None, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Any]:
    engine = await _engine(tmp_path_factory.mktemp("resume"))
    yield engine
    await engine.stop()


def chat(**more: Any) -> tuple[str, dict[str, Any]]:
    body = {"messages": QUESTION, "max_tokens": 30, "temperature": 0, **more}
    return CHAT, body


def completion(**more: Any) -> tuple[str, dict[str, Any]]:
    return COMPLETION, {"prompt": "The sea", "max_tokens": 30, "temperature": 0, **more}


def schema(**more: Any) -> tuple[str, dict[str, Any]]:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    return chat(response_format=wanted, max_tokens=60, **more)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": chat(),
    "usage": chat(stream_options=USAGE),
    "continuous usage": chat(stream_options={**USAGE, "continuous_usage_stats": True}),
    "a stop string that never comes": chat(stop=["QQQQQQQ", "the treasure of the seven seas"]),
    "a stop string that comes": chat(stop=["the sea", "a", " is"], min_tokens=4),
    "a stop string that is shown": chat(stop=["a"], min_tokens=9, include_stop_str_in_output=True),
    "repetition penalty": chat(repetition_penalty=1.3),
    "logit bias": chat(logit_bias={"5": -100}),
    "emoji": chat(messages=[{"role": "user", "content": "Zoë 漢字 🎉👩‍🚀"}], ignore_eos=True),
    "json schema": schema(),
    "json schema, seeded": schema(temperature=1.0, seed=7),
    "json schema and penalty": schema(frequency_penalty=0.5),
    "frequency penalty": chat(frequency_penalty=1.5),
    "presence penalty, sampled": chat(presence_penalty=1.0, temperature=1.0),
    "bad words": chat(bad_words=["sea", "ship"]),
    "seeded": chat(temperature=1.0, seed=11),
    "logprobs": chat(logprobs=True, top_logprobs=2),
    "two choices": chat(n=2, temperature=1.0, seed=3),
    "two choices, sampled": chat(n=2, temperature=1.0),
    "three choices with usage": chat(n=3, temperature=1.0, stream_options=USAGE),
    "completion": completion(),
    "completion with usage": completion(stream_options=USAGE),
    "completion with echo": completion(echo=True),
    "completion with logprobs": completion(logprobs=1),
    "completion, two choices": completion(n=2, temperature=1.0),
    "completion, two prompts": completion(prompt=["The sea", "A ship is"], stream_options=USAGE),
    "completion of tokens": completion(prompt=[5, 6, 7, 8]),
}


def cuts(parts: int) -> list[int]:
    """After how many parts the worker is lost: the first, the last, and some between."""
    return sorted(
        {1, 2, 3, parts // 4, parts // 2, 3 * parts // 4, parts - 1} & set(range(1, parts))
    )


@pytest.mark.parametrize("case", CASES)
async def test_an_answer_that_moves_is_the_one_that_stays(engine: Any, case: str) -> None:
    path, body = CASES[case]
    whole = await answer(engine, path, body)
    assert whole.status == 200
    due = heard(whole.data())
    assert len(whole.parts) > 3, whole.data()
    assert all(tokens for _, tokens in whole.parts[:-1]), "bytes without their tokens"
    for cut in cuts(len(whole.parts)):
        rest = await answer(engine, path, body, whole.tokens(cut))
        assert heard(whole.data(cut) + rest.data()) == due, f"cut after {cut} parts"
        made, wanted = unpack(whole.tokens(cut) + rest.tokens()), unpack(whole.tokens())
        assert made == wanted, f"cut after {cut} parts"
        assert (rest.prompt_tokens, rest.output_tokens) == (
            whole.prompt_tokens,
            whole.output_tokens,
        )


async def test_every_cut_of_an_answer_with_half_characters_is_right(engine: Any) -> None:
    path, body = CASES["emoji"]
    whole = await answer(engine, path, body)
    due = heard(whole.data())
    for cut in range(1, len(whole.parts)):
        rest = await answer(engine, path, body, whole.tokens(cut))
        assert heard(whole.data(cut) + rest.data()) == due, f"cut after {cut} parts"


async def test_the_base_model_is_continued_as_an_adapter_is(engine: Any) -> None:
    path, body = chat(ignore_eos=True)
    whole = await answer(engine, path, body, adapter=False)
    rest = await answer(engine, path, body, whole.tokens(9), adapter=False)
    assert heard(whole.data(9) + rest.data()) == heard(whole.data())
    assert (
        heard(whole.data())[0]["text"]
        != heard((await answer(engine, path, body)).data())[0]["text"]
    )


async def test_what_is_sampled_without_a_seed_goes_on_from_what_the_client_has(engine: Any) -> None:
    path, body = chat(temperature=1.0, ignore_eos=True, stream_options=USAGE)
    whole = await answer(engine, path, body)
    rest = await answer(engine, path, body, whole.tokens(9))
    said = heard(whole.data(9) + rest.data())
    assert said["usage"][0]["completion_tokens"] == 30 and said[0]["ends"] == [("length", None)]
    assert len(unpack(rest.tokens())[0]) == 21


@pytest.mark.parametrize("case", [chat(), schema(), chat(stop=["is"], min_tokens=3), completion()])
async def test_an_answer_that_is_sent_whole_goes_on_too(
    engine: Any, case: tuple[str, dict[str, Any]]
) -> None:
    path, body = case
    body = {**body, "stream": False}
    whole = await answer(engine, path, body)
    told = unpack(whole.told)[0]
    assert len(told) > 3
    for cut in (1, len(told) // 2, len(told)):
        rest = await answer(engine, path, body, pack(told[:cut]))
        assert json.loads(rest.data()) == json.loads(whole.data())
        assert unpack(rest.told).get(0, []) == told[cut:]


@pytest.mark.parametrize(
    "more", [{"n": 2, "temperature": 1.0}, {"logprobs": True}, {"frequency_penalty": 1.0}]
)
async def test_a_whole_answer_that_cannot_be_continued_tells_no_tokens(
    engine: Any, more: dict[str, Any]
) -> None:
    path, body = chat(stream=False, **more)
    whole = await answer(engine, path, body)
    assert whole.told == b"" and json.loads(whole.data())["choices"]


async def test_tokens_that_contradict_the_answer_are_an_error_and_no_answer(engine: Any) -> None:
    path, body = chat(temperature=1.0, seed=5, ignore_eos=True)
    whole = await answer(engine, path, body)
    made = unpack(whole.tokens(9))[0]
    with pytest.raises(CannotContinue, match="Token 4 of choice 0"):
        await answer(engine, path, body, pack([*made[:4], made[4] + 1, *made[5:]]))


async def test_an_answer_whose_last_token_was_seen_ends_as_it_should(engine: Any) -> None:
    """Its end was lost, and nothing is left to make."""
    path, body = chat(ignore_eos=True, stream_options=USAGE)
    whole = await answer(engine, path, body)
    rest = await answer(engine, path, body, whole.tokens())
    said = heard(whole.data(len(whole.parts) - 1) + rest.data())
    assert said[0]["ends"] == [("length", None)] and said["usage"][0]["completion_tokens"] == 30


async def test_beam_search_is_not_moved(engine: Any) -> None:
    path, body = completion(use_beam_search=True, n=2, stream=False)
    whole = await answer(engine, path, body)
    assert whole.tokens() == whole.told == b""
    with pytest.raises(CannotContinue):
        await answer(engine, path, body, pack([1]))


# ---- with parsers --------------------------------------------------------------------------------


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def parsing(
    vllm_environment: None, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Any]:
    """An engine that parses tool calls and reasoning."""
    more = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes"}
    engine = await _engine(tmp_path_factory.mktemp("parsing"), **more)
    yield engine
    await engine.stop()


PARSED = {
    "required tool": chat(tools=[TOOL], tool_choice="required", max_tokens=70),
    "named tool": chat(
        tools=[TOOL],
        tool_choice={"type": "function", "function": {"name": "weather"}},
        max_tokens=60,
        stream_options=USAGE,
    ),
    "a tool that is not called": chat(tools=[TOOL], tool_choice="auto"),
    "no tools": chat(),
    "required tool, sampled, two choices": chat(
        tools=[TOOL], tool_choice="required", max_tokens=70, n=2, temperature=1.0
    ),
}


@pytest.mark.parametrize("case", PARSED)
async def test_an_answer_that_is_parsed_moves_as_well(parsing: Any, case: str) -> None:
    path, body = PARSED[case]
    whole = await answer(parsing, path, body)
    due = heard(whole.data())
    if "tools" in body and body["tool_choice"] != "auto":
        assert due[0]["tools"][0]["name"] == "weather" and due[0]["tools"][0]["arguments"]
    for cut in cuts(len(whole.parts)):
        rest = await answer(parsing, path, body, whole.tokens(cut))
        assert heard(whole.data(cut) + rest.data()) == due, f"cut after {cut} parts"
