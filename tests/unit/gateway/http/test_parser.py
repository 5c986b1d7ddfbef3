"""The parser of simple requests, against aiohttp's own."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import web
from aiohttp.http_parser import HttpRequestParser
from hypothesis import given
from hypothesis import strategies as st

from gateway.http.parser import MAX_HEAD_BYTES, UNSUPPORTED, IncompleteRequest, SimpleRequest, parse

MOST = 1 << 20
BODY = b'{"model": "m"}'


def raw(
    *lines: bytes,
    body: bytes = BODY,
    first: bytes = b"POST /v1/completions HTTP/1.1",
    length: bool = True,
) -> bytes:
    fields = [b"Content-Length: %d" % len(body)] if length else []
    return (
        b"".join(line + b"\r\n" for line in (first, *lines, b"Host: x", *fields)) + b"\r\n" + body
    )


def test_a_post_with_its_body_is_recognised_whole() -> None:
    found = parse(raw(b"Authorization: Bearer \xc3\xa4 ", b"X-Session-Id:s"), MOST)
    assert isinstance(found, SimpleRequest)
    assert (found.method, found.path, found.body) == ("POST", "/v1/completions", BODY)
    assert (
        found.header("authorization") == "Bearer ä"
        and found.header("x-session-id") == "s"
        and found.header("x-other") is None
    )


def test_the_first_of_two_fields_counts_and_a_value_that_looks_like_a_field_does_not() -> None:
    found = parse(raw(b"X-A: first", b"X-A: second", b"X-B: x-c: no"), MOST)
    assert (
        isinstance(found, SimpleRequest)
        and found.header("x-a") == "first"
        and found.header("x-c") is None
    )


def test_a_head_with_very_many_fields_is_left_to_aiohttp() -> None:
    few, many = (raw(*(b"X-%d:" % n for n in range(count))) for count in (90, 100))
    assert isinstance(parse(few, MOST), SimpleRequest) and parse(many, MOST) is UNSUPPORTED


def test_a_request_without_a_body_is_recognised() -> None:
    found = parse(b"GET /health?x=1 HTTP/1.1\r\nHost: x\r\n\r\n", MOST)
    assert isinstance(found, SimpleRequest) and (found.method, found.path, found.body) == (
        "GET",
        "/health?x=1",
        b"",
    )


@pytest.mark.parametrize("cut", range(1, len(raw())))
def test_a_request_that_is_cut_anywhere_is_unfinished_and_its_head_tells_its_length(
    cut: int,
) -> None:
    whole = raw()
    found = parse(whole[:cut], MOST)
    head = whole.index(b"\r\n\r\n") + 4
    assert found == IncompleteRequest(len(whole) if cut >= head else 0)


@pytest.mark.parametrize(
    "data",
    [
        raw(b"Transfer-Encoding: chunked"),
        raw(b"transfer-encoding:chunked", length=False),
        raw(b"Content-Encoding: gzip"),
        raw(b"Expect: 100-continue"),
        raw(b"Upgrade: websocket"),
        raw(b"TE: trailers"),
        raw(b"Connection: close"),
        raw(b"Connection: keep-alive, upgrade"),
        raw(b"Connection:"),
        raw(b"Content-Length: 5"),  # twice, and not the same
        raw(b"Content-Length: +14", length=False),
        raw(b"Content-Length: 14, 14", length=False),
        raw(b"Content-Length: 0x0e", length=False),
        raw(b"Content-Length: 1_4", length=False),
        raw(b"Content-Length:", length=False),
        raw(b"Content-Length : 14", length=False),
        raw(b"Host: y"),  # twice
        raw().replace(b"Host: x\r\n", b""),
        raw(b"X-A: 1\x00"),
        raw(b"X-A: 1\x0b"),
        raw(b"X-A: 1\r"),
        raw(b"X-A: 1\n more"),
        raw(b"X-A: 1\n"),
        raw(b" X-A: folded"),
        raw(b"X A: 1"),
        raw(b": nameless"),
        raw(b"no colon"),
        raw(first=b"POST /v1/completions HTTP/1.0"),
        raw(first=b"POST /v1/completions HTTP/1.1 "),
        raw(first=b"POST  /v1/completions HTTP/1.1"),
        raw(first=b"POST http://x/v1/completions HTTP/1.1"),
        raw(first=b"POST /v1/comple tions HTTP/1.1"),
        raw(first=b"PUT /v1/completions HTTP/1.1"),
        raw(first=b"post /v1/completions HTTP/1.1"),
        raw(first=b"OPTIONS * HTTP/1.1"),
        raw() + b"G",
        raw() + raw(),
        b"\r\n" + raw(),
        b"\x16\x03\x01\x02\x00\x01\x00\x01",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"POSTING",
        b"POST /x HTTP/1.1\nHost: x\n\n",
        raw(b"X-Long: " + b"x" * MAX_HEAD_BYTES),
        raw(body=b"x" * MOST),
        b"GET /" + b"x" * MAX_HEAD_BYTES,
    ],
)
def test_whatever_is_unusual_is_left_to_aiohttp(data: bytes) -> None:
    assert parse(data, MOST) is UNSUPPORTED


def parsed_by_aiohttp(data: bytes) -> tuple[str, str, list[tuple[str, str]], bytes, bool]:
    """(method, target, headers, body, keep-alive) as aiohttp's own parser reads it."""
    loop = asyncio.new_event_loop()
    try:
        protocol = web.RequestHandler(web.Server(_nobody, loop=loop), loop=loop)
        parser = HttpRequestParser(protocol, loop, 1 << 16)
        messages, upgraded, tail = parser.feed_data(data)
        ((message, payload),) = messages
        assert not upgraded and not tail and not message.chunked
        headers = [(name.lower(), value) for name, value in message.headers.items()]
        return (
            message.method,
            message.path,
            headers,
            b"".join(getattr(payload, "_buffer", ())),
            not message.should_close,
        )
    finally:
        loop.close()


