"""How the load test reads an answer: status, events, chunks and errors."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.load.measure import Meter
from bench.load.reply import LoadReply


def _event(**choice: object) -> bytes:
    return b"data: " + json.dumps({"choices": [{"index": 0, **choice}]}).encode() + b"\n\n"


ROLE = _event(delta={"role": "assistant", "content": ""}, finish_reason=None)
ONE = _event(delta={"content": "one"}, finish_reason=None)
LAST = _event(delta={"content": '"error" [DONE]\n\n'}, finish_reason="stop")
USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 2}}\n\n'
DONE = b"data: [DONE]\n\n"
STREAM = (ROLE, ONE, LAST, USAGE, DONE)


def _chunked(*payloads: bytes, content_type: str = "text/event-stream; charset=utf-8") -> bytes:
    head = (
        f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nTransfer-Encoding: chunked\r\n\r\n"
    ).encode()
    return (
        head
        + b"".join(b"%x\r\n%b\r\n" % (len(payload), payload) for payload in payloads)
        + b"0\r\n\r\n"
    )


def _read(*parts: bytes, stream: bool = True) -> LoadReply:
    """Reads the parts at the seconds 1, 2, 3, ..."""
    reply, now = LoadReply(stream=stream, meter=Meter()), 0.0
    for part in parts:
        now += 1.0
        reply.feed(part, now)
        if reply.complete or reply.error is not None:
            break
    reply.close(now)
    return reply


def test_a_good_stream_is_counted_and_timed() -> None:
    parts = [_chunked(*STREAM)[: -len(b"0\r\n\r\n")].partition(b"\r\n\r\n")]
    head = parts[0][0] + b"\r\n\r\n"
    reply = _read(head, *(b"%x\r\n%b\r\n" % (len(event), event) for event in STREAM), b"0\r\n\r\n")
    assert reply.error is None
    assert (reply.first_byte_s, reply.first_token_s, reply.last_token_s, reply.ended_s) == (
        1.0,
        3.0,
        4.0,
        7.0,
    )
    assert (reply.content_chunks, reply.prompt_tokens, reply.usage_tokens, reply.finish_reason) == (
        2,
        9,
        2,
        "stop",
    )
    assert reply.keep_alive


@given(st.data())
def test_how_the_bytes_are_cut_up_changes_no_count(data: st.DataObject) -> None:
    message = _chunked(b"".join(STREAM[:2]), STREAM[2][:20], STREAM[2][20:] + USAGE, DONE)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(message) - 1), max_size=30)))
    reply = _read(
        *(message[start:end] for start, end in zip([0, *cuts], [*cuts, len(message)], strict=True))
    )
    assert (
        reply.error,
        reply.content_chunks,
        reply.usage_tokens,
        reply.done,
        reply.keep_alive,
    ) == (None, 2, 2, True, True)


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (_chunked(ROLE, ONE, LAST, USAGE), "no_done"),
        (_chunked(ROLE, ONE, DONE), "no_finish_reason"),
        (_chunked(ROLE, ONE, b'data: {"error": {"message": "dead"}}\n\n', DONE), "error_event"),
        (_chunked(ROLE, b"data: {nonsense\n\n", LAST, DONE), "bad_event"),
        (_chunked(*STREAM)[:-5], "closed_early"),
        (_chunked(ONE)[:-20], "closed_early"),
        (b"", "closed_early"),
        (_chunked(b"<html>", content_type="text/html"), "not_a_stream"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "bad_http"),
        (_chunked(ONE).replace(b"\r\n0\r\n", b"\r\nzz\r\n"), "bad_http"),
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nbusy", "http_503"),
    ],
)
def test_what_is_wrong_with_a_stream_is_named(message: bytes, error: str) -> None:
    assert _read(message).error == error


def test_the_servers_own_words_are_kept() -> None:
    assert _read(_chunked(b'data: {"error": {"message": "dead"}}\n\n')).detail == "dead"
    body = b'{"error": {"message": "no such model", "code": 404}}'
    assert (
        _read(b"HTTP/1.1 404 Not Found\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)).detail
        == "no such model"
    )


def test_comments_crlf_lines_and_events_without_a_space_are_understood() -> None:
    stream = (
        b": ping\n\n"
        + ONE.replace(b"data: ", b"event: x\r\ndata:").replace(b"\n\n", b"\r\n\r\n")
        + LAST
        + DONE
    )
    reply = _read(_chunked(stream))
    assert (reply.error, reply.content_chunks) == (None, 2)


def test_a_stream_that_ends_with_the_connection_is_complete_but_not_kept_alive() -> None:
    reply = _read(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + b"".join(STREAM))
    assert (reply.error, reply.keep_alive) == (None, False)


def test_an_answer_that_is_not_streamed_is_counted_by_its_usage() -> None:
    body = (
        b'{"choices": [{"text": "hi", "finish_reason": "length"}], "usage": '
        b'{"prompt_tokens": 3, "completion_tokens": 8}}'
    )
    reply = _read(
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
        % (len(body), body),
        stream=False,
    )
    assert (reply.error, reply.prompt_tokens, reply.usage_tokens, reply.keep_alive) == (
        None,
        3,
        8,
        True,
    )


def test_an_interim_answer_before_the_real_one_is_passed_over() -> None:
    assert _read(b"HTTP/1.1 100 Continue\r\n\r\n" + _chunked(*STREAM)).error is None


def test_an_event_that_never_ends_is_not_collected_for_ever() -> None:
    assert _read(_chunked(*[b"x" * 65_536] * 20)).error == "too_large"
