"""A failure in one request touches no other."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from gateway.dispatch.lifecycle import RequestPhase
from gateway.dispatch.request import InFlightRequest
from shared.errors import InternalError, LoraplexError, WorkerUnavailable
from shared.link import messages
from shared.link.sockets import SendResult
from tests.unit.gateway.dispatch.test_dispatcher import HEAD, PIRATE, Kept, Room

END = messages.END


class Broken(Kept):
    """A Sink that raises at one point, as a bug of ours or a closed transport would."""

    def __init__(self, at: str, error: Exception) -> None:
        super().__init__()
        self._at, self._error = at, error
        self.failures: list[LoraplexError] = []

    def comment(self, text: bytes) -> None:
        self._raise("comment")
        super().comment(text)

    def head(self, status: int, sse: bool, data: bytes, end: bool) -> None:
        self._raise("head")
        super().head(status, sse, data, end)

    def more(self, data: bytes, end: bool) -> bool:
        self._raise("end" if end else "more")
        return super().more(data, end)

    def fail(self, error: LoraplexError) -> None:
        self.failures.append(error)
        self._raise("fail")

    def _raise(self, at: str) -> None:
        if at == self._at:
            raise self._error


def broken(room: Room, at: str, error: Exception) -> tuple[InFlightRequest, Broken]:
    inflight, _ = room.inflight(PIRATE, streams=True)
    sink = Broken(at, error)
    inflight.sink = sink
    room.dispatcher.submit(inflight)
    return inflight, sink


def assert_books_agree(room: Room) -> None:
    open_streams = sum(room.reserved().values())
    assert room.dispatcher.audit() and room.dispatcher.open_requests == open_streams


ERRORS = [OverflowError("int too large"), AssertionError(), RuntimeError("the handler is closed")]


@pytest.mark.parametrize("at", ["head", "more", "end"])
@pytest.mark.parametrize("error", [*ERRORS, ConnectionResetError()], ids=repr)
def test_a_frame_that_raises_ends_its_own_stream_and_every_other_one_of_the_message_is_whole(
    at: str, error: Exception
) -> None:
    room = Room()
    room.worker("w0", capacity=9)
    before, before_sink = room.submit()
    bad, bad_sink = broken(room, at, error)
    after, after_sink = room.submit()
    sids = [before.sid, bad.sid, after.sid]
    for flags, payload in ((HEAD, b"a"), (0, b"b"), (END, b"c")):
        room.frames("w0", *[(sid, flags, payload) for sid in sids])
    for sink in (before_sink, after_sink):
        assert (sink.parts, sink.ended) == ([b"a", b"b", b"c"], True)
    assert bad.lifecycle.over and ("w0", bad.sid) in room.wires.cancelled()
    if isinstance(error, ConnectionError):
        assert bad.lifecycle.phase is RequestPhase.ABORTED and not bad_sink.failures
        assert room.counted("loraplex_internal_errors_total") == 0
    else:
        assert bad.lifecycle.phase is RequestPhase.FAILED
        assert [type(e) for e in bad_sink.failures] == [InternalError]
        assert room.counted("loraplex_internal_errors_total") == 1
    assert room.reserved() == {"w0": 0}
    assert_books_agree(room)


def test_a_sink_that_raises_when_it_hears_of_the_end_gives_its_place_back_all_the_same() -> None:
    room = Room()
    room.worker("w0")
    bad, sink = broken(room, "fail", RuntimeError())
    room.refuse("w0", bad.sid, retryable=False)
    assert sink.failures and bad.lifecycle.over
    assert room.reserved() == {"w0": 0}
    assert_books_agree(room)


@pytest.mark.parametrize("when", ["first", "from the queue", "again"])
def test_a_request_that_cannot_be_dispatched_fails_alone_and_holds_nothing(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of its values breaks the books (an infinite number, for example). The request whose end
    made room for it is whole, and the next one gets the place.
    """
    room = Room()
    room.worker("w0")
    first, first_sink = room.submit()
    bad, bad_sink = room.inflight()
    poison = room.dispatcher._placement._message

    def message(request: InFlightRequest, *rest: object) -> messages.Generate:
        if request is bad and (when != "again" or request.lifecycle.attempts):
            raise OverflowError("cannot convert float infinity to integer")
        return poison(request, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(room.dispatcher._placement, "_message", message)
    if when == "from the queue":
        room.dispatcher.submit(bad)
        assert bad.ticket is not None
        room.frames("w0", (first.sid, HEAD | END, b"x"))
    else:
        room.frames("w0", (first.sid, HEAD | END, b"x"))
        room.dispatcher.submit(bad)
        if when == "again":
            room.refuse("w0", bad.sid)
    assert first_sink.ended and isinstance(bad_sink.error, InternalError)
    assert bad.lifecycle.phase is RequestPhase.FAILED and room.reserved() == {"w0": 0}
    later, later_sink = room.submit()
    room.frames("w0", (later.sid, HEAD | END, b"x"))
    assert later_sink.ended
    assert_books_agree(room)


def test_accounts_that_raise_at_a_requests_end_leave_its_answer_whole_and_its_place_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    room = Room()
    room.worker("w0")
    ends, end_sink = room.submit()
    waits, waits_sink = room.submit()

    def settle(request: InFlightRequest) -> None:
        raise OverflowError(math.inf)

    monkeypatch.setattr(room.dispatcher._settlement, "settle", settle)
    room.frames("w0", (ends.sid, HEAD | END, b"x"))
    assert end_sink.ended and end_sink.error is None
    assert waits.lifecycle.phase is RequestPhase.SENT, "who waited has the place"
    room.frames("w0", (waits.sid, HEAD | END, b"x"))
    assert waits_sink.ended
    assert_books_agree(room)


def test_a_worker_that_is_lost_gives_back_every_request_though_one_of_them_raises() -> None:
    room = Room()
    room.worker("w0", capacity=9)
    bad, _ = broken(room, "fail", RuntimeError())
    good, good_sink = room.submit()
    room.frames("w0", (bad.sid, HEAD, b"x"), (good.sid, HEAD, b"x"))
    room.now += 100.0
    room.dispatcher.tick()
    assert bad.lifecycle.over and isinstance(good_sink.error, LoraplexError)
    assert_books_agree(room)


def test_a_comment_that_raises_is_one_streams_matter() -> None:
    room = Room(keepalive_s=1.0)
    bad, _ = broken(room, "comment", RuntimeError())
    _, good_sink = room.submit(streams=True)
    room.now += 1.5
    room.dispatcher.tick()
    assert bad.lifecycle.over and good_sink.comments
    assert room.dispatcher.open_requests == 1


def test_what_raises_inside_a_policy_before_anything_was_reserved_is_the_requests_own_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    room = Room()
    room.worker("w0")

    def choose(*_: object) -> None:
        raise ValueError

    monkeypatch.setattr(room.dispatcher._policy, "choose", choose, raising=False)
    inflight, sink = room.inflight()
    room.dispatcher.submit(inflight)
    assert isinstance(sink.error, InternalError)
    assert_books_agree(room)


# ---- the auditor ---------------------------------------------------------------------------------


def lose_reservation(room: Room, request: InFlightRequest) -> None:
    room.fleet.release(request.sid)


def lose_stream(room: Room, request: InFlightRequest) -> None:
    room.dispatcher._streams.remove(request)


def reserve_for_nobody(room: Room, request: InFlightRequest) -> None:
    worker = room.fleet.get("w0")
    assert worker is not None
    room.fleet.reserve(worker, 9_999, None)


@pytest.mark.parametrize("damage", [lose_reservation, lose_stream, reserve_for_nobody])
def test_a_tick_finds_a_reservation_that_has_lost_its_stream_and_the_reverse_and_puts_it_right(
    damage: Callable[[Room, InFlightRequest], None],
) -> None:
    room = Room()
    room.worker("w0", capacity=9)
    hurt, hurt_sink = room.submit()
    well, well_sink = room.submit()
    assert room.dispatcher.audit()
    damage(room, hurt)
    room.dispatcher.tick()
    assert room.counted("loraplex_reservation_repairs_total") >= 1
    room.frames("w0", (well.sid, HEAD | END, b"x"))
    assert well_sink.ended
    if not hurt.lifecycle.over:
        room.frames("w0", (hurt.sid, HEAD | END, b"x"))
    assert hurt_sink.ended or isinstance(hurt_sink.error, InternalError)
    assert room.reserved() == {"w0": 0} and room.dispatcher.open_requests == 0
    assert_books_agree(room)


def test_a_send_that_raises_leaves_no_reservation(monkeypatch: pytest.MonkeyPatch) -> None:
    room = Room()
    room.worker("w0")

    def send_data(peer: bytes, data: bytes) -> SendResult:
        raise OSError("the socket is gone")

    monkeypatch.setattr(room.wires, "send_data", send_data)
    _, sink = room.submit()
    assert isinstance(sink.error, (InternalError, WorkerUnavailable))
    assert room.reserved() == {"w0": 0}
    assert_books_agree(room)


def test_a_worker_can_say_nothing_of_a_stream_that_another_one_has() -> None:
    room = Room()
    room.worker("w0", capacity=1)
    mine, mine_sink = room.submit()
    room.worker("w1", capacity=1)
    other, other_sink = room.submit()
    assert mine.choice is not None and other.choice is not None
    assert (mine.choice.worker.id, other.choice.worker.id) == ("w0", "w1")
    done = messages.Done(other.sid, 1, 10**9)
    room.frames("w0", (other.sid, HEAD | END, b"not yours"), (mine.sid, HEAD, b"a"), done=[done])
    room.refuse("w0", other.sid)
    assert other_sink.parts == [] and not other_sink.over and other.done is None
    room.frames("w1", (other.sid, HEAD | END, b"b"))
    room.frames("w0", (mine.sid, END, b"c"))
    assert (mine_sink.parts, other_sink.parts) == ([b"a", b"c"], [b"b"])
    assert_books_agree(room)
