"""Streams that go on on another worker: by example, and as a model of many lives at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gateway.dispatch.lifecycle import MAX_ATTEMPTS, MIN_OPEN, RETRIES_AT_ONCE, RequestPhase
from gateway.dispatch.request import InFlightRequest
from gateway.dispatch.streams.delivery import CONTINUED
from shared.errors import (
    CannotContinue,
    DeadlineExceeded,
    EngineFailure,
    ResponseNotFound,
    WorkerUnavailable,
)
from shared.link import messages
from shared.link.token_ids import pack, unpack
from tests.unit.gateway.dispatch.test_dispatcher import (
    HEAD,
    LEASE_S,
    PIRATE,
    QUEUE_S,
    Kept,
    Room,
    lose_by_word,
    losses,
)


@pytest.fixture
def room() -> Room:
    return Room()


def text(tokens: int) -> bytes:
    return b"".join(b"<%d>" % n for n in range(tokens))


def frame(sid: int, number: int, *, first: bool = False, end: bool = False) -> messages.Frame:
    flags = (HEAD if first else 0) | (messages.END if end else 0)
    return sid, flags, b"<%d>" % number, pack((number,))


def streaming(room: Room, tokens: int = 3, *, movable: bool = True) -> tuple[InFlightRequest, Kept]:
    """A stream of w0 whose client has seen so many tokens."""
    room.worker("w0")
    inflight, sink = room.submit(PIRATE, streams=True, movable=movable)
    for n in range(tokens):
        room.frames("w0", frame(inflight.sid, n, first=n == 0))
    return inflight, sink


def sent(room: Room) -> tuple[str, messages.Generate]:
    return room.wires.generated()[-1]


def on_stored(room: Room) -> tuple[InFlightRequest, Kept]:
    """A request that goes on from an answer that w0 stores."""
    inflight, sink = room.inflight(movable=True)
    inflight.model = msgspec.structs.replace(inflight.model, only_on=(messages.identity("w0", 1),))
    room.dispatcher.submit(inflight)
    return inflight, sink


@losses
def test_a_request_that_goes_on_from_what_a_lost_worker_stored_fails_at_once(
    room: Room, lose: Callable[[Room], None]
) -> None:
    room.worker("w0")
    _, sink = on_stored(room)
    room.worker("w1")
    lose(room)
    assert isinstance(sink.error, WorkerUnavailable)
    assert [worker for worker, _ in room.wires.generated()] == ["w0"]
    assert room.dispatcher.open_requests == 0


def test_one_that_waits_for_such_a_worker_hears_that_it_is_gone(room: Room) -> None:
    room.worker("w0")
    room.submit()
    _, sink = on_stored(room)
    assert not sink.over
    lose_by_word(room)
    room.worker("w1")
    assert isinstance(sink.error, ResponseNotFound)


@losses
def test_a_stream_of_a_lost_worker_goes_on_at_another_one_from_what_its_client_has_seen(
    room: Room, lose: Callable[[Room], None]
) -> None:
    inflight, sink = streaming(room)
    first = inflight.sid
    lose(room)
    room.worker("w1")
    worker, message = sent(room)
    assert worker == "w1" and message.sid != first
    assert message.resume is not None and unpack(message.resume.tokens) == {0: [0, 1, 2]}
    assert (message.request_id, message.adapter) == ("r", PIRATE)
    room.frames("w1", frame(message.sid, 3, first=True), frame(message.sid, 4, end=True))
    assert b"".join(sink.parts) == text(5) and sink.comments == [CONTINUED]
    assert inflight.lifecycle.phase is RequestPhase.FINISHED and inflight.moves == 1
    assert room.counted("loraplex_streams_moved_total", reason="worker_lost") == 1
    assert room.dispatcher.open_requests == 0 and not any(room.reserved().values())


def test_late_frames_of_the_worker_before_are_dropped(room: Room) -> None:
    inflight, sink = streaming(room)
    before = inflight.sid
    lose_by_word(room)
    room.worker("w1")
    room.frames("w0", frame(before, 3), frame(before, 4, end=True))
    assert b"".join(sink.parts) == text(3) and not sink.over
    room.frames("w1", frame(inflight.sid, 3, first=True))
    assert b"".join(sink.parts) == text(4)


def test_a_stream_may_move_as_often_as_it_makes_progress(room: Room) -> None:
    inflight, sink = streaming(room, 1)
    worker = "w0"
    for n in range(1, 10):
        room.refuse(worker, inflight.sid)
        room.worker(f"w{n}", capacity=1)
        worker, _ = sent(room)
        room.frames(worker, frame(inflight.sid, n, first=True))
    assert b"".join(sink.parts) == text(10) and inflight.moves == 9 and not sink.over


def test_a_worker_that_gives_a_stream_back_does_not_get_it_again_while_there_is_another(
    room: Room,
) -> None:
    inflight, _ = streaming(room)
    room.worker("w1")
    room.refuse("w0", inflight.sid, leaving=True)
    assert sent(room)[0] == "w1" and inflight.lifecycle.phase is RequestPhase.SENT


def test_a_stream_that_lost_its_worker_goes_before_all_that_wait(room: Room) -> None:
    inflight, _ = streaming(room)
    waiting = [room.submit(streams=True)[0] for _ in range(3)]
    lose_by_word(room)
    room.worker("w1")
    assert inflight.lifecycle.phase is RequestPhase.SENT
    assert [w.lifecycle.phase for w in waiting] == [RequestPhase.QUEUED] * 3


@pytest.mark.parametrize(
    "answer",
    [
        (400 << messages.STATUS_SHIFT | messages.END, b'{"error": {}}'),
        (200 << messages.STATUS_SHIFT | messages.END, b'{"choices": []}'),
    ],
)
def test_a_worker_that_answers_something_else_ends_the_stream_with_an_error(
    room: Room, answer: tuple[int, bytes]
) -> None:
    inflight, sink = streaming(room)
    lose_by_word(room)
    room.worker("w1")
    room.frames("w1", (inflight.sid, *answer))
    assert isinstance(sink.error, CannotContinue) and b"".join(sink.parts) == text(3)
    assert room.dispatcher.open_requests == 0 and not any(room.reserved().values())


def test_a_worker_that_cannot_continue_a_stream_ends_it_with_an_error(room: Room) -> None:
    inflight, sink = streaming(room)
    lose_by_word(room)
    room.worker("w1")
    room.refuse("w1", inflight.sid, CannotContinue.code, retryable=False)
    assert (
        isinstance(sink.error, CannotContinue) and inflight.lifecycle.phase is RequestPhase.FAILED
    )


def test_a_stream_that_is_not_to_move_says_why_it_ends(room: Room) -> None:
    _, sink = streaming(room, movable=False)
    room.worker("w1")
    lose_by_word(room)
    assert isinstance(sink.error, EngineFailure) and "off" in sink.error.message


def in_the_queue(room: Room, inflight: InFlightRequest) -> None:
    room.now += QUEUE_S + 1.0
    room.dispatcher.tick()


def at_its_deadline(room: Room, inflight: InFlightRequest) -> None:
    room.dispatcher.give_up(inflight, DeadlineExceeded("Too late."))


def with_its_model(room: Room, inflight: InFlightRequest) -> None:
    room.dispatcher.cannot_start({"tiny": "its folder is empty"})


@pytest.mark.parametrize("ends", [in_the_queue, at_its_deadline, with_its_model])
def test_a_stream_that_no_worker_takes_says_so_and_counts_as_lost_and_not_as_moved(
    room: Room, ends: Callable[[Room, InFlightRequest], None]
) -> None:
    inflight, sink = streaming(room)
    lose_by_word(room)
    assert not sink.over
    ends(room, inflight)
    assert sink.error is not None
    assert sink.error.message.endswith("It cannot be continued elsewhere: no_worker.")
    assert (inflight.moves, inflight.lost) == (0, "no_worker")
    assert room.counted("loraplex_streams_lost_total", reason="no_worker") == 1
    assert room.counted("loraplex_streams_moved_total", reason=EngineFailure.code) == 0


def test_a_stream_of_which_bytes_came_without_tokens_cannot_move(room: Room) -> None:
    inflight, sink = streaming(room)
    room.frames("w0", (inflight.sid, 0, b"<?>"))
    lose_by_word(room)
    assert sink.error is not None and "not_journaled" in sink.error.message


def test_an_answer_that_is_sent_whole_goes_on_from_where_its_worker_was(room: Room) -> None:
    room.worker("w0")
    inflight, sink = room.submit(movable=True)
    room.frames("w0", (inflight.sid, messages.TOKENS, b"", pack((0, 1))))
    assert sink.status is None
    lose_by_word(room)
    room.worker("w1")
    _, message = sent(room)
    assert message.resume is not None and unpack(message.resume.tokens) == {0: [0, 1]}
    room.frames("w1", (inflight.sid, 200 << messages.STATUS_SHIFT | messages.END, b"{}"))
    assert (sink.status, sink.parts, sink.error) == (200, [b"{}"], None)


@losses
def test_pieces_of_an_answer_that_is_sent_whole_are_not_seen_before_its_end(
    room: Room, lose: Callable[[Room], None]
) -> None:
    room.worker("w0")
    inflight, sink = room.submit(movable=True)
    room.frames("w0", (inflight.sid, messages.TOKENS, b"", pack((0, 1))))
    room.frames("w0", (inflight.sid, 200 << messages.STATUS_SHIFT, b'{"lost":'))
    room.frames("w0", (inflight.sid, 0, b"1"))
    lose(room)
    assert not sink.over
    room.worker("w1")
    assert sent(room)[1].resume is not None and inflight.moves == 0
    room.frames("w1", (inflight.sid, 200 << messages.STATUS_SHIFT, b'{"a":'))
    room.frames("w1", (inflight.sid, messages.END, b"2}"))
    assert (sink.status, sink.parts, sink.error) == (200, [b'{"a":', b"2}"], None)


def test_an_answer_that_is_sent_whole_begins_anew_where_it_cannot_be_continued(room: Room) -> None:
    room.worker("w0")
    inflight, sink = room.submit(movable=True)
    room.frames("w0", (inflight.sid, messages.TOKENS, b"", pack((0, 1))))
    lose_by_word(room)
    room.worker("w1")
    room.worker("w2")
    room.refuse(sent(room)[0], inflight.sid, CannotContinue.code, retryable=False)
    assert sent(room)[1].resume is None and not sink.over


def test_a_request_that_two_workers_died_of_is_not_given_to_a_third(room: Room) -> None:
    room.worker("w0")
    _, sink = room.submit()
    lose_by_word(room)
    room.worker("w1")
    room.worker("w2")
    room.dies("w1")
    if sink.error is None:
        room.dies("w2")
    assert isinstance(sink.error, EngineFailure) and "Workers died" in sink.error.message
    assert len(room.wires.generated()) == 2


# ---- a model of many requests' lives -------------------------------------------------------------

WORKERS = ("w0", "w1", "w2")
LENGTH = 6


@dataclass
class Generating:
    """One attempt on a worker of the model: which token comes next."""

    worker: str
    epoch: int
    sid: int
    at: int
    first: bool = True


class MovesMachine(RuleBasedStateMachine):
    """Clients, a gateway and workers that come, go, stand still and repeat themselves. A token that
    a client has seen is never repeated or contradicted, and every stream ends once.
    """

    @initialize()
    def open(self) -> None:
        self.room = Room(max_queued=100, max_requests=1000)
        self.epoch = dict.fromkeys(WORKERS, 1)
        self.up: set[str] = set()
        self.seen_sids: set[int] = set()
        self.generating: list[Generating] = []
        self.old_frames: list[tuple[str, int, messages.Frame]] = []
        self.requests: list[tuple[InFlightRequest, Kept]] = []

    worker = st.sampled_from(WORKERS)

    def take_requests(self) -> None:
        """What the gateway has sent is generated by the life of the worker that got it."""
        for name, message in self.room.wires.generated():
            if message.sid not in self.seen_sids:
                self.seen_sids.add(message.sid)
                seen = unpack(message.resume.tokens)[0] if message.resume is not None else []
                assert seen == list(range(len(seen)))
                self.generating.append(Generating(name, self.epoch[name], message.sid, len(seen)))

    @rule()
    def client_asks(self) -> None:
        self.requests.append(self.room.submit(streams=True, movable=True))

    @rule(worker=worker, capacity=st.integers(1, 3))
    def worker_comes(self, worker: str, capacity: int) -> None:
        self.up.add(worker)
        self.room.worker(worker, self.epoch[worker], capacity)

    @rule(data=st.data())
    def worker_makes_a_token(self, data: st.DataObject) -> None:
        self.take_requests()
        if not self.generating:
            return
        stream = data.draw(st.sampled_from(self.generating))
        end = stream.at == LENGTH - 1
        made = frame(stream.sid, stream.at, first=stream.first, end=end)
        stream.at, stream.first = stream.at + 1, False
        if end:
            self.generating.remove(stream)
        self.old_frames.append((stream.worker, stream.epoch, made))
        if stream.worker in self.up and stream.epoch == self.epoch[stream.worker]:
            self.room.frames(stream.worker, made, epoch=stream.epoch)

    @precondition(lambda self: self.up)
    @rule(data=st.data(), how=st.sampled_from(["word", "restart", "lease"]))
    def worker_is_lost(self, data: st.DataObject, how: str) -> None:
        self.take_requests()
        worker = data.draw(st.sampled_from(sorted(self.up)))
        self.up.discard(worker)
        if how == "word":
            self.room.heartbeat(worker, self.epoch[worker], state=messages.WorkerState.STOPPED)
        elif how == "lease":
            self.room.now += LEASE_S
            for other in self.up:
                self.room.heartbeat(other, self.epoch[other], 2)
            self.room.dispatcher.tick()
        self.epoch[worker] += 1
        if how == "restart":
            self.room.heartbeat(worker, self.epoch[worker], capacity=0)

    @rule(data=st.data())
    def worker_gives_a_stream_back(self, data: st.DataObject) -> None:
        self.take_requests()
        if self.generating:
            stream = data.draw(st.sampled_from(self.generating))
            self.generating.remove(stream)
            self.room.refuse(stream.worker, stream.sid, epoch=stream.epoch)

    @rule(data=st.data())
    def frames_of_lost_workers_come_late(self, data: st.DataObject) -> None:
        """Never those of a worker that the gateway still hears: its link is in order."""
        gone = [
            (w, e, f)
            for w, e, f in self.old_frames
            if self.room.dispatcher._streams.get(f[0]) is None
        ]
        if gone:
            worker, epoch, late = data.draw(st.sampled_from(gone))
            self.room.frames(worker, late, epoch=epoch)

    @rule(seconds=st.sampled_from([0.1, 10.0]))
    def time_passes(self, seconds: float) -> None:
        self.room.now += seconds
        for worker in self.up:
            self.room.heartbeat(worker, self.epoch[worker], 2)
        self.room.dispatcher.tick()

    @invariant()
    def clients_see_each_token_once_and_in_order(self) -> None:
        for inflight, sink in getattr(self, "requests", ()):
            seen = b"".join(sink.parts)
            tokens = seen.count(b"<")
            assert seen == text(tokens)
            assert (
                sink.ended
                == (tokens == LENGTH)
                == (inflight.lifecycle.phase is RequestPhase.FINISHED)
            )
            if not sink.over and not inflight.journal.obstacle:
                assert unpack(inflight.journal.seen).get(0, []) == list(range(tokens))

    def teardown(self) -> None:
        if not hasattr(self, "room"):
            return
        self.room.dispatcher.drain()
        self.room.dispatcher.abort_all()
        assert self.room.dispatcher.open_requests == 0
        assert all(sink.over for _, sink in self.requests)


TestMovesMachine = MovesMachine.TestCase
TestMovesMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_an_answer_that_is_sent_whole_may_move_as_often_as_its_workers_make_tokens(
    room: Room,
) -> None:
    """One worker after another dies, in a rollout or otherwise."""
    room.worker("w0")
    inflight, sink = room.submit(movable=True)
    for n in range(2 * MAX_ATTEMPTS):
        room.frames(f"w{n}", (inflight.sid, messages.TOKENS, b"", pack((n,))))
        room.heartbeat(f"w{n}", state=messages.WorkerState.STOPPED)
        room.worker(f"w{n + 1}")
    assert sink.error is None and sent(room)[0] == f"w{2 * MAX_ATTEMPTS}"


def test_workers_that_leave_one_after_the_other_use_up_nothing_that_a_lost_one_needs(
    room: Room,
) -> None:
    inflight, sink = streaming(room)
    left = RETRIES_AT_ONCE * MIN_OPEN + 1  # more than may be retried at once
    for n in range(left):
        room.worker(f"w{n + 1}")
        room.refuse(f"w{n}", inflight.sid, leaving=True)
        room.frames(f"w{n + 1}", frame(inflight.sid, n + 3, first=True))
    room.worker("last")
    room.heartbeat(f"w{left}", state=messages.WorkerState.STOPPED)
    assert sink.error is None and sent(room)[0] == "last"


def test_a_request_without_a_token_outlives_any_number_of_workers_that_leave(room: Room) -> None:
    room.worker("w0")
    inflight, sink = room.submit()
    for n in range(2 * MAX_ATTEMPTS):
        room.worker(f"w{n + 1}")
        room.refuse(f"w{n}", inflight.sid, leaving=True)
    assert sink.error is None and sent(room)[0] == f"w{2 * MAX_ATTEMPTS}"


def test_workers_that_were_killed_from_outside_did_not_die_of_a_request(room: Room) -> None:
    room.worker("w0")
    _, sink = room.submit()
    for n in range(2):
        room.worker(f"w{n + 1}")
        room.dispatcher.worker_ended(f"w{n}", 1, "killed by SIGKILL", killed=True)
    assert sink.error is None and sent(room)[0] == "w2"


def test_workers_that_fell_silent_may_live_and_did_not_die_of_a_request(room: Room) -> None:
    room.worker("w0")
    _, sink = room.submit()
    for n in range(2):
        room.worker(f"w{n + 1}")
        room.now += LEASE_S
        room.heartbeat(f"w{n + 1}")
        room.dispatcher.tick()
    assert sink.error is None and sent(room)[0] == "w2"
    room.now += LEASE_S
    room.dispatcher.tick()
    assert isinstance(sink.error, WorkerUnavailable), "but it is not tried for ever"


def test_silent_workers_whose_connections_are_gone_died_of_a_request(room: Room) -> None:
    room.worker("w0")
    _, sink = room.submit()
    for n in range(2):
        room.worker(f"w{n + 1}")
        worker = room.fleet.get(f"w{n}")
        assert worker is not None
        room.fleet.connected(worker, False)
        room.takes(f"w{n}")
        room.now += LEASE_S
        room.heartbeat(f"w{n + 1}")
        room.dispatcher.tick()
    assert isinstance(sink.error, EngineFailure) and "Workers died" in sink.error.message
