"""Answers that begin on one engine and go on on another. The client gets what it would have got
from one engine. Both are the same engine here, which remembers nothing of the first attempt.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import zlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from shared.errors import CannotContinue, EngineFailure
from shared.link.token_ids import pack, unpack
from tests.engine.in_process import ADAPTERS, start_engine, worker_environment
from tests.engine.requests.test_fast_path import Written, serve_plain
from tests.engine.requests.test_fast_path import chat as plain_chat
from worker.engine.base import EngineRequest, Storing

pytestmark = pytest.mark.usefixtures("vllm_environment")
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
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
ADAPTER = ADAPTERS["pirate"]


@dataclass
class Sent:
    """A Reply that keeps what it gets: bytes and tokens of every call."""

    status: int = 0
    parts: list[tuple[bytes, bytes]] = field(default_factory=list)
    told: bytes = b""
    copy: bytes = b""
    ended: bool = False
    prompt_tokens: int = 0
    output_tokens: int = 0
    finish_reasons: str = ""

    def head(self, status: int, sse: bool, data: bytes, end: bool, tokens: bytes = b"") -> None:
        assert not self.parts
        self.status = status
        self.more(data, end, tokens)

    def answered(self, status: int, data: bytes) -> None:
        self.head(status, False, data, False)

    def stored(self, copy: bytes) -> None:
        assert not self.ended
        self.copy = copy

    def more(self, data: bytes, end: bool, tokens: bytes = b"") -> None:
        assert not self.ended
        self.parts.append((data, tokens))
        self.ended = end

    async def room(self) -> None:
        return None

    def progress(self, tokens: bytes) -> None:
        self.told += tokens

    def data(self, parts: int | None = None) -> bytes:
        return b"".join(data for data, _ in self.parts[:parts])

    def tokens(self, parts: int | None = None) -> bytes:
        return b"".join(tokens for _, tokens in self.parts[:parts])


def id_of(body: dict[str, Any]) -> str:
    return f"resp_{zlib.crc32(json.dumps(body).encode()):x}"


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
            one = said.setdefault(choice.get("index", 0), {"text": "", "tools": {}, "logprobs": []})
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
    engine: Any,
    path: str,
    body: dict[str, Any],
    seen: bytes = b"",
    *,
    adapter: bool = True,
    name: str = "request-1",
    on_seen: Callable[[bytes], None] | None = None,
) -> Sent:
    sent = Sent()
    call = EngineRequest(
        path,
        name,
        json.dumps({"model": "demo", "stream": True, **body}).encode(),
        ADAPTER if adapter else None,
        created=1_700_000_000,
        seen=seen,
        movable=True,
        answer_id=id_of(body) if path == RESPONSES else "",
        background=bool(body.get("background")),
        on_seen=on_seen,
    )
    await engine.serve(call, sent)
    assert sent.ended
    return sent


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
    """The numbers of parts after which the worker is lost: the first two, the middle, the last."""
    return sorted({1, 2, parts // 2, parts - 1} & set(range(1, parts)))


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


@pytest.mark.parametrize("case", ["usage", "json schema", "two choices", "completion with echo"])
async def test_what_the_client_has_is_rendered_once_more_for_who_asks_again(
    engine: Any, case: str
) -> None:
    path, body = CASES[case]
    whole = await answer(engine, path, body)
    for cut in cuts(len(whole.parts)):
        seen: list[bytes] = []
        rest = await answer(engine, path, body, whole.tokens(cut), on_seen=seen.append)
        assert heard(b"".join(seen) + rest.data()) == heard(whole.data()), f"cut after {cut} parts"


async def test_every_cut_of_an_answer_with_half_characters_is_right(engine: Any) -> None:
    path, body = CASES["emoji"]
    whole = await answer(engine, path, body)
    due = heard(whole.data())
    every = range(1, len(whole.parts))
    rests = await asyncio.gather(
        *(answer(engine, path, body, whole.tokens(cut), name=f"cut {cut}") for cut in every)
    )
    for cut, rest in zip(every, rests, strict=True):
        found = heard(whole.data(cut) + rest.data())
        # side by side, each attempt needs an id of its own
        assert found | {"ids": due["ids"]} == due, f"cut after {cut} parts"


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
    """Only the end was lost. No token is left to make."""
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


def messages(**more: Any) -> tuple[str, dict[str, Any]]:
    return MESSAGES, {"messages": QUESTION, "max_tokens": 30, "temperature": 0, **more}


def read_events(stream: bytes) -> list[Any]:
    """The events of a stream of messages, with the text of neighbours put together."""
    found: list[Any] = []
    for event in stream.split(b"\n\n"):
        _, _, data = event.partition(b"data: ")
        if not data or data == b"[DONE]":
            continue
        body = json.loads(data)
        delta, last = body.get("delta", {}), found[-1] if found else {}
        kind = delta.get("type")
        part = {"text_delta": "text", "input_json_delta": "partial_json"}.get(kind, "")
        if part and last.get("delta", {}).get("type") == kind and last["index"] == body["index"]:
            last["delta"][part] += delta[part]
        else:
            found.append(body)
    return found


@pytest.mark.parametrize(
    "case",
    [
        messages(),
        messages(temperature=1.0),
        messages(stop_sequences=["a"]),
        messages(system="Speak.", ignore_eos=True),
    ],
    ids=["plain", "sampled", "stop sequence", "system"],
)
async def test_a_stream_of_messages_moves_and_each_event_comes_once(
    engine: Any, case: tuple[str, dict[str, Any]]
) -> None:
    path, body = case
    whole = await answer(engine, path, body)
    due, sampled = read_events(whole.data()), body["temperature"] > 0
    assert [due[0]["type"], due[-1]["type"]] == ["message_start", "message_stop"]
    for cut in cuts(len(whole.parts)):
        rest = await answer(engine, path, body, whole.tokens(cut))
        got = read_events(whole.data(cut) + rest.data())
        if sampled:
            assert [e["type"] for e in got] == [e["type"] for e in due]
            assert got[0] == due[0], "the same message"
        else:
            assert got == due, f"cut after {cut} parts"
            assert (rest.prompt_tokens, rest.output_tokens) == (
                whole.prompt_tokens,
                whole.output_tokens,
            )


async def test_a_message_that_is_sent_whole_goes_on_too(engine: Any) -> None:
    path, body = messages(stream=False)
    whole = await answer(engine, path, body)
    told = unpack(whole.told)[0]
    rest = await answer(engine, path, body, pack(told[: len(told) // 2]))
    assert json.loads(rest.data()) == json.loads(whole.data())


def response(**more: Any) -> tuple[str, dict[str, Any]]:
    asked = {"input": "Tell me about the sea.", "max_output_tokens": 24, "temperature": 0}
    return RESPONSES, {**asked, **more}


FORMAT = {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}
CACHED = re.compile(rb'"cached_tokens":[0-9]+')
"""How many tokens of the prompt a worker had in its cache. Another one has others."""


def same(stream: bytes) -> bytes:
    return CACHED.sub(b"", stream)


@pytest.mark.parametrize(
    "case",
    [
        response(),
        response(store=False, instructions="Speak."),
        response(seed=5, temperature=1.0),
        response(text=FORMAT, max_output_tokens=60),
        response(include=["message.output_text.logprobs"], top_logprobs=2),
        response(input="Zoë 漢字 🎉👩‍🚀"),
        response(background=True, stream=True),
    ],
    ids=["plain", "not stored", "seeded", "schema", "logprobs", "half characters", "background"],
)
async def test_a_response_moves_with_its_ids_and_the_numbers_of_its_events(
    engine: Any, case: tuple[str, dict[str, Any]]
) -> None:
    """Byte by byte: nothing in it is random."""
    path, body = case
    whole = await answer(engine, path, body)
    assert whole.data().count(b"event: response.completed") == 1
    assert whole.prompt_tokens > 5 and whole.output_tokens > 9
    assert len(whole.parts) > 9 and all(tokens for _, tokens in whole.parts[:-1])
    for cut in cuts(len(whole.parts)):
        rest = await answer(engine, path, body, whole.tokens(cut))
        got = same(whole.data(cut) + rest.data())
        assert got == same(whole.data()), f"cut after {cut} parts"
        assert (engine.stores(id_of(body)) is Storing.ORIGINAL) is body.get("store", True)


async def test_a_response_in_the_background_is_made_to_its_end_from_what_was_made(
    engine: Any,
) -> None:
    """Its client has the id, and nothing else of it is sent. What is stored is compared."""
    path, body = response(background=True, stream=False)
    whole = await answer(engine, path, body)
    assert json.loads(whole.data())["status"] == "queued" and len(whole.parts) == 2
    told = unpack(whole.told)[0]
    assert len(told) > 16 and whole.output_tokens == 24
    due = json.loads(whole.copy)["response"]
    assert due["status"] in ("completed", "incomplete") and due["id"] == id_of(body)
    for made in (0, len(told) // 2, len(told)):
        rest = await answer(engine, path, body, pack(told[:made]))
        assert json.loads(rest.data()) == json.loads(whole.data())
        assert unpack(rest.told).get(0, []) == told[made:] and rest.output_tokens == 24
        assert same(rest.copy) == same(whole.copy), f"{made} tokens had been made"


@pytest.mark.parametrize("streams", [False, True])
async def test_what_is_given_up_of_a_response_in_the_background_is_shown_to_nobody(
    engine: Any, streams: bool
) -> None:
    path, body = response(background=True, stream=streams, max_output_tokens=900, ignore_eos=True)
    giving_up = asyncio.create_task(answer(engine, path, body))
    async with asyncio.timeout(60):
        while engine.stores(id_of(body)) is Storing.NOT:
            await asyncio.sleep(0)
    giving_up.cancel()
    await asyncio.wait([giving_up])
    assert engine.stores(id_of(body)) is Storing.NOT


async def test_the_copy_of_a_response_is_all_that_another_worker_needs(engine: Any) -> None:
    path, body = response(instructions="Speak.")
    first = await answer(engine, path, body)
    more = {"input": "And?", "previous_response_id": id_of(body)}
    path, further = response(**more)
    due = await answer(engine, path, further)
    assert due.status == 200
    forget_responses(engine)
    assert engine.stores(id_of(body)) is Storing.NOT
    assert (await answer(engine, path, further)).status == 404
    engine.keep_copy(id_of(body), b'{"response": {}, "messages": []}')
    assert engine.stores(id_of(body)) is Storing.NOT
    engine.keep_copy(id_of(body), first.copy)
    assert engine.stores(id_of(body)) is Storing.COPY
    again = await answer(engine, path, further)
    assert same(again.data()) == same(due.data())
    sent = Sent()
    kept = EngineRequest(f"{RESPONSES}/{id_of(body)}", "get", b"", None, method="GET")
    await engine.serve(kept, sent)
    assert json.loads(sent.data()) == json.loads(first.copy)["response"]


def forget_responses(engine: Any) -> None:
    """As if another worker had made them."""
    serving = engine._app.state.openai_serving_responses
    serving.response_store.clear()
    serving.msg_store.clear()


async def test_of_an_event_in_pieces_the_last_one_has_the_tokens(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the event would come again, to a client that has a part of it."""
    monkeypatch.setattr("worker.engine.vllm.app.app_answer.PIECE_BYTES", 512)
    path, body = response(stream=True)
    whole = await answer(engine, path, body)
    *before, last = whole.parts
    assert last[1] and not before[-1][1] and b"response.completed" in before[-1][0] + last[0]
    for cut in range(1, len(whole.parts)):
        if all(tokens for _, tokens in whole.parts[:cut]):
            rest = await answer(engine, path, body, whole.tokens(cut))
            assert same(whole.data(cut) + rest.data()) == same(whole.data()), f"cut after {cut}"


