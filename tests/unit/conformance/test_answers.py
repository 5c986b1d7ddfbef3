"""Pure. What counts as a difference between two answers, and that the page tells of all that are
meant.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conformance.answers import Answer, differences
from tests.conformance.meant import MEANT

JSON, SSE = "application/json", "text/event-stream; charset=utf-8"


def chunk(text: str, finish: str = "null", index: int = 0) -> bytes:
    last = b',"system_fingerprint":"vllm-1"' if finish != "null" else b""
    return (
        b'data: {"id":"chatcmpl-%b","choices":[{"index":%d,"delta":{"content":"%b"},'
        b'"finish_reason":%b}]%b}\n\n' % (b"a" * 16, index, text.encode(), finish.encode(), last)
    )


def kinds(ours: Answer, theirs: Answer) -> list[str]:
    return [d.kind for d in differences(ours, theirs)]


def streams(*chunks: bytes) -> Answer:
    return Answer(200, SSE, b"".join(chunks) + b"data: [DONE]\n\n")


def test_how_many_tokens_an_event_holds_is_no_difference() -> None:
    theirs = streams(chunk("a"), chunk("b"), chunk("c", '"stop"'))
    assert not kinds(streams(chunk("ab"), chunk("c", '"stop"')), theirs)
    assert not kinds(streams(chunk("abc", '"stop"')), theirs)


def test_the_order_of_choices_is_no_difference_and_that_of_one_is() -> None:
    theirs = streams(chunk("a"), chunk("x", index=1), chunk("b"))
    assert not kinds(streams(chunk("x", index=1), chunk("a"), chunk("b")), theirs)
    assert kinds(streams(chunk("b"), chunk("a"), chunk("x", index=1)), theirs)


@pytest.mark.parametrize(
    "ours",
    [
        streams(chunk("ab"), chunk("d", '"stop"')),
        streams(chunk("abc", '"length"')),
        streams(chunk("abc", '"stop"'), b'data: {"more":1}\n\n'),
        Answer(200, SSE, chunk("abc", '"stop"')),
    ],
    ids=["text", "reason", "more", "no end"],
)
def test_another_text_reason_or_end_is_a_difference(ours: Answer) -> None:
    assert kinds(ours, streams(chunk("abc", '"stop"'))) in (["events"], ["events"] * 2)


def test_ids_and_times_are_no_difference_and_values_are() -> None:
    def answered(more: bytes) -> Answer:
        return Answer(200, JSON, b'{"id":"chatcmpl-%b","created":%b}' % (b"a" * 9, more))

    theirs = answered(b'1,"logprob":-0.51')
    assert not kinds(answered(b'2,"logprob":-0.51001'), theirs)
    assert kinds(answered(b'2,"logprob":-0.52'), theirs) == ["body"]
    assert kinds(answered(b"2"), theirs) == ["body"]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (
            b'{"message":"no","type":"invalid_request_error","param":"n","code":"invalid_request"}',
            [],
        ),
        (b'{"message":"no","type":"invalid_request_error","param":null,"code":"x"}', ["param"]),
        (b'{"message":"yes","type":"invalid_request_error","param":"n","code":"x"}', ["message"]),
        (b'{"message":"no","type":"BadRequestError","param":"n","code":"x"}', ["shape"]),
        (b'{"message":"no","type":"invalid_request_error","param":"n","code":"400"}', ["shape"]),
        (b'{"message":"no","type":"invalid_request_error","param":"n"}', ["shape"]),
    ],
)
def test_an_error_has_the_one_shape_and_the_words_of_vllm(error: bytes, kind: list[str]) -> None:
    theirs = b'{"error":{"message":"no","type":"BadRequestError","param":"n","code":400}}'
    ours = Answer(400, JSON, b'{"error":%b}' % error)
    assert kinds(ours, Answer(400, JSON, theirs)) == kind
    assert kinds(ours, Answer(404, JSON, theirs)) == ["status"]


def test_the_page_has_a_line_for_each_difference_that_is_meant() -> None:
    page = (Path(__file__).parents[3] / "docs" / "API.md").read_text()
    assert [m.line for m in MEANT if m.line not in page] == []
