"""Shell. The fields that the gateway reads on each path, beside vLLM's own classes for the path's
requests: the same fields, and no value is refused that vLLM takes, or read otherwise.
"""

from __future__ import annotations

import functools
import importlib
import json
import math
import re
import typing
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from gateway.api.body.bounds import Bounds
from gateway.api.body.multipart import READ
from gateway.api.body.schema import ALL_FIELDS, JSON_TYPE, MAX_MODEL_CHARACTERS, read_fields
from shared.api_endpoints import ENDPOINTS, ModelIn
from shared.errors import InvalidRequest
from tests.conformance.cases import FORMS
from tests.engine.in_process import worker_environment

ROUTERS = (
    "anthropic",
    "openai.chat_completion",
    "openai.completion",
    "openai.responses",
    "pooling.classify",
    "pooling.embed",
    "pooling.pooling",
    "pooling.scoring",
    "serve.tokenize",
    "speech_to_text.transcription",
    "speech_to_text.translation",
)
HI = [{"role": "user", "content": "hi"}]
ENOUGH: dict[str, tuple[dict[str, Any], ...]] = {
    "/v1/chat/completions": ({"messages": HI},),
    "/v1/completions": ({"prompt": "hi"},),
    "/v1/responses": ({"input": "hi"},),
    "/v1/messages": ({"messages": HI, "max_tokens": 5},),
    "/v1/messages/count_tokens": ({"messages": HI},),
    "/tokenize": ({"prompt": "hi"}, {"messages": HI}),
    "/detokenize": ({"tokens": [1]},),
    "/v1/embeddings": ({"input": "hi"}, {"messages": HI}),
    "/v2/embed": ({"texts": ["hi"]},),
    "/score": ({"text_1": "a", "text_2": "b"}, {"queries": "a", "items": "b"}),
    "/v1/score": ({"queries": "a", "documents": "b"}, {"data_1": "a", "data_2": "b"}),
    "/rerank": ({"query": "a", "documents": ["b"]},),
    "/v1/rerank": ({"query": "a", "documents": ["b"]},),
    "/v2/rerank": ({"query": "a", "documents": ["b"]},),
    "/classify": ({"input": "hi"}, {"messages": HI}),
    "/pooling": ({"input": "hi"}, {"messages": HI}),
}
"""Requests with the least that each path takes."""

LEFT_UNREAD = """
add_generation_prompt add_special_tokens cache_salt chat_template continue_final_message
data dimensions echo embed_dtype embedding_types enable_response_messages
encoding_format endianness file frequency_penalty hotwords ignore_eos include include_reasoning
include_stop_str_in_output input_type instruction instructions language length_penalty logprobs
max_tokens_per_doc max_tokens_per_query max_tool_calls min_p mm_payload output_dimension padding
parallel_tool_calls presence_penalty prompt_cache_key prompt_embeds query
reasoning reasoning_effort repetition_penalty request_id return_mm_kwargs
return_prompt_text return_token_ids return_token_offsets
return_tokens_as_token_ids routed_experts_prompt_start seed service_tier session_id
skip_special_tokens spaces_between_special_tokens stop stop_sequences store
stream_continuous_usage_stats stream_include_usage stream_interval stream_options suffix task
temperature thinking thinking_token_budget timestamp_granularities to_language tokens
top_n top_p truncate truncate_prompt_tokens truncation truncation_side use_activation watermarking
"""
"""Fields of vLLM whose size and value cost no more than their bytes, so that nobody bounds them.
For a field that is in neither list, decide whether it must be bounded: gateway/api/body/bounds.py.
"""
MEANT_OTHERWISE = {
    ("/v2/embed", "max_tokens"),  # of the text that is embedded; -1: all
    # of the text that is heard
    *((f"/v1/audio/{what}s", "prompt") for what in ("transcription", "translation")),
}
"""Fields that bear the name of another one, and that the gateway does not read."""

BOUNDS = Bounds(processor_options=True)


@functools.cache
def classes_of() -> dict[str, tuple[Any, ...]]:
    """Path -> vLLM's classes for its requests."""
    found: dict[str, tuple[Any, ...]] = {}
    with worker_environment():
        for name in ROUTERS:
            router = importlib.import_module(f"vllm.entrypoints.{name}.api_router").router
            for route in router.routes:
                hints = typing.get_type_hints(route.endpoint, include_extras=True)
                if route.path in ENDPOINTS and "POST" in route.methods:
                    found[route.path] = tuple(c for hint in hints.values() for c in _models(hint))
    return found


def _models(hint: Any) -> Iterator[Any]:
    if hasattr(hint, "model_fields"):
        yield hint
    for part in typing.get_args(hint):
        yield from _models(part)


def fields_of(path: str) -> set[str]:
    return {name for kind in classes_of()[path] for name in kind.model_fields}


