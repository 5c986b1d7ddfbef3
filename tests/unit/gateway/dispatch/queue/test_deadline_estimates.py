"""Whether a request can finish in its time is judged by what its own tenant's requests take."""

from __future__ import annotations

import pytest

from gateway.dispatch.queue.overload import LEAST_SERVED
from gateway.dispatch.request import ClientRequest, InFlightRequest, RequestedModel, Requester
from shared.errors import DeadlineExceeded
from shared.link import messages
from tests.unit.gateway.dispatch.test_dispatcher import HEAD, Kept, Room

LONG_S, TIME_S = 100.0, 5.0


def of(room: Room, tenant: str, timeout_s: float = 0.0) -> InFlightRequest:
    asked = ClientRequest("/v1/completions", "r", b"{}", prompt_tokens=1, timeout_s=timeout_s)
    inflight = InFlightRequest(asked, RequestedModel("tiny"), Kept(), Requester(tenant))
    room.dispatcher.submit(inflight)
    return inflight


def served(room: Room, tenant: str, took_s: float) -> None:
    for _ in range(LEAST_SERVED):
        inflight = of(room, tenant)
        room.now += took_s
        room.heartbeat("w0", capacity=1)
        end = (inflight.sid, HEAD | messages.END, b"x")
        room.frames("w0", end, done=[messages.Done(inflight.sid, 1, 50)])


def test_long_requests_of_one_tenant_do_not_make_those_of_another_seem_late() -> None:
    room = Room()
    room.worker("w0", capacity=1)
    served(room, "a", LONG_S)
    running = of(room, "a")
    waiting = of(room, "b", TIME_S)
    assert waiting.ticket is not None
    room.frames("w0", (running.sid, HEAD | messages.END, b"x"), done=[messages.Done(running.sid)])
    assert waiting.t_sent


def test_a_tenant_whose_own_requests_take_too_long_is_told_when_it_asks() -> None:
    room = Room()
    room.worker("w0", capacity=1)
    served(room, "b", LONG_S)
    of(room, "a")
    with pytest.raises(DeadlineExceeded):
        of(room, "b", TIME_S)
