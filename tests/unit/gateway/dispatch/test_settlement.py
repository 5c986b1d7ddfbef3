"""What a request has used is counted once, whatever ended it."""

from __future__ import annotations

import msgspec
import pytest

from gateway.dispatch.lifecycle import RequestPhase
from gateway.dispatch.request import NOTHING_USED, InFlightRequest, UsedTokens
from gateway.dispatch.settlement import LAST_WORD_S
from shared.errors import DeadlineExceeded
from shared.link import messages
from shared.link.token_ids import pack
from tests.unit.gateway.dispatch.test_dispatcher import HEAD, Kept, Room, lose_by_word


class Bill:
    """A UsageSink."""

    def __init__(self) -> None:
        self.used: list[UsedTokens] = []

    def settle(self, request: InFlightRequest) -> None:
        self.used.append(request.used)


@pytest.fixture
def room() -> Room:
    return Room()


def submit(
    room: Room, *, movable: bool = False, keep_s: float = 0.0, takes: bool = True
) -> tuple[InFlightRequest, Kept, Bill]:
    inflight, sink = room.inflight(streams=True, movable=movable)
    inflight.client_request = msgspec.structs.replace(inflight.client_request, keep_s=keep_s)
    sink.takes = takes
    bill = inflight.usage_sink = Bill()
    room.dispatcher.submit(inflight)
    return inflight, sink, bill


def output_tokens(room: Room) -> float:
    return room.counted("loraplex_output_tokens_total", base="tiny")


@pytest.mark.parametrize("end", ["deadline", "client leaves"])
def test_a_request_that_is_stopped_costs_what_its_worker_counts(room: Room, end: str) -> None:
    room.worker("w0")
    inflight, _, bill = submit(room)
    room.frames("w0", (inflight.sid, HEAD, b"x"))
    if end == "deadline":
        room.dispatcher.give_up(inflight, DeadlineExceeded("late"))
    else:
        room.dispatcher.cancel(inflight)
    assert bill.used == [] and output_tokens(room) == 0
    room.frames("w0", done=[messages.Done(inflight.sid, 7, 40)])
    assert bill.used == [UsedTokens(7, 40)] and output_tokens(room) == 40
    room.now += 2 * LAST_WORD_S
    room.dispatcher.tick()
    assert len(bill.used) == 1 and output_tokens(room) == 40


def test_if_the_worker_says_nothing_the_tokens_count_that_its_client_has_got(room: Room) -> None:
    room.worker("w0")
    inflight, _, bill = submit(room, movable=True)
    room.frames("w0", (inflight.sid, HEAD, b"abc", pack([1, 2, 3])))
    room.dispatcher.give_up(inflight, DeadlineExceeded("late"))
    room.dispatcher.close_books()
    assert bill.used == [UsedTokens(0, 3)] and output_tokens(room) == 3


def test_a_stream_that_its_worker_broke_off_costs_what_its_client_has_got(room: Room) -> None:
    room.worker("w0")
    inflight, sink, bill = submit(room, movable=True)
    room.frames("w0", (inflight.sid, HEAD, b"ab", pack([1, 2])))
    room.refuse("w0", inflight.sid, "cannot_continue", retryable=False)
    assert sink.error is not None and bill.used == [UsedTokens(0, 2)]


def test_a_worker_that_is_lost_before_anything_was_seen_costs_the_client_nothing(
    room: Room,
) -> None:
    room.worker("w0")
    inflight, _, bill = submit(room)
    lose_by_word(room)
    room.dispatcher.give_up(inflight, DeadlineExceeded("late"))
    assert bill.used == [NOTHING_USED] and output_tokens(room) == 0


def test_a_stream_that_moved_and_whose_client_leaves_then_costs_what_the_second_worker_counts(
    room: Room,
) -> None:
    room.worker("w0")
    inflight, _, bill = submit(room, movable=True)
    room.frames("w0", (inflight.sid, HEAD, b"ab", pack([1, 2])))
    room.worker("w1")
    lose_by_word(room)
    room.frames("w1", (inflight.sid, HEAD, b"c", pack([3])))
    room.dispatcher.cancel(inflight)
    room.frames("w1", done=[messages.Done(inflight.sid, 5, 3)])
    assert bill.used == [UsedTokens(5, 3)]


class Left(Kept):
    """The client's transport is closed, and nobody was told yet."""

    def head(self, status: int, sse: bool, data: bytes, end: bool) -> None:
        raise ConnectionResetError

    def more(self, data: bytes, end: bool) -> bool:
        raise ConnectionResetError


@pytest.mark.parametrize("how", ["told", "head", "more", "stuck", "last frame"])
def test_an_answer_that_may_be_asked_for_again_goes_on_without_its_client_and_is_charged(
    room: Room, how: str
) -> None:
    room.worker("w0")
    inflight, sink, bill = submit(room, keep_s=60.0, takes=how != "stuck")
    if how == "head":
        inflight.sink = Left()
    room.frames("w0", (inflight.sid, HEAD, b"x"))
    if how in ("more", "last frame"):
        inflight.sink = Left()
        room.dispatcher._streams.write_elsewhere(inflight)
    if how == "told":
        room.dispatcher.cancel(inflight)
    if how != "last frame":
        room.frames("w0", (inflight.sid, 0, b"y"))
    assert inflight.lifecycle.phase is RequestPhase.STREAMING and room.reserved() == {"w0": 1}
    room.dispatcher.cancel(inflight)
    end = (inflight.sid, messages.END, b"z")
    room.frames("w0", end, done=[messages.Done(inflight.sid, 7, 40)])
    assert inflight.lifecycle.phase is RequestPhase.FINISHED and room.reserved() == {"w0": 0}
    assert bill.used == [UsedTokens(7, 40)] and not room.wires.cancelled()
    assert b"z" not in sink.parts


def test_such_an_answer_ends_at_its_worker_once_its_time_is_over(room: Room) -> None:
    room.worker("w0")
    inflight, _, bill = submit(room, keep_s=60.0)
    room.frames("w0", (inflight.sid, HEAD, b"x"))
    room.dispatcher.cancel(inflight)
    room.dispatcher.give_up(inflight, DeadlineExceeded("nobody came"))
    (stop,) = [m for _, m in room.wires.data if isinstance(m, messages.Cancel)]
    room.frames("w0", done=[messages.Done(inflight.sid, 7, 40)])
    assert stop.over and bill.used == [UsedTokens(7, 40)]


def test_such_an_answer_goes_on_at_its_worker_alone_when_the_gateway_ends(room: Room) -> None:
    room.worker("w0")
    left, _, _ = submit(room, keep_s=60.0)
    room.dispatcher.cancel(left)
    room.dispatcher.drain()
    (stop,) = [m for _, m in room.wires.data if isinstance(m, messages.Cancel)]
    assert not stop.over and not room.dispatcher.open_requests