def vllm_takes(path: str, body: dict[str, Any]) -> list[Any]:
    """The body as each of vLLM's classes reads it that takes it."""
    taken = []
    for kind in classes_of()[path]:
        try:
            taken.append(kind.model_validate(body))
        except Exception:  # some of vLLM's validators fall over what is of no right type
            continue
    return taken


@pytest.mark.parametrize("path", ENDPOINTS)
def test_the_fields_of_a_path_are_those_of_vllms_own_class(path: str) -> None:
    there = {n for n in fields_of(path) & ALL_FIELDS if (path, n) not in MEANT_OTHERWISE}
    if ENDPOINTS[path].model_in is ModelIn.FORM:
        there &= {*READ}  # other fields of a form are few and short: see multipart.py
    assert ENDPOINTS[path].fields == there
    assert set(ENDPOINTS[path].limit_fields) <= there | {"max_completion_tokens"}


def test_every_field_of_vllm_is_read_or_known_to_need_no_bound() -> None:
    assert {n for path in ENDPOINTS for n in fields_of(path)} - ALL_FIELDS == set(
        LEFT_UNREAD.split()
    )


def test_no_field_is_read_that_no_path_has() -> None:
    assert frozenset().union(*(e.fields for e in ENDPOINTS.values())) == ALL_FIELDS


MORE_FORMS: dict[str, Any] = {
    "1": 1,
    "0.0": 0.0,
    "1.0": 1.0,
    "TRUE": "TRUE",
    "off": "off",
    "yes": "yes",
    "t": "t",
    "2": 2,
    "false": False,
    "1e1": 1e1,
    "text 1e3": "1e3",
    "+5": "+5",
    "5_0": "5_0",
    "5__0": "5__0",
    "_5": "_5",
    "5_0.0_0": "5_0.0_0",
    "many zeros": "0" * 30 + "5",
    "many zeros behind": "5." + "0" * 30,
    "05": "05",
    "٥": "٥",
    "5.": "5.",
    "5.00": "5.00",
    ".0": ".0",
    "-0": "-0",
    "\n5\t": "\n5\t",
    "spaced true": " true ",
    "list of 5": [5],
    "list of text": ["a"],
    "object of a text": {"a": "b"},
    "-5": -5,
    "2^40": 2**40,
    "2^63": 2**63,
    "-2^70": -(2**70),
    "long text": "a" * 2000,
}
VALUES = {**FORMS, **MORE_FORMS}


def beyond(name: str, value: Any) -> bool:
    """Whether vLLM may take a value that is refused here, because it is too large or too small: a
    whole number out of range, or a long name.
    """
    if isinstance(value, str) and not re.fullmatch(r"\s*[+-]?\d+(\.0*)?\s*", value):
        return name in ("model", "previous_response_id") and len(value) > MAX_MODEL_CHARACTERS
    if isinstance(value, (str, int, float)):
        return not -1 <= float(value) < 2**31 or (name not in _FROM_MINUS_ONE and float(value) < 0)
    return False


_FROM_MINUS_ONE = ("priority", "top_k", "top_logprobs", "prompt_logprobs")


@pytest.mark.parametrize("path", ENOUGH)
def test_what_vllm_takes_is_taken_and_read_as_vllm_reads_it(path: str) -> None:
    """All fields that are read on any path, on this one, missing and in each form."""
    endpoint, wrong = ENDPOINTS[path], []
    for enough in ENOUGH[path]:
        assert vllm_takes(path, {"model": "m", **enough}), "the request alone is right"
        for name in sorted(ALL_FIELDS - enough.keys()):
            for form, value in VALUES.items():
                body = {"model": "m", **enough, name: value}
                theirs = vllm_takes(path, body)
                try:
                    ours = getattr(
                        read_fields(endpoint, JSON_TYPE, json.dumps(body).encode(), BOUNDS), name
                    )
                except InvalidRequest as exc:
                    if name not in endpoint.fields or (theirs and not beyond(name, value)):
                        wrong.append((name, form, exc.message))
                    continue
                if theirs and ours is not None and not isinstance(ours, msgspec.Raw):
                    read = {getattr(t, name) for t in theirs if name in type(t).model_fields}
                    if name in endpoint.fields and ours not in read:
                        wrong.append((name, form, f"{ours!r} instead of {read}"))
    assert not wrong


@pytest.mark.parametrize("path", ENOUGH)
def test_a_field_that_a_path_does_not_have_is_not_looked_at(path: str) -> None:
    endpoint = ENDPOINTS[path]
    body = {"model": "m", **ENOUGH[path][0]}
    for name in sorted(ALL_FIELDS - endpoint.fields):
        for value in (5, "x", True, ["a"] * 5000, {"a": math.pi}):
            read = read_fields(
                endpoint, JSON_TYPE, json.dumps({**body, name: value}).encode(), BOUNDS
            )
            assert read == read_fields(endpoint, JSON_TYPE, json.dumps(body).encode(), BOUNDS)
