"""Which fields of a request are read, and which values are refused."""

from __future__ import annotations

import contextlib
import json
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.adapters.model_names import split_model
from gateway.api.body import schema
from gateway.api.models import model_card, model_list, nearest
from gateway.http.json_responses import error_body, error_event
from shared import errors
from shared.adapters.identity import MAX_NAME_LENGTH, AdapterKey
from shared.api_endpoints import ENDPOINTS, ErrorFamily
from shared.error_bodies import error_type
from shared.errors import from_refusal
from shared.link.messages import AdapterState, Tier

BASES = ["tiny", "Qwen/Qwen2.5-0.5B-Instruct", "org/sub/model"]


def refused(body: bytes) -> errors.InvalidRequest:
    with pytest.raises(errors.InvalidRequest) as caught:
        schema.parse_body_fields(body)
    return caught.value


# ---- parse_head ----------------------------------------------------------------------------------


def test_only_the_fields_of_the_head_are_read() -> None:
    body = (
        b'{"messages": [{"role": "user", "content": "hi"}], "model": "tiny:pirate", '
        b'"stream": true, "max_tokens": 5, "unknown": {"a": [1]}}'
    )
    head = schema.parse_body_fields(body)
    assert (head.model, head.stream, head.max_tokens, head.priority) == (
        "tiny:pirate",
        True,
        5,
        None,
    )


@pytest.mark.parametrize(
    "body",
    [b'{"model": "m"}', b'{"model": "m", "stream": null, "max_tokens": null, "priority": null}'],
)
def test_absent_and_null_fields_are_no_error(body: bytes) -> None:
    head = schema.parse_body_fields(body)
    assert not head.stream and head.max_tokens is None and head.priority is None


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{",
        b"nope",
        b'{"model": "m"} {}',
        b'{"model": "m",}',
        b'\xef\xbb\xbf{"model": "m"}',
        b'{"model": "m", "x": NaN}',
        b"\x00",
    ],
)
def test_what_is_not_json_is_said_to_be_no_json(body: bytes) -> None:
    error = refused(body)
    assert error.param is None and "not valid JSON" in error.message


@pytest.mark.parametrize("body", [b"[]", b"null", b"3", b'"model"', b"true", b'[{"model": "m"}]'])
def test_json_that_is_no_object_is_refused_without_a_param(body: bytes) -> None:
    assert refused(body).param is None


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"model": 3}', "model"),
        (b'{"model": ["m"]}', "model"),
        (b'{"model": "m", "stream": "maybe"}', "stream"),
        (b'{"model": "m", "stream": 2}', "stream"),
        (b'{"model": "m", "max_tokens": "five"}', "max_tokens"),
        (b'{"model": "m", "max_tokens": -1}', "max_tokens"),
        (b'{"model": "m", "max_tokens": 1e308}', "max_tokens"),
        (b'{"model": "m", "max_tokens": 1' + b"0" * 400 + b"}", "max_tokens"),
        (b'{"model": "m", "max_tokens": "1' + b"0" * 400 + b'"}', "max_tokens"),
        (b'{"model": "m", "n": 1000000000000}', "n"),
        (b'{"model": "m", "priority": -9999999999}', "priority"),
        (b'{"model": "m", "max_tokens": 1.5}', "max_tokens"),
        (b'{"model": "m", "max_tokens": 1e999}', "max_tokens"),
        (b'{"model": "m", "max_completion_tokens": {}}', "max_completion_tokens"),
        (b'{"model": "m", "priority": []}', "priority"),
        (b'{"model": "m", "max_tokens": ' + b"9" * 5000 + b"}", "max_tokens"),
    ],
)
def test_a_field_of_the_wrong_type_is_named(body: bytes, param: str) -> None:
    assert refused(body).param == param


