"""Pure. The requests that Loraplex and vLLM's own server are both asked: every endpoint, every
field in right and wrong forms, streamed and not.

A case has a name that is a path, an axis and a value. Nothing here is drawn by chance: a run can be
repeated, and a case can be asked alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import msgspec

BASE, ADAPTER, OTHER_ADAPTER, POOLING = "demo", "demo:pirate", "demo:haiku", "vectors"
HEARING = "ears"
QUESTION = "How does gravity work?"
SAID = [{"role": "user", "content": QUESTION}]
JSON = "application/json"
Fields = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Case:
    """One request. `pooling`: it is for the embedding model's server. `audio`: it is for that of
    the model that hears.
    """

    name: str
    path: str
    body: bytes
    method: str = "POST"
    headers: Mapping[str, str] = field(default_factory=lambda: {"Content-Type": JSON})
    pooling: bool = False
    audio: bool = False


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}
NAMED_SCHEMA = {"type": "json_schema", "json_schema": {"name": "one", "schema": SCHEMA}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
UNICODE = "Zażółć gęślą jaźń \U0001f3f4\u200d☠️ \u0000\u001f \u2028 العربية 日本語 \\n"

SAMPLING: dict[str, Fields] = {
    "nothing": {},
    "max_tokens": {"max_tokens": 3},
    "n": {"n": 2, "seed": 3, "temperature": 1},
    "n greedy": {"n": 2},
    "stop": {"stop": "a"},
    "stops": {"stop": ["the", "a", "."]},
    "stop empty list": {"stop": []},
    "stop empty text": {"stop": ""},
    "stop included": {"stop": "a", "include_stop_str_in_output": True},
    "stop_token_ids": {"stop_token_ids": [5, 6, 7, 8, 9, 10]},
    "min_tokens": {"min_tokens": 4},
    "min over max": {"min_tokens": 9, "max_tokens": 3},
    "ignore_eos": {"ignore_eos": True, "max_tokens": 6},
    "seed": {"seed": 7, "temperature": 1},
    "seed and top": {"seed": 7, "temperature": 0.8, "top_p": 0.9, "top_k": 20, "min_p": 0.01},
    "penalties": {"presence_penalty": 1, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
    "logit_bias": {"logit_bias": {"10": 100}},
    "logit_bias wrong": {"logit_bias": {"abc": 1}},
    "logit_bias unknown token": {"logit_bias": {"10000000": 1}},
    "bad_words": {"bad_words": ["a", "the"]},
    "allowed_token_ids": {"allowed_token_ids": [10, 11, 12]},
    "allowed_token_ids empty": {"allowed_token_ids": []},
    "allowed_token_ids unknown": {"allowed_token_ids": [10**7]},
    "special tokens": {"skip_special_tokens": False},
    "no spaces": {"spaces_between_special_tokens": False},
    "return_token_ids": {"return_token_ids": True},
    "tokens as ids": {"return_tokens_as_token_ids": True},
    "prompt_logprobs": {"prompt_logprobs": 1},
    "truncate": {"truncate_prompt_tokens": 4},
    "truncate all": {"truncate_prompt_tokens": -1},
    "truncate zero": {"truncate_prompt_tokens": 0},
    "beams": {"use_beam_search": True, "n": 2, "max_tokens": 4},
    "choice": {"structured_outputs": {"choice": ["yes", "no"]}},
    "regex": {"structured_outputs": {"regex": "[a-c]{2}"}},
    "json": {"structured_outputs": {"json": SCHEMA}},
    "grammar": {"structured_outputs": {"grammar": 'root ::= "a" | "b"'}},
    "grammar wrong": {"structured_outputs": {"grammar": "root ::= ("}},
    "two structures": {"structured_outputs": {"choice": ["a"], "regex": "b"}},
    "structure unknown": {"structured_outputs": {"nosuch": 1}},
    "json_object": {"response_format": {"type": "json_object"}},
    "json_schema": {"response_format": NAMED_SCHEMA},
    "json_schema without": {"response_format": {"type": "json_schema"}},
    "format text": {"response_format": {"type": "text"}},
    "format unknown": {"response_format": {"type": "nosuch"}},
    "user": {"user": "someone"},
    "unknown field": {"nosuch_field": {"a": [1, 2]}},
    "priority zero": {"priority": 0},
    "request_id": {"request_id": "mine"},
    "cache_salt": {"cache_salt": "salt"},
    "cache_salt empty": {"cache_salt": ""},
    "xargs": {"vllm_xargs": {"a": 1}},
    "stream_interval": {"stream_interval": 2},
    "too many tokens": {"max_tokens": 5000},
    "usage": {"stream_options": {"include_usage": True}},
    "usage all along": {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    "no usage": {"stream_options": {"include_usage": False}},
    "stream_options null": {"stream_options": None},
    "stream_options wrong": {"stream_options": 3},
}
"""Of chat and of completions."""

CHAT: dict[str, Fields] = {
    "max_completion_tokens": {"max_completion_tokens": 3, "max_tokens": None},
    "both limits": {"max_completion_tokens": 3, "max_tokens": 9},
    "logprobs": {"logprobs": True},
    "top_logprobs": {"logprobs": True, "top_logprobs": 3},
    "top_logprobs zero": {"logprobs": True, "top_logprobs": 0},
    "top_logprobs alone": {"top_logprobs": 3},
    "top_logprobs many": {"logprobs": True, "top_logprobs": 100},
    "top_logprobs all": {"logprobs": True, "top_logprobs": -2},
    "logprobs and ids": {"logprobs": True, "return_tokens_as_token_ids": True},
    "echo": {"echo": True, "add_generation_prompt": False},
    "no generation prompt": {"add_generation_prompt": False},
    "continue and prompt": {"continue_final_message": True},
    "continue": {
        "messages": [*SAID, {"role": "assistant", "content": "It is"}],
        "continue_final_message": True,
        "add_generation_prompt": False,
    },
    "chat_template": {"chat_template": "{{ messages[0].content }}"},
    "chat_template_kwargs": {"chat_template_kwargs": {"a": 1}},
    "documents": {"documents": [{"title": "t", "text": "x"}]},
    "return_prompt_text": {"return_prompt_text": True},
    "reasoning_effort": {"reasoning_effort": "low"},
    "reasoning_effort wrong": {"reasoning_effort": "nosuch"},
    "include_reasoning": {"include_reasoning": False},
    "parallel_tool_calls": {"parallel_tool_calls": False},
    "tools none": {"tools": [TOOL], "tool_choice": "none"},
    "tools auto": {"tools": [TOOL], "tool_choice": "auto"},
    "tools alone": {"tools": [TOOL]},
    "tools required": {"tools": [TOOL], "tool_choice": "required"},
    "tool named": {
        "tools": [TOOL],
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
    },
    "tool unknown": {
        "tools": [TOOL],
        "tool_choice": {"type": "function", "function": {"name": "nosuch"}},
    },
    "tool_choice alone": {"tool_choice": "auto"},
    "tool_choice wrong": {"tools": [TOOL], "tool_choice": "nosuch"},
    "tools empty": {"tools": []},
    "tool without name": {"tools": [{"type": "function", "function": {}}]},
    "tools wrong": {"tools": "weather"},
    "system": {"messages": [{"role": "system", "content": "Be brief."}, *SAID]},
    "developer": {"messages": [{"role": "developer", "content": "Be brief."}, *SAID]},
    "turns": {
        "messages": [*SAID, {"role": "assistant", "content": "By mass."}, *SAID],
    },
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}] * 2}]},
    "part without type": {"messages": [{"role": "user", "content": [{"text": "Hi"}]}]},
    "part unknown": {"messages": [{"role": "user", "content": [{"type": "nosuch"}]}]},
    "image": {"messages": [{"role": "user", "content": [IMAGE]}]},
    "unicode": {"messages": [{"role": "user", "content": UNICODE}]},
    "empty content": {"messages": [{"role": "user", "content": ""}]},
    "null content": {"messages": [{"role": "user", "content": None}]},
    "no content": {"messages": [{"role": "user"}]},
    "number content": {"messages": [{"role": "user", "content": 3}]},
    "no role": {"messages": [{"content": "a"}]},
    "number role": {"messages": [{"role": 3, "content": "a"}]},
    "role unknown": {"messages": [{"role": "nosuch", "content": "a"}]},
    "name": {"messages": [{"role": "user", "name": "Ann", "content": QUESTION}]},
    "tool turn": {
        "messages": [
            *SAID,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {
                        "id": "1",
                        "type": "function",
                        "function": {"name": "weather", "arguments": "{}"},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "1", "content": "sun"},
        ]
    },
    "tool_calls wrong": {"messages": [{"role": "assistant", "tool_calls": 3}]},
    "no messages": {"messages": []},
    "messages null": {"messages": None},
    "messages text": {"messages": "hello"},
    "messages of texts": {"messages": ["hello"]},
    "too long": {"messages": [{"role": "user", "content": "gravity " * 1500}]},
    "service_tier": {"service_tier": "auto"},
    "store": {"store": True, "metadata": {"a": "b"}},
    "thinking budget": {"thinking_token_budget": 5},
    "repetition": {"repetition_detection": {"max_pattern_size": 4, "min_count": 2}},
    "kv_transfer": {"kv_transfer_params": {"do_remote_decode": False}},
}

COMPLETION: dict[str, Fields] = {
    "prompts": {"prompt": ["Hello", "Bye"]},
    "prompts and n": {"prompt": ["Hello", "Bye"], "n": 2},
    "token ids": {"prompt": [10, 11, 12]},
    "lists of ids": {"prompt": [[10, 11], [12, 13]]},
    "unknown ids": {"prompt": [10**7]},
    "negative ids": {"prompt": [-1]},
    "no prompt": {"prompt": None},
    "empty prompt": {"prompt": ""},
    "empty list": {"prompt": []},
    "list of an empty text": {"prompt": [""]},
    "mixed list": {"prompt": ["a", 3]},
    "number prompt": {"prompt": 3},
    "object prompt": {"prompt": {"a": 1}},
    "unicode": {"prompt": UNICODE},
    "echo": {"echo": True},
    "echo of nothing": {"echo": True, "max_tokens": 0},
    "echo and logprobs": {"echo": True, "logprobs": 1},
    "echo of two": {"echo": True, "prompt": ["Hello", "Bye"]},
    "suffix": {"suffix": "end"},
    "logprobs": {"logprobs": 2},
    "logprobs zero": {"logprobs": 0},
    "logprobs many": {"logprobs": 100},
    "logprobs negative": {"logprobs": -3},
    "logprobs true": {"logprobs": True},
    "best_of": {"best_of": 2},
    "too long": {"prompt": "gravity " * 1500},
    "special": {"add_special_tokens": False},
    "embeds": {"prompt_embeds": "AAAA"},
    "no max_tokens": {"max_tokens": None, "stop": "a"},
}

FORMS: dict[str, Any] = {
    "5.0": 5.0,
    "text 5": "5",
    "text 5.0": "5.0",
    "text": "abc",
    "5.5": 5.5,
    "true": True,
    "list": [],
    "object": {},
    "null": None,
    "-1": -1,
    "0": 0,
    "huge": 10**30,
    "spaces": " 5 ",
    "empty": "",
}
"""Of a value where a number or a word is meant."""

CHAT_NUMBERS = (
    "max_tokens",
    "max_completion_tokens",
    "n",
    "seed",
    "temperature",
    "top_p",
    "top_k",
    "min_tokens",
    "top_logprobs",
    "prompt_logprobs",
    "presence_penalty",
    "stream",
    "logprobs",
    "ignore_eos",
    "priority",
)
COMPLETION_NUMBERS = ("max_tokens", "n", "logprobs", "echo", "best_of", "stream", "temperature")

RESPONSE: dict[str, Fields] = {
    "nothing": {},
    "instructions": {"instructions": "Be brief."},
    "turns": {"input": [{"role": "user", "content": QUESTION}]},
    "parts": {
        "input": [{"role": "user", "content": [{"type": "input_text", "text": QUESTION}]}],
    },
    "assistant turn": {
        "input": [
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": "By mass."},
            {"role": "user", "content": "More."},
        ]
    },
    "typed message": {"input": [{"type": "message", "role": "user", "content": "Hi"}]},
    "image": {
        "input": [
            {
                "role": "user",
                "content": [{"type": "input_image", "image_url": "data:image/png;base64,AAAA"}],
            }
        ]
    },
    "unicode": {"input": UNICODE},
    "empty input": {"input": ""},
    "no input": {"input": None},
    "number input": {"input": 3},
    "empty list": {"input": []},
    "too long": {"input": "gravity " * 1500},
    "limit": {"max_output_tokens": 3},
    "limit zero": {"max_output_tokens": 0},
    "limit negative": {"max_output_tokens": -1},
    "limit text": {"max_output_tokens": "abc"},
    "limit huge": {"max_output_tokens": 5000},
    "sampling": {"temperature": 0.7, "top_p": 0.9, "top_k": 10, "seed": 5},
    "temperature wrong": {"temperature": -1},
    "stop": {"stop": "a"},
    "penalties": {"presence_penalty": 1, "frequency_penalty": 1},
    "metadata": {"metadata": {"a": "b"}, "user": "someone"},
    "store false": {"store": False},
    "format": {"text": {"format": {"type": "json_schema", "name": "one", "schema": SCHEMA}}},
    "format object": {"text": {"format": {"type": "json_object"}}},
    "format wrong": {"text": {"format": {"type": "nosuch"}}},
    "tool": {"tools": [{"type": "function", "name": "weather", "parameters": SCHEMA}]},
    "tool none": {
        "tools": [{"type": "function", "name": "weather", "parameters": SCHEMA}],
        "tool_choice": "none",
    },
    "tool required": {
        "tools": [{"type": "function", "name": "weather", "parameters": SCHEMA}],
        "tool_choice": "required",
    },
    "logprobs": {"top_logprobs": 2, "include": ["message.output_text.logprobs"]},
    "logprobs alone": {"top_logprobs": 2},
    "logprobs many": {"top_logprobs": 100, "include": ["message.output_text.logprobs"]},
    "include unknown": {"include": ["nosuch"]},
    "reasoning": {"reasoning": {"effort": "low"}},
    "reasoning wrong": {"reasoning": {"effort": "nosuch"}},
    "truncation": {"truncation": "auto"},
    "truncation wrong": {"truncation": "nosuch"},
    "service_tier": {"service_tier": "default"},
    "parallel": {"parallel_tool_calls": False},
    "prompt_cache_key": {"prompt_cache_key": "k"},
    "background without store": {"background": True, "store": False},
    "prompt": {"prompt": {"id": "p"}},
    "unknown field": {"nosuch": 1},
    "structure": {"structured_outputs": {"choice": ["yes", "no"]}},
}

MESSAGE: dict[str, Fields] = {
    "nothing": {},
    "system": {"system": "Be brief."},
    "system parts": {"system": [{"type": "text", "text": "Be brief."}]},
    "turns": {"messages": [*SAID, {"role": "assistant", "content": "By mass."}, *SAID]},
    "prefilled": {"messages": [*SAID, {"role": "assistant", "content": "It is"}]},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]},
    "image": {
        "messages": [
            {
                "role": "user",
                "content": [
                    {
                        "type": "image",
                        "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"},
                    }
                ],
            }
        ]
    },
    "unicode": {"messages": [{"role": "user", "content": UNICODE}]},
    "no messages": {"messages": []},
    "messages null": {"messages": None},
    "role wrong": {"messages": [{"role": "nosuch", "content": "a"}]},
    "content number": {"messages": [{"role": "user", "content": 3}]},
    "too long": {"messages": [{"role": "user", "content": "gravity " * 1500}]},
    "no limit": {"max_tokens": None},
    "limit zero": {"max_tokens": 0},
    "limit negative": {"max_tokens": -1},
    "limit text": {"max_tokens": "abc"},
    "limit as text": {"max_tokens": "4"},
    "limit huge": {"max_tokens": 5000},
    "stop": {"stop_sequences": ["a"]},
    "stops": {"stop_sequences": ["the", "."]},
    "stop wrong": {"stop_sequences": "a"},
    "sampling": {"temperature": 0.5, "top_p": 0.9, "top_k": 1},
    "temperature wrong": {"temperature": -1},
    "top_k wrong": {"top_k": -5},
    "metadata": {"metadata": {"user_id": "someone"}},
    "tool": {
        "tools": [{"name": "weather", "input_schema": SCHEMA}],
        "tool_choice": {"type": "none"},
    },
    "tool auto": {"tools": [{"name": "weather", "input_schema": SCHEMA}]},
    "tool any": {
        "tools": [{"name": "weather", "input_schema": SCHEMA}],
        "tool_choice": {"type": "any"},
    },
    "tool wrong": {"tools": [{"name": "weather"}]},
    "tool turn": {
        "messages": [
            *SAID,
            {
                "role": "assistant",
                "content": [{"type": "tool_use", "id": "1", "name": "weather", "input": {"a": 1}}],
            },
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "1", "content": "sun"}],
            },
        ]
    },
    "thinking": {"thinking": {"type": "disabled"}},
    "thinking on": {"thinking": {"type": "enabled", "budget_tokens": 1024}},
    "thinking wrong": {"thinking": {"type": "enabled", "budget_tokens": 1}},
    "format": {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
    "format wrong": {
        "output_config": {"format": {"type": "json_schema", "schema": {"type": "nosuch"}}}
    },
    "unknown field": {"nosuch": 1},
}

TOKENIZE: dict[str, Fields] = {
    "prompt": {"prompt": QUESTION},
    "special": {"prompt": QUESTION, "add_special_tokens": False},
    "strings": {"prompt": QUESTION, "return_token_strs": True},
    "unicode": {"prompt": UNICODE, "return_token_strs": True},
    "empty": {"prompt": ""},
    "prompts": {"prompt": ["a", "b"]},
    "messages": {"messages": SAID},
    "messages bare": {"messages": SAID, "add_generation_prompt": False},
    "messages continued": {
        "messages": [*SAID, {"role": "assistant", "content": "It"}],
        "continue_final_message": True,
        "add_generation_prompt": False,
    },
    "messages with tools": {"messages": SAID, "tools": [TOOL]},
    "nothing": {},
    "number": {"prompt": 3},
    "long": {"prompt": "gravity " * 1500},
}
DETOKENIZE: dict[str, Fields] = {
    "tokens": {"tokens": [10, 11, 12]},
    "none": {"tokens": []},
    "unknown": {"tokens": [10**7]},
    "negative": {"tokens": [-1]},
    "text": {"tokens": "abc"},
    "texts": {"tokens": ["10", "11"]},
    "floats": {"tokens": [10.0, 11.5]},
    "nothing": {},
}

EMBED: dict[str, Fields] = {
    "text": {"input": "gravity"},
    "texts": {"input": ["gravity", "soup", ""]},
    "ids": {"input": [10, 11, 12]},
    "lists of ids": {"input": [[10, 11], [12]]},
    "messages": {"messages": SAID},
    "empty": {"input": ""},
    "empty list": {"input": []},
    "nothing": {},
    "number": {"input": 3},
    "base64": {"input": "gravity", "encoding_format": "base64"},
    "bytes": {"input": ["gravity", "soup"], "encoding_format": "bytes"},
    "bytes only": {"input": "gravity", "encoding_format": "bytes_only"},
    "format wrong": {"input": "gravity", "encoding_format": "nosuch"},
    "float16": {"input": "gravity", "encoding_format": "base64", "embed_dtype": "float16"},
    "dimensions": {"input": "gravity", "dimensions": 8},
    "dimensions wrong": {"input": "gravity", "dimensions": "abc"},
    "unknown ids": {"input": [10**7]},
    "too long": {"input": "gravity " * 1500},
    "truncated": {"input": "gravity " * 1500, "truncate_prompt_tokens": 16},
    "unicode": {"input": UNICODE},
    "user": {"input": "a", "user": "someone"},
}
OTHER_POOLING: dict[str, dict[str, Fields]] = {
    "/v2/embed": {
        "texts": {"texts": ["a", "b"], "input_type": "search_query"},
        "types": {"texts": ["a"], "embedding_types": ["float", "int8"]},
        "type wrong": {"texts": ["a"], "embedding_types": ["nosuch"]},
        "nothing": {},
    },
    "/pooling": {
        "text": {"input": "gravity"},
        "texts": {"input": ["gravity", "soup"]},
        "task": {"input": "gravity", "task": "embed"},
        "tokens": {"input": "gravity", "task": "token_embed"},
        "task wrong": {"input": "gravity", "task": "nosuch"},
        "nothing": {},
    },
    "/score": {
        "pair": {"text_1": "gravity", "text_2": "gravity"},
        "pairs": {"text_1": "gravity", "text_2": ["gravity", "soup"]},
        "many": {"text_1": ["a", "b"], "text_2": ["a", "b"]},
        "uneven": {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]},
        "nothing": {},
    },
    "/v1/score": {"pair": {"text_1": "gravity", "text_2": "soup"}},
    "/rerank": {"two": {"query": "gravity", "documents": ["soup", "gravity"]}},
    "/v1/rerank": {
        "two": {"query": "gravity", "documents": ["soup", "gravity"]},
        "top": {"query": "gravity", "documents": ["soup", "gravity"], "top_n": 1},
        "no documents": {"query": "gravity", "documents": []},
        "number": {"query": 3, "documents": ["a"]},
        "nothing": {},
    },
    "/v2/rerank": {
        "two": {"query": "gravity", "documents": ["soup", "gravity"], "return_documents": True}
    },
    "/tokenize": {"prompt": {"prompt": QUESTION}, "nothing": {}},
    "/detokenize": {"tokens": {"tokens": [10, 11]}},
    "/classify": {"text": {"input": "a"}},
    "/v1/chat/completions": {"chat": {"messages": SAID}},
}

BODIES: dict[str, tuple[bytes, dict[str, str]]] = {
    "empty": (b"", {"Content-Type": JSON}),
    "no JSON": (b"{", {"Content-Type": JSON}),
    "list": (b"[]", {"Content-Type": JSON}),
    "text": (b'"a"', {"Content-Type": JSON}),
    "null": (b"null", {"Content-Type": JSON}),
    "number": (b"3", {"Content-Type": JSON}),
    "twice": (b'{"model":"demo","model":"demo"}', {"Content-Type": JSON}),
    "not UTF-8": (b'{"model":"demo","x":"\xff\xfe"}', {"Content-Type": JSON}),
    "half a pair": (b'{"model":"demo","x":"\\ud800"}', {"Content-Type": JSON}),
    "form": (b"model=demo", {"Content-Type": "application/x-www-form-urlencoded"}),
    "plain text": (b'{"model":"demo"}', {"Content-Type": "text/plain"}),
    "json of a kind": (b'{"model":"demo"}', {"Content-Type": "application/problem+json"}),
    "charset": (b'{"model":"demo"}', {"Content-Type": "application/json; charset=utf-8"}),
    "capitals": (b'{"model":"demo"}', {"Content-Type": "Application/JSON"}),
    "no type": (b'{"model":"demo"}', {}),
}
CHAT_PATH, COMPLETION_PATH = "/v1/chat/completions", "/v1/completions"
RESPONSE_PATH, MESSAGE_PATH = "/v1/responses", "/v1/messages"
COUNT_PATH = "/v1/messages/count_tokens"
FEW_TOKENS = 8


def all_cases() -> list[Case]:
    """In a fixed order; names are unique."""
    cases = [*_fields(), *_forms(), *_models(), *_pooling(), *_http()]
    assert len({c.name for c in cases}) == len(cases)
    return cases


def some_cases(count: int) -> list[Case]:
    """A part of them with every endpoint in it: as many of each path in turn, spread over it."""
    by_path: dict[tuple[str, bool], list[Case]] = {}
    for case in all_cases():
        by_path.setdefault((case.path, case.pooling), []).append(case)
    turns = [iter(_spread(cases)) for cases in by_path.values()]
    found: list[Case] = []
    while turns and len(found) < count:
        turns = [turn for turn in turns if (got := list(islice(turn, 1))) and not found.extend(got)]
    return found[:count]


def _spread(cases: list[Case]) -> list[Case]:
    """The same ones, so that any beginning of them is from all over."""
    step = next(s for s in (7, 11, 13, 1) if len(cases) % s or s == 1)
    return [cases[i * step % len(cases)] for i in range(len(cases))]


def case(name: str, path: str, body: Fields, pooling: bool = False) -> Case:
    # a null stays: that is a form of its own
    return Case(f"{path} {name}", path, msgspec.json.encode(body), pooling=pooling)


def _asked(path: str, model: str) -> Fields:
    """A plain request of this path."""
    few: Fields = {"model": model, "temperature": 0}
    match path:
        case "/v1/chat/completions":
            return few | {"messages": SAID, "max_tokens": FEW_TOKENS}
        case "/v1/messages":
            return few | {"messages": SAID, "max_tokens": FEW_TOKENS}
        case "/v1/completions":
            return few | {"prompt": QUESTION, "max_tokens": FEW_TOKENS}
        case "/v1/responses":
            return few | {"input": QUESTION, "max_output_tokens": FEW_TOKENS}
        case "/v1/messages/count_tokens":
            return {"model": model, "messages": SAID}
        case _:
            return {"model": model}


def _fields() -> Iterator[Case]:
    tables = (
        (CHAT_PATH, SAMPLING | CHAT),
        (COMPLETION_PATH, SAMPLING | COMPLETION),
        (RESPONSE_PATH, RESPONSE),
        (MESSAGE_PATH, MESSAGE),
    )
    for path, table in tables:
        for i, (name, fields) in enumerate(table.items()):
            model = (BASE, ADAPTER, OTHER_ADAPTER)[i % 3]
            for stream in (False, True):
                body = _asked(path, model) | fields | ({"stream": True} if stream else {})
                yield case(name + " streamed" * stream, path, body)
    for name, fields in MESSAGE.items():
        if not {"max_tokens", "temperature", "top_k", "stop_sequences"} & {*fields}:
            yield case(name, COUNT_PATH, _asked(COUNT_PATH, ADAPTER) | fields)
    for path, table in (("/tokenize", TOKENIZE), ("/detokenize", DETOKENIZE)):
        for name, fields in table.items():
            for model in (BASE, ADAPTER):
                yield case(f"{name} of {model}", path, {"model": model} | fields)


def _forms() -> Iterator[Case]:
    for path, names in ((CHAT_PATH, CHAT_NUMBERS), (COMPLETION_PATH, COMPLETION_NUMBERS)):
        for name in names:
            more: Fields = {"logprobs": True} if name == "top_logprobs" else {}
            more |= {"seed": 1} if name == "temperature" else {}
            for form, value in FORMS.items():
                # msgspec writes no number of 31 digits
                body = msgspec.json.encode(_asked(path, ADAPTER) | more | {name: None})
                written = b"1" + b"0" * 30 if form == "huge" else msgspec.json.encode(value)
                body = body.replace(
                    b'"%b":null' % name.encode(), b'"%b":' % name.encode() + written
                )
                yield Case(f"{path} {name} = {form}", path, body)
    for path in (CHAT_PATH, COMPLETION_PATH):
        for word in ("NaN", "Infinity", "-Infinity", "1e400"):
            body = msgspec.json.encode(_asked(path, ADAPTER))
            body = body.replace(b'"temperature":0', b'"temperature":' + word.encode())
            yield Case(f"{path} temperature = {word}", path, body)


def _models() -> Iterator[Case]:
    paths = (
        CHAT_PATH,
        COMPLETION_PATH,
        RESPONSE_PATH,
        MESSAGE_PATH,
        COUNT_PATH,
        "/tokenize",
        "/detokenize",
    )
    for path in paths:
        plain = _asked(path, BASE)
        if path == "/tokenize":
            plain |= {"prompt": QUESTION}
        if path == "/detokenize":
            plain |= {"tokens": [10, 11]}
        for model in (BASE, ADAPTER, OTHER_ADAPTER, "nosuch", "demo:nosuch"):
            yield case(f"model {model}", path, plain | {"model": model})
        yield case("model a number", path, plain | {"model": 3})
        yield case("model a list", path, plain | {"model": []})
    for path in ("/v1/embeddings", "/classify", "/score", "/v1/rerank", "/v2/embed", "/pooling"):
        yield case("of a chat model", path, {"model": BASE, "input": "a"})


def _pooling() -> Iterator[Case]:
    for path, table in {"/v1/embeddings": EMBED, **OTHER_POOLING}.items():
        for name, fields in table.items():
            yield case(f"{name} (vectors)", path, {"model": POOLING} | fields, pooling=True)


def _http() -> Iterator[Case]:
    for path in (CHAT_PATH, COMPLETION_PATH, RESPONSE_PATH, MESSAGE_PATH, "/tokenize"):
        for name, (body, headers) in BODIES.items():
            yield Case(f"{path} body: {name}", path, body, headers=headers)
        for method in ("GET", "PUT", "DELETE", "PATCH"):
            yield Case(f"{path} {method}", path, b"", method)
    for path in ("/v1/models", "/v1/models/demo", "/v1/models/nosuch", "/v1/nosuch", "/nosuch"):
        yield Case(f"GET {path}", path, b"", "GET", {})
    for path in (CHAT_PATH, "/v1/models"):
        yield Case(f"{path} HEAD", path, b"", "HEAD", {})
    yield Case("/v1/responses/nosuch GET", "/v1/responses/nosuch", b"", "GET", {})
    yield Case("/v1/responses/nosuch/cancel", "/v1/responses/nosuch/cancel", b"")
    slash = msgspec.json.encode(_asked(CHAT_PATH, BASE))
    yield Case("/v1/chat/completions/ slash", CHAT_PATH + "/", slash)