async def _nobody(request: web.BaseRequest) -> web.StreamResponse:
    raise AssertionError


NAMES = st.from_regex(r"\A[A-Za-z0-9!#$%&'*+.^_`|~-]{1,12}\Z")
VALUES = st.text(
    st.characters(
        min_codepoint=0x20,
        max_codepoint=0x24F,
        exclude_characters="\x7f",
        exclude_categories=("Cs", "Cc"),
    ),
    max_size=20,
)
ODD = st.sampled_from(
    [
        "Connection: keep-alive",
        "connection:close",
        "Transfer-Encoding: chunked",
        "Expect: 100-continue",
        "X: \x01",
        " f: x",
        "Content-Length: 3",
    ]
)
FIELDS = st.lists(
    st.one_of(st.tuples(NAMES, VALUES).map(lambda f: f"{f[0]}: {f[1]}"), ODD), max_size=6
)


@given(
    FIELDS, st.binary(max_size=40), st.sampled_from(["POST", "GET", "HEAD", "PUT"]), st.booleans()
)
def test_what_is_recognised_is_what_aiohttp_reads(
    fields: list[str], body: bytes, method: str, length: bool
) -> None:
    data = raw(
        *(f.encode() for f in fields),
        body=body,
        first=f"{method} /v1/x?y HTTP/1.1".encode(),
        length=length,
    )
    found = parse(data, MOST)
    if isinstance(found, SimpleRequest):
        their_method, target, headers, their_body, keep_alive = parsed_by_aiohttp(data)
        assert (found.method, found.path, found.body, True) == (
            their_method,
            target,
            their_body,
            keep_alive,
        )
        for name, _ in headers:
            assert found.header(name) == next(v for n, v in headers if n == name), name


@given(st.binary(max_size=200))
def test_any_bytes_are_recognised_somehow(data: bytes) -> None:
    parse(data, MOST)


@given(
    st.lists(st.binary(max_size=20), min_size=2, max_size=5),
    st.binary(max_size=3),
    st.sampled_from([0, 1, 17, 30, 60]),
)
def test_a_head_that_is_known_is_read_as_one_that_is_not(
    bodies: list[bytes], noise: bytes, at: int
) -> None:
    """However a head is spoilt, remembering it changes nothing in how it is read."""
    known = None
    for nth, body in enumerate(bodies):
        data = raw(b"X-A: 1", body=body)
        if nth:
            data = data[:at] + noise + data[at + len(noise) :]
        expected, found = parse(data, MOST), parse(data, MOST, known)
        if isinstance(expected, SimpleRequest):
            assert isinstance(found, SimpleRequest)
            assert (found.method, found.path, found.body) == (
                expected.method,
                expected.path,
                expected.body,
            )
            assert found.header("x-a") == expected.header("x-a")
            known = found.head
        else:
            assert found == expected
