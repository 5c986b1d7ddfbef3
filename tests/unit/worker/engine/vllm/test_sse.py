"""Pure. The pieces of a plain stream make well-formed events, and only plain requests count as
plain.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.engine.vllm.sse import (
    DONE,
    chat_chunks,
    completion_chunks,
    escape,
    is_plain_chat,
    is_plain_completion,
)

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}
COMPLETION = {"model": "m", "prompt": "hi", "stream": True}
texts = st.text(st.characters(exclude_categories=["Cs"]))


def test_a_chat_stream_is_what_vllm_writes() -> None:
    c = chat_chunks("chatcmpl-1", 1700000000, "demo", "assistant", "vllm-0.32.0", False)
    head = (
        b"data: "
        b'{"id":"chatcmpl-1","object":"chat.completion.chunk","created":1700000000,'
        b'"model":"demo","choices":'
    )
    delta = b'[{"index":0,"delta":{"content":"a\\"b"},"logprobs":null,"finish_reason":'
    assert c.opening == (
        head + b'[{"index":0,"delta":{"role":"assistant","content":""},'
        b'"logprobs":null,"finish_reason":null}],'
        b'"prompt_token_ids":null,"prompt_text":null}\n\n'
    )
    assert c.before + escape('a"b') + c.after == head + delta + b'null,"token_ids":null}]}\n\n'
    ending = b'"stop","stop_reason":7,"token_ids":null}],"system_fingerprint":"vllm-0.32.0"}\n\n'
    assert c.last('a"b', "stop", 7) == head + delta + ending
    assert c.end(3, 4) == DONE == b"data: [DONE]\n\n"


def test_a_completion_stream_is_what_vllm_writes() -> None:
    c = completion_chunks("cmpl-1", 1700000000, "demo", None, True)
    head = (
        b"data: "
        b'{"id":"cmpl-1","object":"text_completion","created":1700000000,"model":"demo","choices":'
    )
    assert c.opening == b""
    after = (
        b',"logprobs":null,"finish_reason":null,"stop_reason":null,'
        b'"prompt_token_ids":null,"token_ids":null}]}\n\n'
    )
    assert c.before + escape("x") + c.after == head + b'[{"index":0,"text":"x"' + after
    assert (
        b'"finish_reason":"length","stop_reason":null,"prompt_token_ids":null,'
        b'"token_ids":null}]}\n\n' in c.last("x", "length", None)
    )
    assert (
        c.end(3, 4)
        == head
        + b'[],"usage":{"prompt_tokens":3,"total_tokens":7,"completion_tokens":4}}\n\n'
        + DONE
    )


@given(texts, texts, texts, texts, st.booleans())
def test_every_event_is_json_and_keeps_text_ids_and_names(
    text: str, request_id: str, model: str, stop: str, usage: bool
) -> None:
    for c, field in (
        (chat_chunks(request_id, 1, model, "assistant", None, usage), "delta"),
        (completion_chunks(request_id, 1, model, "f", usage), "text"),
    ):
        events = _events(
            c.opening + c.before + escape(text) + c.after + c.last(text, "stop", stop) + c.end(1, 2)
        )
        assert all(e["id"] == request_id and e["model"] == model for e in events)
        choices = [e["choices"][0] for e in events if e["choices"]]
        said = [c["delta"]["content"] if field == "delta" else c["text"] for c in choices]
        assert said[-2:] == [text, text] and choices[-1]["stop_reason"] == stop
        assert ("usage" in events[-1]) == usage


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"n": 1},
        {"n": None},
        {"stop": ["x"]},
        {"stream_options": {"include_usage": True}},
        {"logprobs": None},
    ],
)
def test_text_and_nothing_else_is_plain(more: dict[str, Any]) -> None:
    assert is_plain_chat(CHAT | more) and is_plain_completion(COMPLETION | more)


@pytest.mark.parametrize(
    "more",
    [
        {"stream": False},
        {"stream": None},
        {"stream": "true"},
        {"n": 2},
        {"echo": True},
        {"logprobs": 1},
        {"prompt_logprobs": 0},
        {"response_format": {"type": "text"}},
        {"return_token_ids": True},
        {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        {"stream_options": {"something_new": 1}},
        {"stream_options": "x"},
        {"stream_interval": 4},
        {"something_new": 0},
        {"tools": []},
        {"reasoning_effort": "low"},
        {"kv_transfer_params": {}},
        {"use_beam_search": True},
    ],
)
def test_anything_more_is_not_plain(more: dict[str, Any]) -> None:
    assert not is_plain_chat(CHAT | more) and not is_plain_completion(COMPLETION | more)


@pytest.mark.parametrize(
    ("prompt", "plain"),
    [
        ([1, 2], True),
        (["a", "b"], False),
        (["a"], False),
        ([[1], [2]], False),
        ([], False),
        (None, False),
    ],
)
def test_only_one_prompt_is_plain(prompt: object, plain: bool) -> None:
    assert is_plain_completion(COMPLETION | {"prompt": prompt}) is plain


def _events(data: bytes) -> list[dict[str, Any]]:
    assert data.endswith(DONE)
    lines = data.removesuffix(DONE).split(b"\n\n")
    assert lines.pop() == b"" and all(
        line.startswith(b"data: ") and b"\n" not in line for line in lines
    )
    return [json.loads(line[6:]) for line in lines]