@pytest.mark.parametrize(
    ("path", "field", "forms"),
    [
        ("/tokenize", "stream", ['"x"', "true", "3"]),
        ("/v1/messages", "priority", ['"x"', "5", "[]"]),
        ("/v1/completions", "max_completion_tokens", ['"x"', "5", "-1"]),
        ("/v1/embeddings", "n", ["1000", '"x"']),
        ("/v1/responses", "max_tokens", ['"x"', "5"]),
        ("/v1/messages", "user", ['"ann"', "7"]),
        ("/v2/embed", "max_tokens", ["-1", "5"]),
    ],
)
def test_a_field_that_a_path_does_not_have_is_not_read(
    path: str, field: str, forms: list[str]
) -> None:
    """As vLLM, which ignores it. tests/engine/requests/test_request_fields.py has all of them."""
    alone = schema.read_fields(ENDPOINTS[path], schema.JSON_TYPE, b'{"model": "m", "top_k": "5"}')
    for form in forms:
        for more in ("5", '"5"'):  # read at once, and with another form of a number beside it
            body = f'{{"model": "m", "top_k": {more}, "{field}": {form}}}'.encode()
            assert schema.read_fields(ENDPOINTS[path], schema.JSON_TYPE, body) == alone


@pytest.mark.parametrize("key", [b"model", b"mod\\u0065l"])
def test_of_duplicate_keys_the_last_one_counts_as_for_the_worker(key: bytes) -> None:
    body = b'{"model": "a", "' + key + b'": "b"}'
    assert schema.parse_body_fields(body).model == json.loads(body)["model"] == "b"


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "m", "x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        b'{"model": "m", "x": ' + b'{"a":' * 200_000,
        b"[" * 200_000,
    ],
)
def test_a_bottomless_body_is_refused(body: bytes) -> None:
    refused(body)


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "\xff"}',
        b'{"model": "\xed\xa0\x80"}',
        b'{"model": "\\ud800"}',
        b'{"model": "\\ud800x"}',
    ],
)
def test_a_model_that_is_no_unicode_text_is_refused(body: bytes) -> None:
    refused(body)


@pytest.mark.parametrize(
    "field", ["structured_outputs", "logit_bias", "tools", "documents", "messages", "input"]
)
def test_a_name_that_is_no_text_is_refused_wherever_a_field_is_looked_into(field: str) -> None:
    inside = b'{"\xff": 1' + b', "a": [1, 2]' * 3000 + b"}"
    for value in (inside, b"[" + inside + b"]"):
        body = b'{"model": "m", "x": "%b", "%b": %b}' % (b"a" * 3000, field.encode(), value)
        with contextlib.suppress(errors.InvalidRequest):
            schema.parse_body_fields(body)
    if field in ("structured_outputs", "logit_bias"):
        refused(b'{"model": "m", "x": "%b", "%b": %b}' % (b"a" * 3000, field.encode(), inside))


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_a_head_or_an_invalid_request(body: bytes) -> None:
    try:
        head = schema.parse_body_fields(body)
    except errors.InvalidRequest as exc:
        error_body(exc)
    else:
        assert head.model is None or isinstance(head.model, str)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
fields = st.sampled_from(
    ["model", "stream", "max_tokens", "max_completion_tokens", "priority", "messages", "modelx"]
)


@given(st.lists(st.tuples(fields, json_values), max_size=6))
def test_arbitrary_json_is_a_head_or_an_invalid_request_that_can_be_answered(
    pairs: list[tuple[str, object]],
) -> None:
    body = ("{" + ",".join(f"{json.dumps(k)}:{json.dumps(v)}" for k, v in pairs) + "}").encode()
    try:
        head = schema.parse_body_fields(body)
    except errors.InvalidRequest as exc:
        assert exc.param is None or exc.param in schema.BodyFields.__struct_fields__
        error_body(exc)
    else:
        assert head.model == json.loads(body).get("model")


@given(st.binary(max_size=40), st.integers(0, 60))
def test_a_body_with_a_broken_middle_is_a_head_or_an_invalid_request(junk: bytes, at: int) -> None:
    good = b'{"model": "tiny:pirate", "stream": true, "messages": [{"role": "user"}]}'
    try:
        schema.parse_body_fields(good[:at] + junk + good[at:])
    except errors.InvalidRequest as exc:
        error_body(exc)


# ---- split_model ---------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    "adapter", [None, "pirate", "team/pirate-v1.2", "_x", "7", "a.b", "a" * MAX_NAME_LENGTH]
)
def test_a_model_name_is_a_base_or_a_base_and_an_adapter(base: str, adapter: str | None) -> None:
    assert split_model(base if adapter is None else f"{base}:{adapter}", BASES) == (base, adapter)


