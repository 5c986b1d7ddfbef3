"""Whose batch runs, and which requests a file holds."""

from __future__ import annotations

import pytest

from gateway.batches.records import Batch, BatchStatus, read_lines
from gateway.batches.turns import BATCHES_AT_ONCE, TURN_S, RunningBatch, next_to_run, to_yield

CHAT = "/v1/chat/completions"
MOST_TEXT = 1 << 20


def batch(owner: str, number: int) -> Batch:
    return Batch(f"{owner}{number}", owner, CHAT, "file", number)


def running(owner: str, count: int, since: float = 0.0) -> list[RunningBatch]:
    return [RunningBatch(f"{owner} running {n}", owner, since + n) for n in range(count)]


def test_a_free_place_goes_to_the_key_with_the_fewest_and_then_to_who_waited_longest() -> None:
    waiting = [batch("a", 1), batch("a", 2), batch("b", 3), batch("c", 4)]
    assert next_to_run(waiting, [], {}) == waiting[0]
    assert next_to_run(waiting, running("a", 1), {}) == waiting[2]
    assert next_to_run(waiting, running("a", 1), {"b": 9.0, "c": 8.0}) == waiting[3]
    assert next_to_run(waiting, running("x", BATCHES_AT_ONCE), {}) is None
    assert next_to_run([], [], {}) is None


def test_a_batch_that_was_cancelled_while_it_waited_needs_no_place() -> None:
    cancelled = batch("a", 2).become(BatchStatus.CANCELLING, 2)
    waiting = [batch("b", 1), cancelled]
    assert next_to_run(waiting, running("x", BATCHES_AT_ONCE), {}) == cancelled


def test_a_key_that_has_all_places_gives_one_to_another_that_waits() -> None:
    taken = running("a", BATCHES_AT_ONCE)
    assert to_yield([batch("a", 1)], taken, TURN_S) is None
    assert to_yield([batch("b", 2)], taken[1:], 0.0) is None  # there is a free place
    assert to_yield([batch("b", 2)], taken, 0.0) == taken[0]


def test_a_key_with_one_place_keeps_it_for_its_turn() -> None:
    taken = [one for owner in "abcd"[:BATCHES_AT_ONCE] for one in running(owner, 1)]
    assert to_yield([batch("e", 1)], taken, TURN_S - 1) is None
    assert to_yield([batch("e", 1)], taken, TURN_S) == taken[0]


@pytest.mark.parametrize("line", [b"", b" "], ids=["no character", "a space"])
def test_a_file_of_empty_lines_is_no_work(line: bytes) -> None:
    lines, errors = read_lines((line + b"\n") * (8 << 20), CHAT, MOST_TEXT)
    assert not lines and errors[0].code == "too_many_lines"


def test_a_line_is_bounded_like_a_request_of_its_own() -> None:
    def line(body: bytes) -> bytes:
        return b'{"custom_id":"a","url":"%b","body":{"x":%b}}' % (CHAT.encode(), body)

    ordinary, errors = read_lines(line(b'"%b"' % (b"a" * (MOST_TEXT // 2))), CHAT, MOST_TEXT)
    assert len(ordinary) == 1 and not errors
    for body in (b"[" + b"{}," * 2_000_000 + b"{}]", b'"%b"' % (b"a" * (2 * MOST_TEXT))):
        lines, errors = read_lines(line(body), CHAT, MOST_TEXT)
        assert not lines and errors[0].param == "body"
