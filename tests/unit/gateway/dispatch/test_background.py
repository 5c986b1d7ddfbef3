"""Answers in the background, and answers that go on from what a worker stores."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from gateway.dispatch.lifecycle import DEADLY, RequestPhase
from gateway.dispatch.request import InFlightRequest
from shared.errors import WorkerUnavailable
from shared.link import messages
from shared.link.token_ids import pack, unpack
from tests.unit.gateway.dispatch.test_dispatcher import (
    HEAD,
    Kept,
    Room,
    lose_by_restart,
    lose_by_word,
    losses,
)

ANSWERED = 200 << messages.STATUS_SHIFT | messages.ANSWERED


@pytest.fixture
def room() -> Room:
    return Room()


def in_background(room: Room, *, streams: bool = False) -> tuple[InFlightRequest, Kept]:
    inflight, sink = room.inflight(streams=streams, movable=True)
    inflight.client_request = msgspec.structs.replace(
        inflight.client_request, background=True, answer_id="resp_1"
    )
    room.worker("w0")
    room.dispatcher.submit(inflight)
    return inflight, sink


def answered(room: Room) -> tuple[InFlightRequest, Kept]:
    """An answer in the background whose client has its id, and whose worker has made 2 tokens."""
    inflight, sink = in_background(room)
    room.frames("w0", (inflight.sid, ANSWERED, b"queued"))
    room.frames("w0", (inflight.sid, messages.TOKENS, b"", pack((5, 6))))
    return inflight, sink


def test_its_client_has_its_answer_while_the_worker_keeps_its_place(room: Room) -> None:
    inflight, sink = answered(room)
    assert (sink.status, sink.parts, sink.ended) == (200, [b"queued"], True)
    room.dispatcher.cancel(inflight)  # what the client's connection does once it is answered
    assert room.reserved() == {"w0": 1} and not room.wires.cancelled()
    room.frames("w0", (inflight.sid, messages.END, b""))
    assert inflight.lifecycle.phase is RequestPhase.FINISHED
    assert room.reserved() == {"w0": 0} and room.dispatcher.open_requests == 0


@losses
def test_an_answer_in_the_background_moves_with_what_was_made_of_it(
    room: Room, lose: Callable[[Room], None]
) -> None:
    inflight, sink = answered(room)
    lose(room)
    assert room.dispatcher.may_move("resp_1")
    room.worker("w1")
    worker, message = room.wires.generated()[-1]
    assert worker == "w1" and message.background and message.answer_id == "resp_1"
    assert message.resume is not None and unpack(message.resume.tokens) == {0: [5, 6]}
    room.frames("w1", (inflight.sid, ANSWERED, b"queued"))
    room.frames("w1", (inflight.sid, messages.END, b""))
    assert inflight.lifecycle.phase is RequestPhase.FINISHED and inflight.moves == 1
    assert sink.parts == [b"queued"] and room.dispatcher.open_requests == 0


def test_its_client_leaves_before_it_has_the_id_and_it_ends(room: Room) -> None:
    inflight, _ = in_background(room)
    room.dispatcher.cancel(inflight)
    assert room.dispatcher.open_requests == 0
    assert [m.over for _, m in room.wires.data if isinstance(m, messages.Cancel)] == [True]


@losses
def test_a_stream_in_the_background_goes_on_and_moves_without_its_client(
    room: Room, lose: Callable[[Room], None]
) -> None:
    inflight, sink = in_background(room, streams=True)
    room.frames("w0", (inflight.sid, HEAD, b"<0>", pack((0,))))
    room.dispatcher.cancel(inflight)
    room.frames("w0", (inflight.sid, 0, b"<1>", pack((1,))))
    assert not room.wires.cancelled() and sink.parts == [b"<0>"]
    lose(room)
    room.worker("w1")
    worker, message = room.wires.generated()[-1]
    assert worker == "w1" and message.resume is not None
    assert unpack(message.resume.tokens) == {0: [0, 1]}
    room.frames("w1", (inflight.sid, HEAD, b"<2>", pack((2,))))
    room.frames("w1", (inflight.sid, messages.END, b"<3>", pack((3,))))
    assert inflight.lifecycle.phase is RequestPhase.FINISHED


def test_a_gateway_that_ends_leaves_it_to_its_worker(room: Room) -> None:
    inflight, _ = answered(room)
    room.dispatcher.drain()
    assert inflight.lifecycle.over
    assert [m.over for _, m in room.wires.data if isinstance(m, messages.Cancel)] == [False]


def test_another_worker_gets_the_copy_before_the_client_gets_the_end(room: Room) -> None:
    inflight, sink = room.inflight(movable=True)
    room.worker("w0")
    room.dispatcher.submit(inflight)
    room.worker("w1")
    copy = messages.StoredCopy("resp_1", b"{}")
    room.dispatcher.inbox.on_data(messages.identity("w0", 1), messages.encode(copy))
    kept = [(w, m) for w, m in room.wires.data if isinstance(m, messages.KeepCopy)]
    assert kept == [("w1", messages.KeepCopy("resp_1", b"{}"))] and not sink.over


def goes_on(room: Room, *stored_on: str) -> tuple[InFlightRequest, Kept]:
    inflight, sink = room.inflight(movable=True)
    lives = tuple(messages.identity(worker, 1) for worker in stored_on)
    inflight.model = msgspec.structs.replace(inflight.model, only_on=lives)
    room.dispatcher.submit(inflight)
    return inflight, sink


@pytest.mark.parametrize("lose", [lose_by_restart, lose_by_word])
def test_a_request_that_goes_on_from_a_stored_answer_moves_to_the_worker_with_the_copy(
    room: Room, lose: Callable[[Room], None]
) -> None:
    room.worker("w0")
    goes_on(room, "w0", "w2")
    for worker in ("w1", "w2"):
        room.worker(worker)
    lose(room)
    assert [worker for worker, _ in room.wires.generated()] == ["w0", "w2"]


def test_the_next_life_of_the_worker_that_stored_it_does_not_get_it(room: Room) -> None:
    room.worker("w0")
    _, sink = goes_on(room, "w0")
    lose_by_word(room)
    room.worker("w0", epoch=2)
    assert isinstance(sink.error, WorkerUnavailable)
    assert len(room.wires.generated()) == 1


def test_one_that_kills_its_workers_before_it_has_made_a_token_is_deadly(room: Room) -> None:
    """Its client has the id at once, which proves nothing of what comes after."""
    inflight, _ = in_background(room)
    for n in range(DEADLY):
        room.worker(f"w{n}")
        room.takes(f"w{n}")
        room.frames(f"w{n}", (inflight.sid, ANSWERED, b"queued"))
        room.dies(f"w{n}")
        room.worker(f"w{n + 1}")
        if inflight.lifecycle.over:
            break
    assert inflight.lifecycle.phase is RequestPhase.FAILED
    assert inflight.lifecycle.deaths == DEADLY