@pytest.mark.parametrize(
    "model",
    [
        "",
        ":",
        ":pirate",
        "big",
        "big:pirate",
        "TINY",
        "tiny ",
        "tiny/",
        "org/sub",
        "org/sub/model/x",
        "tiny\n",
    ],
)
def test_an_unknown_base_is_a_model_not_found(model: str) -> None:
    with pytest.raises(errors.ModelNotFound) as caught:
        split_model(model, BASES)
    assert caught.value.param == "model" and caught.value.status == 404


@pytest.mark.parametrize(
    "adapter",
    [
        "",
        ".",
        "..",
        "a..b",
        "../x",
        "x/..",
        "x/../y",
        "/x",
        "x/",
        "x//y",
        ".x",
        "x/.y",
        "-x",
        "x ",
        "x\n",
        "x\\y",
        "x\0",
        "x\u200b",
        "x" * 201,
    ],
)
def test_an_adapter_outside_the_grammar_is_not_found(adapter: str) -> None:
    with pytest.raises(errors.AdapterNotFound) as caught:
        split_model(f"tiny:{adapter}", BASES)
    assert caught.value.param == "model" and caught.value.status == 404


@given(st.text(max_size=300))
def test_any_text_is_found_or_not_found_and_no_long_name_comes_back(model: str) -> None:
    try:
        base, adapter = split_model(model, BASES)
    except (errors.ModelNotFound, errors.AdapterNotFound) as exc:
        assert len(exc.message) < 600
    else:
        assert base in BASES and (adapter is None or ".." not in adapter.split("/"))


@given(st.text(alphabet=string.ascii_letters + "./-_:", max_size=30))
def test_an_accepted_adapter_name_stays_below_its_folder(adapter: str) -> None:
    try:
        split_model(f"tiny:{adapter}", BASES)
    except errors.AdapterNotFound:
        return
    assert (
        adapter
        and not adapter.startswith("/")
        and not any(part in ("", ".", "..") for part in adapter.split("/"))
    )


def test_a_gateway_with_many_bases_names_only_a_few() -> None:
    with pytest.raises(errors.ModelNotFound) as caught:
        split_model("x" * 10_000, [f"base-{i}" for i in range(1000)])
    assert len(caught.value.message) < 600


# ---- errors --------------------------------------------------------------------------------------

STATUSES = {
    errors.InvalidRequest: (400, "invalid_request_error"),
    errors.InvalidApiKey: (401, "authentication_error"),
    errors.RouteNotFound: (404, "not_found_error"),
    errors.ModelNotFound: (404, "not_found_error"),
    errors.AdapterNotFound: (404, "not_found_error"),
    errors.BodyTooLarge: (413, "invalid_request_error"),
    errors.InvalidAdapter: (422, "invalid_request_error"),
    errors.Overloaded: (503, "server_error"),
    errors.RateLimited: (429, "rate_limit_error"),
    errors.DeadlineExceeded: (504, "server_error"),
    errors.WorkerUnavailable: (503, "server_error"),
    errors.StoreUnavailable: (503, "server_error"),
    errors.EngineFailure: (500, "server_error"),
    errors.LoraplexError: (500, "server_error"),
    errors.ConfigError: (500, "server_error"),
}


@pytest.mark.parametrize("kind", STATUSES)
def test_every_error_has_its_status_and_a_body_in_the_shape_of_openai(
    kind: type[errors.LoraplexError],
) -> None:
    error = kind('quotes " and \\ and ü', param="model")
    status, type_ = STATUSES[kind]
    assert error.status == status
    body = json.loads(error_body(error))
    assert body == {
        "error": {"message": error.message, "type": type_, "param": "model", "code": kind.code}
    }


def test_an_error_without_a_param_says_null() -> None:
    assert json.loads(error_body(errors.Overloaded("busy")))["error"]["param"] is None


