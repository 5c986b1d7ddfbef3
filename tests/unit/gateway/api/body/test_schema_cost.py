"""Schemas whose grammar would hold up everybody else's are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.api.body.schema import JSON_TYPE, parse_body_fields, read_fields
from shared.api_endpoints import ENDPOINTS
from shared.errors import BodyTooLarge, InvalidRequest


def counted(count: int, **bounds: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"a{i}": {} for i in range(count)}, **bounds}


def lengths(count: int) -> dict[str, Any]:
    return {"properties": {f"a{i}": {"type": "string", "maxLength": i} for i in range(count)}}


COSTLY = [
    counted(300, minProperties=1),
    counted(300, maxProperties=10),
    {"$defs": {f"d{i}": counted(30, minProperties=1) for i in range(3)}},
    lengths(33),
    {"anyOf": [{"type": "number", "minimum": -1e300 + i, "maximum": 1e300} for i in range(20)]},
    {"maximum": 10**400},
    counted(501),
    {"properties": {f"a{i}": counted(300) for i in range(3)}},
    {**counted(600), "required": [f"a{i}" for i in range(90)]},
    {"anyOf": [{"type": "string", "format": "uri"} for _ in range(201)]},
    {"type": "string", "pattern": "(a|b)*" * 300},
    {"properties": {f"a{i}": {"pattern": "a?" * 100} for i in range(10)}},
]
CHEAP = [
    counted(300),
    {**counted(900), "required": [f"a{i}" for i in range(900)]},
    {"properties": {f"a{i}": {"pattern": "^(a|b)*c?$"} for i in range(300)}},
    {"properties": {"format": {"type": "string"}, "required": {}, "properties": {}}},
    counted(300, maxProperties=2),
    counted(50, minProperties=1),
    lengths(32),
    {"properties": {f"a{i}": {"maxLength": 255, "minimum": 0} for i in range(500)}},
    {"properties": {"minProperties": {"type": "integer"}, "x": {"maxProperties": "no number"}}},
]


def bodies(schema: dict[str, Any]) -> list[bytes]:
    named = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    plain = json.dumps({"prompt": "x", "response_format": named})
    return [
        plain.encode(),
        plain.replace("Properties", r"\u0050roperties").replace("Length", r"\u004cength").encode(),
        json.dumps({"structured_outputs": {"json": schema}}).encode(),
        json.dumps({"structured_outputs": {"json": json.dumps(schema)}}).encode(),
        json.dumps({"text": {"format": {"type": "json_schema", "schema": schema}}}).encode(),
    ]


@pytest.mark.parametrize("schema", COSTLY, ids=lambda s: str(s)[:40])
def test_a_schema_that_takes_long_is_refused_wherever_it_stands(schema: dict[str, Any]) -> None:
    for body in bodies(schema):
        with pytest.raises(InvalidRequest):
            parse_body_fields(body)


@pytest.mark.parametrize("schema", CHEAP, ids=lambda s: str(s)[:40])
def test_a_schema_of_usual_size_passes(schema: dict[str, Any]) -> None:
    for body in bodies(schema):
        parse_body_fields(body)


def with_tools(schema: dict[str, Any], choice: Any, strict: Any) -> list[bytes]:
    """A chat, a response (also with a namespace) and a message."""
    function = {"name": "f", "parameters": schema, "strict": strict}
    forms: list[dict[str, Any]] = [
        {"type": "function", "function": function},
        {"type": "function", **function},
        {"type": "namespace", "name": "n", "tools": [{"type": "function", **function}]},
        {"name": "f", "input_schema": schema, "strict": strict},
    ]
    return [json.dumps({"tools": [{}, form], "tool_choice": choice}).encode() for form in forms]


DEMANDED = [
    "required",
    {"type": "any"},
    {"type": "tool", "name": "auto"},
    {"function": {"name": "auto"}},
]
LEFT_OPEN = [None, "auto", "none", {"type": "auto"}, {"type": "none"}]


@pytest.mark.parametrize("schema", COSTLY, ids=lambda s: str(s)[:40])
def test_a_schema_that_takes_long_is_refused_in_tools_that_are_strict_or_demanded(
    schema: dict[str, Any],
) -> None:
    for choice, strict in [(c, True) for c in LEFT_OPEN] + [(c, None) for c in DEMANDED]:
        for body in with_tools(schema, choice, strict):
            with pytest.raises(InvalidRequest, match="`tools`"):
                parse_body_fields(body)


@pytest.mark.parametrize("choice", LEFT_OPEN)
def test_a_schema_of_tools_that_becomes_no_grammar_passes(choice: Any) -> None:
    for strict in (None, False):
        for body in with_tools(COSTLY[0], choice, strict):
            parse_body_fields(body)


@pytest.mark.parametrize("choice", DEMANDED)
def test_a_usual_schema_of_tools_that_are_demanded_passes(choice: Any) -> None:
    for body in with_tools(CHEAP[0], choice, True):
        parse_body_fields(body)


@pytest.mark.parametrize("regex", ["a{0000000000100000}", "(a{000000000010000}b){00000000010000}"])
def test_zeros_before_a_number_of_repetitions_do_not_hide_it(regex: str) -> None:
    with pytest.raises(InvalidRequest, match="repeats"):
        parse_body_fields(json.dumps({"structured_outputs": {"regex": regex}}).encode())


EMPTY = ["a*", "a?", "(|a)", "(a|)", "(a||b)", '"a"* ', "a\\u002a", "[^a]*"]


@pytest.mark.parametrize("part", EMPTY)
@pytest.mark.parametrize("field", ["regex", "grammar"])
def test_many_parts_that_may_be_empty_are_refused_and_a_few_pass(part: str, field: str) -> None:
    def asked(count: int) -> bytes:
        given = {"prompt": "x", "structured_outputs": {field: part * count}}
        return json.dumps(given).encode().replace(b"\\\\u", b"\\u")

    parse_body_fields(asked(100))
    with pytest.raises(InvalidRequest, match="may be empty"):
        parse_body_fields(asked(300))


@pytest.mark.parametrize("depth", range(3))
def test_escapes_do_not_hide_repetitions(depth: int) -> None:
    hidden = r"\u007b1,999\u007d"
    for _ in range(depth):
        hidden = hidden.replace("\\", r"\u005c")
    regex = f"((a{hidden}){hidden})"
    body = '{"prompt":"x","structured_outputs":{"regex":"' + regex + '"}}'
    with pytest.raises(InvalidRequest):
        parse_body_fields(body.encode())


def test_what_is_no_number_is_not_written_out_level_by_level() -> None:
    schema: Any = {"minLength": 1}
    for _ in range(400):
        schema = {"minLength": schema, "a": "x" * 100}
    for body in bodies(schema)[:1]:
        parse_body_fields(body)


def test_an_escaped_name_does_not_hide_that_texts_are_asked_for() -> None:
    text = b'{"model":"m","return_token_str\\u0073":1,"prompt":"%b"}' % (b"a" * (128 << 10))
    with pytest.raises(BodyTooLarge, match="at most 131072 bytes"):
        read_fields(ENDPOINTS["/tokenize"], JSON_TYPE, text)
