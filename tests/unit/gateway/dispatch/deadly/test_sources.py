"""A source of many deadly requests costs two of them, and then a worker a minute."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import msgspec
import pytest

from gateway.dispatch.deadly.death_table import KEPT_S
from gateway.dispatch.deadly.requests import MANY_DEADLY, SOURCE_REFUSED_S, DeadlyRequests
from gateway.dispatch.lifecycle import DEADLY, RequestPhase
from gateway.dispatch.request import InFlightRequest, Requester
from shared.adapters.identity import AdapterRef
from shared.errors import EngineFailure, LoraplexError, ModelUnavailable
from shared.link import messages
from tests.unit.gateway.dispatch.test_dispatcher import HEAD, PIRATE, Kept, Room


class Fleet:
    """One worker at a time, which is there again once it has died."""

    def __init__(self) -> None:
        self.room = Room(deadly=DeadlyRequests(alone=False))
        self.numbers: Iterator[int] = itertools.count()
        self.lost = 0
        self.worker = ""
        self.start_worker()

    def start_worker(self) -> None:
        self.worker = f"w{next(self.numbers)}"
        self.room.worker(self.worker, capacity=64)

    def request(
        self, tenant: str = "a", adapter: AdapterRef | None = PIRATE
    ) -> tuple[InFlightRequest, Kept]:
        """One with a body that no other one has."""
        request, sink = self.room.inflight(adapter)
        body = b'{"prompt": %d}' % next(self.numbers)
        asked = msgspec.structs.replace(request.client_request, body=body)
        return InFlightRequest(asked, request.model, sink, Requester(tenant)), sink

    def kill(self, tenant: str = "a", adapter: AdapterRef | None = PIRATE) -> LoraplexError:
        """The error of a request that kills each worker that gets it."""
        request, sink = self.request(tenant, adapter)
        try:
            self.room.dispatcher.check_deadly(request)
        except ModelUnavailable as exc:
            return exc
        self.room.dispatcher.submit(request)
        while sink.error is None:
            self.lost += 1
            died = self.worker
            self.start_worker()
            self.room.dies(died)
        return sink.error

    def serve(self) -> None:
        request, sink = self.request()
        self.room.dispatcher.check_deadly(request)
        self.room.dispatcher.submit(request)
        self.room.takes(self.worker)
        self.room.frames(self.worker, (request.sid, messages.END | HEAD, b"a"))
        assert sink.ended


@pytest.fixture
def fleet() -> Fleet:
    return Fleet()


def test_a_source_is_refused_after_two_deadly_requests_whatever_it_asks(fleet: Fleet) -> None:
    errors = [fleet.kill() for _ in range(20)]
    assert fleet.lost == MANY_DEADLY * DEADLY
    assert all(isinstance(error, EngineFailure) for error in errors[:MANY_DEADLY])
    assert all(isinstance(error, ModelUnavailable) for error in errors[MANY_DEADLY:])
    assert errors[-1].retry_after_s and errors[-1].retry_after_s <= SOURCE_REFUSED_S


def test_after_that_it_costs_one_worker_a_minute(fleet: Fleet) -> None:
    for _ in range(MANY_DEADLY):
        fleet.kill()
    before, minutes = fleet.lost, 30
    for _ in range(minutes * 6):
        fleet.room.now += SOURCE_REFUSED_S / 6
        fleet.room.heartbeat(fleet.worker, capacity=64)
        fleet.kill()
    assert fleet.lost - before == minutes


def test_one_that_is_served_to_its_end_lifts_it(fleet: Fleet) -> None:
    for _ in range(MANY_DEADLY):
        fleet.kill()
    fleet.room.now += SOURCE_REFUSED_S
    fleet.room.heartbeat(fleet.worker, capacity=64)
    fleet.serve()
    request, _ = fleet.request()
    fleet.room.dispatcher.check_deadly(request)
    assert request.lifecycle.deaths == 0


def test_the_first_of_it_afterwards_are_on_trial_to_their_ends(fleet: Fleet) -> None:
    for _ in range(MANY_DEADLY):
        fleet.kill()
    fleet.room.now += SOURCE_REFUSED_S
    fleet.room.heartbeat(fleet.worker, capacity=64)
    sent = []
    for _ in range(3):
        request, _ = fleet.request()
        fleet.room.dispatcher.check_deadly(request)
        fleet.room.dispatcher.submit(request)
        sent.append(bool(request.peer))
    assert sent == [True, False, False]


@pytest.mark.parametrize(
    ("tenant", "adapter"),
    [("b", PIRATE), ("a", None), ("a", msgspec.structs.replace(PIRATE, digest="newer"))],
    ids=["another tenant", "another model", "a newer version"],
)
def test_other_sources_are_served(fleet: Fleet, tenant: str, adapter: AdapterRef | None) -> None:
    for _ in range(MANY_DEADLY):
        fleet.kill()
    request, _ = fleet.request(tenant, adapter)
    fleet.room.dispatcher.check_deadly(request)
    fleet.room.dispatcher.submit(request)
    assert request.peer


def test_without_keys_the_base_is_refused_to_nobody(fleet: Fleet) -> None:
    errors = [fleet.kill("", None) for _ in range(2 * MANY_DEADLY)]
    assert all(isinstance(error, EngineFailure) for error in errors)


def test_the_same_request_again_and_again_does_not_count_twice(fleet: Fleet) -> None:
    request, _ = fleet.request()
    request.lifecycle.deaths = DEADLY
    for _ in range(5):
        fleet.room.dispatcher._deadly.note(request, fleet.room.now, ended=True)
    other, _ = fleet.request()
    fleet.room.dispatcher.check_deadly(other)


def test_it_is_forgotten_some_minutes_after_the_last_one(fleet: Fleet) -> None:
    for _ in range(MANY_DEADLY):
        fleet.kill()
    fleet.room.now += KEPT_S
    request, _ = fleet.request()
    fleet.room.dispatcher.check_deadly(request)
    assert request.lifecycle.deaths == 0


def test_gateways_of_other_machines_refuse_it_too_and_hear_that_it_is_lifted(
    fleet: Fleet,
) -> None:
    there = Room(deadly=DeadlyRequests(alone=False))

    def pass_on() -> None:
        for to, sent in fleet.room.wires.data:
            if isinstance(sent, messages.KnownDeaths):
                peer = messages.identity(to, 1)
                there.dispatcher.inbox.on_data(peer, messages.encode(sent))

    for _ in range(MANY_DEADLY):
        fleet.kill()
    pass_on()
    with pytest.raises(ModelUnavailable):
        there.dispatcher.check_deadly(fleet.request()[0])
    fleet.room.now += SOURCE_REFUSED_S
    fleet.room.heartbeat(fleet.worker, capacity=64)
    fleet.serve()
    pass_on()
    request, _ = fleet.request()
    there.dispatcher.check_deadly(request)
    assert request.lifecycle.deaths == 0


def test_what_a_worker_has_had_goes_on_while_its_source_is_refused(fleet: Fleet) -> None:
    """It waits for a worker because its own was lost, and its client has seen some of it."""
    room, body = fleet.room, b'{"prompt": "long"}'
    request, sink = room.inflight(PIRATE, streams=True, movable=True)
    asked = msgspec.structs.replace(request.client_request, body=body)
    request = InFlightRequest(asked, request.model, sink, Requester("a"))
    room.dispatcher.submit(request)
    room.frames(fleet.worker, (request.sid, HEAD, b"a", bytes(4)))
    room.heartbeat(fleet.worker, state=messages.WorkerState.STOPPED)
    assert request.lifecycle.phase is RequestPhase.QUEUED
    for n in range(MANY_DEADLY):
        deadly, _ = fleet.request()
        deadly.lifecycle.deaths = DEADLY
        room.dispatcher._deadly.note(deadly, room.now + n, ended=True)
    fresh, refused = fleet.request()
    room.dispatcher.submit(fresh)
    fleet.start_worker()
    assert isinstance(refused.error, ModelUnavailable)
    room.frames(fleet.worker, (request.sid, messages.END | HEAD, b"b", bytes(4)))
    assert sink.ended and sink.error is None


def test_one_that_is_given_up_on_trial_was_not_deadly_itself(fleet: Fleet) -> None:
    for _ in range(MANY_DEADLY):
        fleet.kill()
    fleet.room.now += SOURCE_REFUSED_S
    fleet.room.heartbeat(fleet.worker, capacity=64)
    request, _ = fleet.request()
    fleet.room.dispatcher.check_deadly(request)
    fleet.room.dispatcher.submit(request)
    fleet.room.dispatcher.cancel(request)
    assert fleet.room.dispatcher._deadly.of(request, fleet.room.now) is None
