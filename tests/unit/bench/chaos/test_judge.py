"""Pure. What a client of the chaos scenarios calls whole, failed and wrong."""

from __future__ import annotations

import json

import pytest

from bench.chaos.judge import MOVED, Due, Verdict, judge_stream, judge_whole, read_due

WORDS = [" w0", " w1", " w2", " w3"]
DUE = Due("".join(WORDS), len(WORDS))
DONE = b"data: [DONE]\n\n"


def event(text: str | None, finish: str | None = None, **head: object) -> bytes:
    choices = [] if text is None else [{"delta": {"content": text}, "finish_reason": finish}]
    said = {"id": "a", "created": 1, "model": "m", "choices": choices, **head}
    return b"data: " + json.dumps(said).encode() + b"\n\n"


def error(message: str) -> bytes:
    return b"data: " + json.dumps({"error": {"message": message}}).encode() + b"\n\n"


def usage(tokens: int) -> bytes:
    return event(None, usage={"completion_tokens": tokens})


BODY = [*(event(word) for word in WORDS[:-1]), event(WORDS[-1], "length")]
END = [usage(len(WORDS)), DONE]
WHOLE = b"".join([*BODY, *END])


def test_an_answer_that_is_the_one_due_is_whole() -> None:
    assert judge_stream(WHOLE, DUE).verdict is Verdict.WHOLE
    assert read_due(WHOLE) == DUE


def test_moves_are_counted_and_no_part_of_the_text() -> None:
    moved = b"".join([*BODY[:2], MOVED, b"\n\n", *BODY[2:], *END])
    found = judge_stream(moved, DUE)
    assert found.verdict is Verdict.WHOLE and found.moves == 1


@pytest.mark.parametrize(
    "raw",
    [
        b"".join([*BODY[:2], *BODY[3:], *END]),
        b"".join([*BODY[:2], BODY[1], *BODY[2:], *END]),
        b"".join([*BODY[:2], BODY[3], BODY[2], *END]),
        b"".join([*BODY[:2], DONE]),
        b"".join([*BODY[:3], event(" w3"), *END]),
        b"".join([*BODY, usage(3), DONE]),
        b"".join([*BODY, usage(4), DONE, DONE]),
        b"".join([*BODY[:2], event(" w2", id="b"), BODY[3], *END]),
        b"".join([*BODY[:2], event(" w2", created=2), BODY[3], *END]),
        b"".join([BODY[0], event(" w7"), error("lost")]),
        b"".join([*BODY[:2], BODY[3][:20] + b"\n\n", *END]),
    ],
    ids=[
        "a token is missing",
        "a token came twice",
        "two tokens changed places",
        "it ends too early",
        "no finish reason",
        "usage is not right",
        "it ends twice",
        "the id changed",
        "the time changed",
        "a token that was not due before an error",
        "an event is cut",
    ],
)
def test_what_is_not_as_due_is_wrong(raw: bytes) -> None:
    assert judge_stream(raw, DUE).verdict is Verdict.WRONG


@pytest.mark.parametrize(
    "raw",
    [b"", BODY[0], b"".join([*BODY[:2], error("lost"), DONE])],
    ids=["nothing came", "it was cut", "an error ends it"],
)
def test_a_beginning_that_is_right_is_a_failure_and_not_wrong(raw: bytes) -> None:
    assert judge_stream(raw, DUE).verdict is Verdict.FAILED


def test_an_answer_that_was_sent_whole_is_compared_too() -> None:
    choice = {"message": {"content": DUE.text}, "finish_reason": "length"}
    body = {"choices": [choice], "usage": {"completion_tokens": DUE.tokens}}
    assert judge_whole(json.dumps(body).encode(), DUE).verdict is Verdict.WHOLE
    for wrong in (Due(DUE.text + " w4", DUE.tokens), Due(DUE.text, DUE.tokens + 1)):
        assert judge_whole(json.dumps(body).encode(), wrong).verdict is Verdict.WRONG
    assert judge_whole(b"{}", DUE).verdict is Verdict.WRONG


def test_what_is_due_is_not_learned_from_half_an_answer() -> None:
    with pytest.raises(ValueError, match="not whole"):
        read_due(b"".join(BODY[:2]))