async def test_a_response_in_the_background_that_cannot_go_on_does_not_hang(engine: Any) -> None:
    path, body = response(background=True, stream=True)
    whole = await answer(engine, path, body)
    made = unpack(whole.tokens(9))[0]
    path, body = response(background=True, stream=True, temperature=1.0, seed=3)
    async with asyncio.timeout(30):
        with pytest.raises(CannotContinue):
            await answer(engine, path, body, pack(made))


async def test_a_response_that_is_sent_whole_goes_on_too(engine: Any) -> None:
    path, body = response(stream=False)
    whole = await answer(engine, path, body)
    told = unpack(whole.told)[0]
    rest = await answer(engine, path, body, pack(told[: len(told) // 2]))
    assert same(rest.data()) == same(whole.data())


# ---- with parsers --------------------------------------------------------------------------------


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def parsing(
    vllm_environment: None, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Any]:
    """An engine that parses tool calls and reasoning."""
    more = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes"}
    engine = await start_engine(tmp_path_factory.mktemp("parsing"), **more)
    yield engine
    await engine.stop()


CALL = (
    r'<tool_call>\n\{"name": "weather", "arguments": '
    r'\{"name": "[a-z ]{12}", "age": 7\}\}\n</tool_call>'
)
"""The tokens of a model that calls the tool by itself, as the parser expects them."""
CALLED = chat(tools=[TOOL], tool_choice="auto", structured_outputs={"regex": CALL}, max_tokens=99)
PARSED = {
    "a tool that is called": CALLED,
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
    if case == "a tool that is called":
        assert json.loads(due[0]["tools"][0]["arguments"])["age"] == 7 and not due[0]["text"]
    for cut in cuts(len(whole.parts)):
        rest = await answer(parsing, path, body, whole.tokens(cut))
        assert heard(whole.data(cut) + rest.data()) == due, f"cut after {cut} parts"


async def test_tools_that_are_called_in_an_answer_that_is_sent_whole_move_as_well(
    parsing: Any,
) -> None:
    path, body = CALLED
    body = body | {"stream": False}
    whole = await answer(parsing, path, body)
    due, told = json.loads(whole.data()), unpack(whole.told)[0]
    assert due["choices"][0]["finish_reason"] == "tool_calls" and len(told) > 16
    for made in (16, len(told)):
        found = json.loads((await answer(parsing, path, body, pack(told[:made]))).data())
        for one in (due, found):
            one["choices"][0]["message"]["tool_calls"][0]["id"] = "random"
        assert found == due, f"{made} tokens had been made"


async def test_the_ids_of_a_response_s_tool_call_move_along(parsing: Any) -> None:
    tool = {"type": "function", **TOOL["function"]}
    path, body = response(tools=[tool], tool_choice="required", max_output_tokens=70)
    whole = await answer(parsing, path, body)
    assert b"response.function_call_arguments.delta" in whole.data()
    for cut in cuts(len(whole.parts)):
        rest = await answer(parsing, path, body, whole.tokens(cut))
        assert same(whole.data(cut) + rest.data()) == same(whole.data()), f"cut after {cut} parts"


# ---- an engine of its own, as it is killed -------------------------------------------------------


async def test_a_dead_engine_breaks_the_stream_without_a_word_to_the_client(
    tmp_path: Path,
) -> None:
    with worker_environment():
        engine = await start_engine(tmp_path)
    written = Written()
    call = EngineRequest(
        CHAT, "last", json.dumps(plain_chat(max_tokens=900, ignore_eos=True)).encode(), None
    )
    task = asyncio.create_task(engine.serve(call, written))
    async with asyncio.timeout(30):
        await written.first.wait()
        assert engine._processes.pids
        for pid in engine._processes.pids:
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(EngineFailure):
            await task
        with pytest.raises(EngineFailure):
            await serve_plain(engine, plain_chat())
    assert b'"error"' not in written.data and b"[DONE]" not in written.data
    await engine.stop()