@pytest.mark.parametrize("status", [400, 405, 408, 411, 414, 415, 417, 431])
@pytest.mark.parametrize("family", ErrorFamily)
def test_what_the_client_did_wrong_is_never_called_the_servers_fault(
    status: int, family: ErrorFamily
) -> None:
    assert error_type(status, family) == "invalid_request_error"


def test_a_subclass_has_the_status_of_its_parent() -> None:
    class Special(errors.Overloaded):
        pass

    assert Special("x").status == 503


def test_an_error_in_a_stream_is_one_event_before_the_end_of_the_stream() -> None:
    first, second, rest = error_event(errors.EngineFailure("line one\nline two")).split(b"\n\n")
    assert json.loads(first.removeprefix(b"data: "))["error"]["message"] == "line one\nline two"
    assert second == b"data: [DONE]" and rest == b""


@pytest.mark.parametrize(
    "kind", [k for k in STATUSES if k not in (errors.LoraplexError, errors.ConfigError)]
)
def test_a_refusal_becomes_the_error_that_the_worker_named(
    kind: type[errors.LoraplexError],
) -> None:
    error = from_refusal(kind.code, "why")
    assert type(error) is kind and error.message == "why"


@pytest.mark.parametrize("code", ["", "no_such_code", "internal_error", "invalid_config"])
def test_a_refusal_that_nobody_knows_is_an_engine_failure(code: str) -> None:
    assert type(from_refusal(code, "why")) is errors.EngineFailure


# ---- models --------------------------------------------------------------------------------------


def test_a_model_list_holds_bases_and_adapters_with_their_parent() -> None:
    cards = [
        model_card("tiny", 5, context=64),
        model_card("tiny:pirate", 5, parent="tiny", root="pirate", digest="d1", context=64),
    ]
    listed = json.loads(model_list({"tiny": {"pirate": "d1"}}, 5, {"tiny": 64}))
    assert listed["data"] == cards
    assert listed["object"] == "list"
    assert listed["data"][0] == {
        "id": "tiny",
        "object": "model",
        "created": 5,
        "owned_by": "loraplex",
        "root": "tiny",
        "parent": None,
        "max_model_len": 64,
        "permission": cards[0]["permission"],
    }
    assert listed["data"][1]["parent"] == "tiny" and listed["data"][1]["root"] == "pirate"


def test_a_model_list_tells_the_state_and_the_nearest_tier_of_each_adapter() -> None:
    def of(tier: Tier) -> dict[AdapterKey, AdapterState]:
        return {
            ("a", "1"): AdapterState("a", "1", tier),
            ("old", "0"): AdapterState("old", "0", tier),
        }

    held: dict[str, list[tuple[str, dict[AdapterKey, AdapterState]]]] = {
        "tiny": [("h1", of(Tier.CPU)), ("h2", of(Tier.GPU))],
        "idle": [],
    }
    disks = [("h1", "tiny", ("b", "1")), ("gone", "tiny", ("c", "1")), ("h1", "idle", ("a", "1"))]
    names = {"a": "1", "b": "1", "c": "1", "old": "2", "alias": ""}
    places = {**nearest(held, disks), "down": None}
    listed = json.loads(
        model_list({"tiny": names, "down": {"a": "1"}, "else": {"a": "1"}}, 5, {}, places)
    )
    assert {m["id"]: (m.get("loraplex_state"), m.get("loraplex_tier")) for m in listed["data"]} == {
        "tiny": ("ready", None),
        "tiny:a": ("ready", "gpu"),
        "tiny:b": ("cold", "disk"),
        "tiny:c": ("cold", "remote"),
        "tiny:old": ("cold", "remote"),
        "tiny:alias": (None, None),
        "down": ("no_worker", None),
        "down:a": ("no_worker", None),
        "else": (None, None),
        "else:a": (None, None),
    }


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens", "n", "priority"])
@pytest.mark.parametrize("value", [b"1" + b"0" * 400, b"1" + b"0" * 308, b"-2147483648", b"9" * 19])
def test_numbers_that_arithmetic_cannot_bear_are_refused(field: str, value: bytes) -> None:
    with pytest.raises(errors.InvalidRequest) as caught:
        schema.parse_body_fields(b'{"model": "m", "%b": %b}' % (field.encode(), value))
    assert caught.value.param in (field, None)
