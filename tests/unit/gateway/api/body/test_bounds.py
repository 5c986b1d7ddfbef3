"""What one request may ask for, and what it costs to find that out."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from gateway.api.body import bounds, schema
from gateway.api.body.bounds import DEFAULT_BOUNDS, Bounds
from gateway.api.body.scan import MAX_TEXTS, MAX_VALUES, check_large_body
from gateway.api.body.schema import parse_body_fields
from shared.api_endpoints import ENDPOINTS, MOST_COUNTED_BYTES
from shared.errors import BodyTooLarge, InvalidRequest

HOLD_S = 0.05
"""No request may hold the event loop, or the interpreter, for longer."""
TEXT = 8 << 20


def body(fields: bytes) -> bytes:
    return b'{"model":"m",' + fields + b"}"


def held_s(call: Callable[[], object]) -> float:
    """The least CPU time of some calls: others use the same caches and cores."""
    took = []
    for _ in range(5):
        begun = time.thread_time()
        call()
        took.append(time.thread_time() - begun)
    return min(took)


def many(item: bytes, count: int) -> bytes:
    return b"[" + b",".join([item] * count) + b"]"


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens", "n", "min_tokens"])
@pytest.mark.parametrize(
    ("form", "value"),
    [(b"5", 5), (b"5.0", 5), (b'"5"', 5), (b'" 5.0 "', 5), (b"true", 1), (b"5e0", 5)],
)
def test_a_number_in_any_form_that_the_engine_takes_is_that_number(
    field: str, form: bytes, value: int
) -> None:
    assert getattr(parse_body_fields(body(b'"%b":%b' % (field.encode(), form))), field) == value


@pytest.mark.parametrize(
    ("form", "value"),
    [(b"1", True), (b"0.0", False), (b'"TRUE"', True), (b'"off"', False), (b'"y"', True)],
)
def test_a_flag_in_any_form_that_the_engine_takes_is_that_flag(form: bytes, value: bool) -> None:
    assert parse_body_fields(body(b'"stream":' + form)).stream is value


TEXT_PART = b'{"type":"text","text":"hi"}'
NUMBERS = [
    b"1" + b"0" * 400,
    b"1" + b"0" * 308,
    b"1e308",
    b"1e400",
    b"-1" + b"0" * 400,
    b'"1' + b"0" * 400 + b'"',
    b'"Infinity"',
    b'"nan"',
    b"9223372036854775808",
    b"4294967296.0",
    b"5.5",
    b"[]",
    b"{}",
    b'""',
    b'"0x10"',
]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(
    "field", ["max_tokens", "max_completion_tokens", "max_output_tokens", "n", "priority", "top_k"]
)
def test_a_number_that_arithmetic_does_not_stand_is_refused_by_name(
    field: str, number: bytes
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_body_fields(body(b'"%b":%b' % (field.encode(), number)))
    assert caught.value.param == field and len(caught.value.message) < 200


TOO_MUCH: dict[str, bytes] = {
    "n": b'"n":65',
    "prompts": b'"prompt":' + many(b'"a"', 65),
    "prompts of ids": b'"prompt":' + many(b"[1]", 65),
    "prompts times n": b'"n":33,"prompt":["a","b"]',
    "messages": b'"messages":' + many(b'{"role":"user","content":"hi"}', 2049),
    "empty messages": b'"messages":' + many(b"{}", 10_000),
    "tools": b'"tools":' + many(b"{}", 2000),
    "stop ids": b'"stop_token_ids":' + many(b"1", 2000),
    "bad words": b'"bad_words":' + many(b'"a"', 2000),
    "biases": b'"logit_bias":{%b}' % b",".join(b'"%d":1' % n for n in range(2000)),
    "choices": b'"structured_outputs":{"choice":%b}' % many(b'"c"', 1001),
    "schema": b'"response_format":{"x":"%b"}' % (b"a" * 70_000),
    "regex": b'"structured_outputs":{"regex":"(a{1,1000}){1,1000}"}',
    "deep regex": b'"structured_outputs":{"regex":"((((a{9}){9}){9}){9}){9}"}',
    "open regex": b'"structured_outputs":{"regex":"a{20000,}"}',
    "sizes of pictures": b'"mm_processor_kwargs":{"size":{"height":30000,"width":30000}}',
    "frames of a video": b'"media_io_kwargs":{"video":{"num_frames":-1}}',
    "tokens to pad a prompt to": b'"chat_template_kwargs":{"tokenize":true,"padding":"max_length"}',
    "escaped names": b'"chat_template_kwargs":{"a":{},"max\\u005flength":2000000000}',
    "pattern": b'"response_format":{"schema":{"pattern":"(ab{999}){999}"}}',
    "strict tools": b'"tools":[{"strict":true,"parameters":{"enum":["%b"]}}]' % (b"a" * 70_000),
    "demanded tools": b'"tool_choice":"required","tools":[{"function":{"parameters":{"x":"%b"}}}]'
    % (b"a" * 70_000),
    "pattern of a tool": b'"tools":[{"strict":true,"parameters":{"pattern":"(ab{999}){999}"}}]',
    "tools of a namespace": b'"tools":[{"tools":%b}]' % many(b"{}", 2000),
    "tools of namespaces": b'"tools":' + many(b'{"tools":%b}' % many(b"{}", 100), 20),
    "inputs": b'"input":' + many(b'"a"', 2049),
    "parts": b'"messages":[{"role":"user","content":%b}]' % many(TEXT_PART, 3073),
    "parts of many messages": b'"messages":'
    + many(b'{"role":"user","content":%b}' % many(TEXT_PART, 2), 1537),
    "tool calls": b'"messages":[{"role":"assistant","tool_calls":%b}]' % many(b"{}", 3073),
    "messages of conversations": b'"messages":'
    + many(many(b'{"role":"user","content":"hi"}', 100), 40),
    "parts of conversations": b'"input":[[{"role":"user","content":%b}]]' % many(TEXT_PART, 3073),
    "names that are no text": b'"messages":[{"\xff":%b}]' % many(b"1", 5000),
}


@pytest.mark.parametrize("kind", TOO_MUCH)
def test_what_one_request_may_ask_for_is_bounded(kind: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_body_fields(body(TOO_MUCH[kind]))
    assert caught.value.param and len(caught.value.message) < 300


ENOUGH: dict[str, bytes] = {
    "n": b'"n":64',
    "a prompt of ids": b'"prompt":' + many(b"17", 100_000),
    "messages": b'"messages":' + many(b'{"role":"user","content":"hi"}', 2048),
    "messages of a part": b'"messages":'
    + many(b'{"role":"user","content":%b}' % many(TEXT_PART, 2), 1536),
    "many commas": b'"messages":[{"role":"user","content":"%b"}]' % (b"a," * 10_000),
    "patterns beside each other": b'"response_format":{"a":"[a-z]{1,64}","b":"(x{2,30}){9}"}',
    "escaped brackets": b'"structured_outputs":{"regex":"\\\\(a\\\\){1,500}"}',
    "tools that the engine does not hold to their schemas": b'"tool_choice":"auto","tools":'
    + many(b'{"function":{"strict":false,"parameters":{"x":"%b"}}}' % (b"a" * 5000), 100),
    "tools with long descriptions": b'"tool_choice":{"type":"any"},"tools":'
    + many(b'{"name":"f","description":"%b","input_schema":{}}' % (b"a" * 5000), 100),
    "inputs of ids": b'"input":' + many(many(b"17", 1000), 100),
    "conversations": b'"messages":' + many(many(b'{"role":"user","content":"hi"}', 10), 200),
    "an input of ids": b'"input":' + many(b"17", 100_000),
    "no sizes of pictures": b'"mm_processor_kwargs":{ },"media_io_kwargs":null',
    "arguments of a template": b'"chat_template_kwargs":{"thinking":false,"x":{"padding":1}}',
    "no arguments of a template": b'"chat_template_kwargs":null',
    "no list at all": b'"messages":7,"prompt":{},"stop_token_ids":"x","logit_bias":[1]',
}


@pytest.mark.parametrize("kind", ENOUGH)
def test_what_people_ask_for_is_not(kind: str) -> None:
    parse_body_fields(body(ENOUGH[kind]))


def test_bounds_are_those_of_the_config() -> None:
    parse_body_fields(body(TOO_MUCH["sizes of pictures"]), Bounds(processor_options=True))
    parse_body_fields(body(b'"n":100'), Bounds(max_sequences=100))
    with pytest.raises(InvalidRequest):
        parse_body_fields(body(b'"n":3'), Bounds(max_sequences=2))


# ---- large bodies --------------------------------------------------------------------------------

MIB = 1 << 20
LARGE: dict[str, Callable[[], bytes]] = {
    "empty objects": lambda: body(b'"x":' + many(b"{}", 8_000_000)),
    "numbers": lambda: body(b'"x":' + many(b"1", 12_000_000)),
    "quotes": lambda: body(b'"x":"%b"' % (b'\\"' * 12_000_000)),
    "messages": lambda: body(b'"messages":' + many(b'{"role":"user","content":"hi"}', 300_000)),
    "text": lambda: body(b'"messages":[{"content":"%b"}]' % (b"a " * 12_000_000)),
    "line ends": lambda: body(b'"prompt":"%b"' % (b"\\n" * 12_000_000)),
    "no picture": lambda: body(b'"x":"data:%b"' % (b"\\n" * 12_000_000)),
}


@pytest.mark.parametrize("kind", LARGE)
def test_a_large_body_that_is_costly_is_refused_before_it_is_decoded(kind: str) -> None:
    with pytest.raises(InvalidRequest):
        check_large_body(LARGE[kind](), TEXT)


def test_a_large_picture_is_taken_and_decoded_at_once() -> None:
    picture = body(
        b'"messages":[{"content":[{"image_url":{"url":"data:image/png;base64,%b"}}]}]'
        % (b"A" * 16 * MIB)
    )
    check_large_body(picture, TEXT)
    assert held_s(lambda: parse_body_fields(picture)) < HOLD_S


@pytest.mark.parametrize("kind", ["ids", "backslashes", "nesting", "text", "words"])
def test_what_is_let_through_is_decoded_without_holding_the_interpreter(kind: str) -> None:
    data = {
        "ids": lambda: body(b'"prompt":' + many(b"17", MAX_VALUES - 10)),
        "backslashes": lambda: body(b'"prompt":"%b"' % (b"\\\\" * (TEXT // 2 - 10))),
        "nesting": lambda: b'{"model":"m","x":' + b"[" * 20_000_000,
        "text": lambda: body(b'"prompt":"%b"' % (b"\\n" * (TEXT // 2 - 10))),
        "words": lambda: body(b'"x":' + many(b'"a"', MAX_TEXTS - 100)),
    }[kind]()
    check_large_body(data, TEXT)
    if kind == "nesting":
        with pytest.raises(InvalidRequest):
            parse_body_fields(data)
    else:
        assert held_s(lambda: parse_body_fields(data)) < HOLD_S


@pytest.mark.parametrize(
    "text", [b"", b"{", b'"', b'"\\', b'"\\"', b'{"a":"\\\\"}', b'"' * 7, b"\xff\x00", b","]
)
def test_whatever_the_bytes_are_a_look_at_them_ends(text: bytes) -> None:
    check_large_body(text, TEXT)


def test_escapes_are_counted_as_json_has_them() -> None:
    # the text ends behind two backslashes, so the commas that follow are outside of texts
    with pytest.raises(InvalidRequest):
        check_large_body(b'{"a":"\\\\",' + b"," * (MAX_VALUES + 1), TEXT)
    check_large_body(b'{"a":"\\\\\\",' + b"," * (MAX_VALUES + 1), TEXT)


def test_the_beginning_of_a_prompt_is_looked_for_in_the_beginning_of_a_body() -> None:
    far = body(b'"x":"%b","prompt":"a"' % (b"y" * schema.PREFIX_WITHIN_BYTES))
    one = ENDPOINTS["/v1/completions"]
    near = body(b'"prompt":"a"')
    assert schema.prefix_hash("d", far, one) == 0 != schema.prefix_hash("d", near, one)


@pytest.mark.parametrize(
    ("path", "begins"),
    [
        ("/v1/chat/completions", b'{"messages":["X"'),
        ("/v1/completions", b'{"prompt":"X'),
        ("/v1/messages", b'{"messages":["X"'),
        ("/v1/responses", b'{"prompt":null,"input":["X"'),
    ],
)
def test_requests_that_begin_alike_have_one_prefix_on_every_path_that_generates(
    path: str, begins: bytes
) -> None:
    def prefix(rest: bytes, digest: str = "d") -> int:
        return schema.prefix_hash(digest, begins + b"b" * 600 + rest, ENDPOINTS[path])

    assert prefix(b"1") == prefix(b"2") != prefix(b"1", "other")
    other = begins.replace(b"X", b"Y") + b"b" * 600
    assert prefix(b"1") != schema.prefix_hash("d", other, ENDPOINTS[path]) != 0


@pytest.mark.parametrize("path", ["/v1/embeddings", "/pooling", "/tokenize"])
def test_what_generates_nothing_has_no_prefix(path: str) -> None:
    assert schema.prefix_hash("d", b'{"input":"a","messages":[]}', ENDPOINTS[path]) == 0


@pytest.mark.parametrize("field", bounds.SCORED)
def test_a_list_of_any_path_that_is_scored_item_by_item_is_bounded(field: str) -> None:
    most = DEFAULT_BOUNDS.max_messages
    parse_body_fields(body(b'"%b":%b' % (field.encode(), many(b'"a"', most))))
    with pytest.raises(InvalidRequest, match="more than 2048 items"):
        parse_body_fields(body(b'"%b":%b' % (field.encode(), many(b'"a"', most + 1))))


def test_parts_are_bounded_wherever_a_path_takes_them() -> None:
    message = b'{"role":"user","content":%b}'
    part = b'{"type":"input_text","text":"hi"}'
    for field in (b"messages", b"input"):
        parse_body_fields(body(b'"%b":%b' % (field, many(message % many(part, 100), 30))))
        with pytest.raises(InvalidRequest, match="3100 parts"):
            parse_body_fields(body(b'"%b":%b' % (field, many(message % many(part, 100), 31))))
    with pytest.raises(InvalidRequest, match="`system` has more than 3072 items"):
        parse_body_fields(body(b'"system":' + many(TEXT_PART, 3073)))


def test_the_items_of_a_response_are_bounded_tighter_than_texts_to_embed() -> None:
    item = b'{"role":"user","content":"hi"}'
    parse_body_fields(body(b'"input":' + many(item, 409)))
    parse_body_fields(body(b'"input":' + many(b'"text"', 2048)))
    with pytest.raises(InvalidRequest, match="more than 409 items"):
        parse_body_fields(body(b'"input":' + many(item, 410)))


def test_the_earlier_messages_of_a_response_are_bounded_like_its_items() -> None:
    parse_body_fields(body(b'"previous_input_messages":' + many(b"{}", 409)))
    with pytest.raises(InvalidRequest, match="more than 409 items"):
        parse_body_fields(body(b'"previous_input_messages":' + many(b"{}", 410) + b" " * 2048))


def test_the_arguments_of_earlier_tool_calls_are_bounded() -> None:
    """They are texts, so what is in them was not counted with the values of the body."""
    for count, passes in ((1000, True), (300_001, False)):
        text = b'"{\\"a\\":[%b0]}"' % (b"0," * count)
        call = b'{"role":"assistant","tool_calls":[{"function":{"arguments":%b}}]}' % text
        item = b'{"type":"function_call","arguments":%b}' % text
        for asked in (b'"messages":[%b]' % call, b'"input":[%b]' % item):
            if passes:
                parse_body_fields(body(asked))
            else:
                with pytest.raises(InvalidRequest, match="more than 300000 values"):
                    parse_body_fields(body(asked))


def test_a_search_for_long_patterns_is_refused() -> None:
    """Patterns of thousands of tokens hold the engine for seconds at every step."""
    for most in (b"128", b'"128"', b"128.0", b"null", b"true", b"{}", b"1e400", b'"x"'):
        parse_body_fields(body(b'"repetition_detection":{"max_pattern_size":%b}' % most))
    parse_body_fields(body(b'"repetition_detection":{},"n":2'))
    parse_body_fields(body(b'"repetition_detection":null,"n":2'))
    for more in (b"129", b'"129"', b"1e3", b"1" + b"0" * 400, b'"1' + b"0" * 400 + b'"'):
        with pytest.raises(InvalidRequest, match="at most 128"):
            parse_body_fields(body(b'"repetition_detection":{"max_pattern_size":%b}' % more))


@pytest.mark.parametrize("field", bounds.STRUCTURED)
def test_a_schema_is_bounded_in_whatever_field_it_comes(field: str) -> None:
    large = b'{"format":{"schema":"%b"}}' % (b"x" * (64 << 10))
    with pytest.raises(InvalidRequest, match="larger than 65536 bytes"):
        parse_body_fields(body(b'"%b":%b' % (field.encode(), large)))


def test_a_request_for_token_ids_has_a_bound_of_its_own() -> None:
    text = b'{"model":"m","prompt":"%b"}' % (b"a" * MOST_COUNTED_BYTES)
    for path in ("/tokenize", "/detokenize"):
        with pytest.raises(BodyTooLarge, match="at most 524288 bytes"):
            schema.read_fields(ENDPOINTS[path], schema.JSON_TYPE, text)
    long = b'{"model":"m","return_token_strs":true,"prompt":"%b"}' % (b"a" * (128 << 10))
    with pytest.raises(BodyTooLarge, match="at most 131072 bytes"):
        schema.read_fields(ENDPOINTS["/tokenize"], schema.JSON_TYPE, long)
    schema.read_fields(ENDPOINTS["/v1/completions"], schema.JSON_TYPE, text)


@pytest.mark.parametrize("field", bounds.FREE)
def test_an_object_of_any_names_is_bounded(field: str) -> None:
    pairs = b",".join(b'"k%d":1' % n for n in range(20_000))
    allowed = Bounds(processor_options=True)
    with pytest.raises(InvalidRequest, match="larger than 65536 bytes"):
        parse_body_fields(body(b'"%b":{%b}' % (field.encode(), pairs)), allowed)
    fewer = pairs[:60_000].rpartition(b",")[0]
    parse_body_fields(body(b'"%b":{%b}' % (field.encode(), fewer)), allowed)


def test_allowed_token_ids_are_bounded() -> None:
    parse_body_fields(body(b'"allowed_token_ids":' + many(b"1", 1 << 16)))
    with pytest.raises(InvalidRequest, match="more than 65536 items"):
        parse_body_fields(body(b'"allowed_token_ids":' + many(b"1", (1 << 16) + 1)))


def test_a_search_of_many_beams_is_refused() -> None:
    """Each of n beams is scored with 2 n tokens at every step."""
    for yes in (b"true", b"1", b'"yes"'):
        parse_body_fields(body(b'"use_beam_search":%b,"n":16' % yes))
        with pytest.raises(InvalidRequest, match="at most 16"):
            parse_body_fields(body(b'"use_beam_search":%b,"n":17' % yes))
    parse_body_fields(body(b'"use_beam_search":false,"n":17'))
