"""What two workers died of is refused for a while, for its tenant alone."""

from __future__ import annotations

import msgspec
import pytest

from gateway.dispatch.deadly_requests import MAX_REMEMBERED, REFUSED_S, DeadlyRequests
from gateway.dispatch.request import InFlightRequest, Requester
from shared.errors import EngineFailure, WorkersDied
from shared.link import messages
from tests.unit.gateway.dispatch.test_dispatcher import HEAD, PIRATE, Kept, Room


def asked(body: bytes = b"{}", tenant: str = "a", path: str = "/v1/completions") -> InFlightRequest:
    request, _ = Room().inflight(PIRATE)
    made = msgspec.structs.replace(request.client_request, body=body, path=path)
    return InFlightRequest(made, request.model, Kept(), Requester(tenant))


def test_the_same_request_is_refused_until_its_time_is_over() -> None:
    deadly = DeadlyRequests()
    assert deadly.refusal(asked(), 0.0) is None
    deadly.note(asked(), 10.0)
    refusal = deadly.refusal(asked(), 9.9 + REFUSED_S)
    assert isinstance(refusal, EngineFailure) and refusal.status == 500
    assert deadly.refusal(asked(), 10.1 + REFUSED_S) is None


@pytest.mark.parametrize(
    "other", [asked(b"[]"), asked(tenant="b"), asked(path="/v1/chat/completions")]
)
def test_other_requests_are_not_refused(other: InFlightRequest) -> None:
    deadly = DeadlyRequests()
    deadly.note(asked(), 10.0)
    assert deadly.refusal(other, 11.0) is None


def test_a_bounded_number_is_remembered() -> None:
    deadly = DeadlyRequests()
    for n in range(MAX_REMEMBERED + 1):
        deadly.note(asked(b"%d" % n), 10.0)
    assert deadly.refusal(asked(b"0"), 11.0) is None
    assert deadly.refusal(asked(b"%d" % MAX_REMEMBERED), 11.0) is not None


def test_the_second_death_is_noted_and_the_first_is_not() -> None:
    room = Room()
    room.worker("w0")
    again, _ = room.inflight()
    room.submit()
    room.heartbeat("w0", state=messages.WorkerState.STOPPED)
    room.dispatcher.check_deadly(again)
    room.worker("w1")
    room.heartbeat("w1", state=messages.WorkerState.STOPPED)
    with pytest.raises(WorkersDied):
        room.dispatcher.check_deadly(again)


def test_workers_that_die_later_in_an_answer_are_not_its_fault() -> None:
    room = Room()
    for worker in ("w0", "w1"):
        room.worker(worker)
        request, _ = room.submit(streams=True)
        room.frames(worker, (request.sid, HEAD, b"a"))
        room.heartbeat(worker, state=messages.WorkerState.STOPPED)
        room.dispatcher.check_deadly(room.inflight()[0])
