"""A suspected request is on a worker on which is no other one of which any died."""

from __future__ import annotations

import itertools
from hashlib import sha256

import msgspec
import pytest

from gateway.dispatch.deadly import requests
from gateway.dispatch.deadly.requests import DeadlyRequests, Died
from gateway.dispatch.deadly.trials import ASK_AGAIN_S, ASK_BYTES_PER_S
from gateway.dispatch.lifecycle import DEADLY, MAX_ATTEMPTS, RequestPhase
from gateway.dispatch.queue.overload import LEAST_SERVED
from gateway.dispatch.request import InFlightRequest, Requester
from gateway.routing.policy import ChoiceReason
from shared.errors import OnTrial, Overloaded, WorkersDied
from shared.link import messages
from shared.link.messages import SUSPECTED
from tests.unit.gateway.dispatch.test_dispatcher import HEAD, PIRATE, QUEUE_S, Kept, Room


@pytest.fixture
def room() -> Room:
    return Room()


def two_lost_two_workers(room: Room) -> None:
    for n in range(2):
        room.worker(f"w{n}", capacity=4)
        if not n:
            for body in (b"one", b"two"):
                request, sink = room.inflight(streams=True, movable=True)
                asked = msgspec.structs.replace(request.client_request, body=body)
                room.dispatcher.submit(InFlightRequest(asked, request.model, sink))
        room.dies(f"w{n}")


def on_workers(room: Room) -> list[tuple[str, bytes]]:
    return [(worker, message.body) for worker, message in room.wires.generated()[4:]]


def test_two_that_lost_two_workers_together_are_tried_one_after_the_other(room: Room) -> None:
    two_lost_two_workers(room)
    room.worker("w2", capacity=4)
    ((worker, body),) = on_workers(room)
    sid = room.wires.generated()[-1][1].sid
    assert worker == "w2" and body == b"one"
    room.frames("w2", (sid, HEAD, b"a", bytes(4)))
    assert on_workers(room) == [("w2", b"one"), ("w2", b"two")], "the first one is innocent"


def test_tokens_of_a_whole_answer_end_a_trial_at_once(room: Room) -> None:
    two_lost_two_workers(room)
    room.worker("w2", capacity=4)
    sid = room.wires.generated()[-1][1].sid
    room.frames("w2", (sid, messages.TOKENS, b"", bytes(4)))
    assert on_workers(room) == [("w2", b"one"), ("w2", b"two")]


def test_two_that_lost_two_workers_together_are_tried_on_two_workers_at_once(room: Room) -> None:
    two_lost_two_workers(room)
    room.worker("w2", capacity=4)
    room.worker("w3", capacity=4)
    assert sorted(on_workers(room)) == [("w2", b"one"), ("w3", b"two")]


def test_others_do_not_wait_behind_those_that_are_tried(room: Room) -> None:
    two_lost_two_workers(room)
    room.worker("w2", capacity=4)
    room.submit()
    assert [body for _, body in on_workers(room)] == [b"one", b"{}"]


def test_a_fleet_full_of_suspects_is_open_to_all_others() -> None:
    """They are of more tenants and adapters than a search of the queue tries in vain."""
    room = Room(max_queued=100)
    for n in range(2):
        room.worker(f"w{n}", capacity=64, slots=64)
        if not n:
            for tenant, adapter in itertools.product(range(5), range(9)):
                ref = msgspec.structs.replace(PIRATE, name=f"pirate{adapter}")
                request, sink = room.inflight(ref, streams=True, movable=True)
                of = Requester(f"tenant{tenant}")
                room.dispatcher.submit(
                    InFlightRequest(request.client_request, request.model, sink, of)
                )
        room.dies(f"w{n}")
    room.worker("w2", capacity=64, slots=64)
    for adapter in (None, msgspec.structs.replace(PIRATE, name="pirate0")):
        request, _ = room.submit(adapter)
        assert request.peer == b"w2#1", adapter


def test_the_third_worker_is_the_last_one_and_the_innocent_is_not_blamed(room: Room) -> None:
    two_lost_two_workers(room)
    room.worker("w2", capacity=4)
    room.dies("w2")
    room.worker("w3", capacity=4)
    assert on_workers(room) == [("w2", b"one"), ("w3", b"two")]
    assert room.dispatcher.open_requests == 1


# ---- trials of which only the worker knows -------------------------------------------------------


@pytest.fixture
def shared() -> Room:
    """A gateway process that is not the only one."""
    return Room(deadly=DeadlyRequests(alone=False))


def lost_some(room: Room, *workers: str, streams: bool = True) -> tuple[InFlightRequest, Kept]:
    """A request that these workers died of."""
    request, sink = room.inflight(streams=streams, movable=True)
    for n, name in enumerate(workers):
        room.worker(name, capacity=4)
        if not n:
            room.dispatcher.submit(request)
        room.dies(name)
    return request, sink


def test_a_request_that_one_worker_died_of_is_not_beside_a_suspected_one(shared: Room) -> None:
    two_lost_two_workers(shared)
    for n in (2, 3):
        shared.worker(f"w{n}")
    shared.worker("w4")
    request, _ = shared.inflight(streams=True, movable=True)
    shared.dispatcher.submit(request)
    assert request.peer == b"w4#1"
    for n in (2, 3):
        shared.heartbeat(f"w{n}", capacity=4)
    shared.dies("w4")
    assert request.lifecycle.phase is RequestPhase.QUEUED, "both have trials"
    other, _ = shared.submit(PIRATE)
    assert other.lifecycle.phase is RequestPhase.SENT
    trial = next(message.sid for worker, message in shared.wires.generated() if worker == "w2")
    shared.frames("w2", (trial, HEAD, b"a", bytes(4)))
    assert request.lifecycle.phase is RequestPhase.SENT and request.peer == b"w2#1"


def test_a_worker_that_has_a_trial_of_another_gateway_is_asked_again_soon(shared: Room) -> None:
    request, sink = lost_some(shared, "w0")
    shared.worker("w1", capacity=4)
    for _ in range(5 * MAX_ATTEMPTS):
        assert request.lifecycle.phase is RequestPhase.SENT
        shared.refuse("w1", request.sid, OnTrial.code)
        shared.dispatcher.tick()
        assert request.lifecycle.phase is RequestPhase.QUEUED
        shared.now += ASK_AGAIN_S
        shared.dispatcher.tick()
    assert request.lifecycle.attempts == 2 and len(request.lifecycle.history) == 3
    assert request.earlier == ("w0 had it: The worker that served this request was lost.",)
    shared.frames("w1", (request.sid, messages.END | HEAD, b"a"))
    assert sink.ended


def test_a_large_body_does_not_travel_again_as_often(shared: Room) -> None:
    size_bytes = int(ASK_BYTES_PER_S)
    room = Room(deadly=DeadlyRequests(alone=False), max_body_bytes=2 * size_bytes)
    request, _ = room.inflight()
    asked = msgspec.structs.replace(request.client_request, body=bytes(size_bytes))
    request = InFlightRequest(asked, request.model, Kept())
    request.lifecycle.deaths = SUSPECTED
    room.worker("w0")
    room.dispatcher.submit(request)
    for _ in range(30):
        if request.lifecycle.phase is RequestPhase.SENT:
            room.refuse("w0", request.sid, OnTrial.code)
        room.now += ASK_AGAIN_S
        room.heartbeat("w0")
        room.dispatcher.tick()
    assert len(room.wires.generated()) == 2, "in one and a half seconds"


def test_a_load_that_a_trial_kept_off_is_charged_to_nobody() -> None:
    """A tenant would soon be behind all others."""
    room = Room(policy="expected-ttft", deadly=DeadlyRequests(alone=False))
    room.worker("w0", slots=4, capacity=4)
    for _ in range(LEAST_SERVED):  # so it is known what an engine makes meanwhile
        request, _ = room.submit()
        room.now += 1.0
        room.heartbeat("w0", slots=4, capacity=4)
        end = (request.sid, HEAD | messages.END, b"a")
        room.frames("w0", end, done=[messages.Done(request.sid, 1, 100)])
    requests = []
    for name in ("one", "two"):
        request, sink = room.inflight(msgspec.structs.replace(PIRATE, name=name))
        of = Requester("unlucky")
        requests.append(InFlightRequest(request.client_request, request.model, sink, of))
        requests[-1].lifecycle.deaths = SUSPECTED
        room.dispatcher.submit(requests[-1])
    assert any(one.choice and one.choice.reason is ChoiceReason.COLD for one in requests)
    for _ in range(20):
        for request in requests:
            if request.lifecycle.phase is RequestPhase.SENT:
                room.refuse("w0", request.sid, OnTrial.code)
        room.now += ASK_AGAIN_S
        room.heartbeat("w0", slots=4, capacity=4)
        room.dispatcher.tick()
    for request in requests:
        if request.lifecycle.phase is RequestPhase.SENT:
            room.refuse("w0", request.sid, OnTrial.code)
    assert room.queue.queues["tiny"]._served["unlucky"] == 0.0


def test_while_one_worker_has_another_trial_a_second_one_is_asked_at_once(shared: Room) -> None:
    request, _ = lost_some(shared, "w0")
    shared.worker("w1", capacity=4)
    shared.worker("w2", capacity=4)
    first = request.peer
    shared.refuse(first[:2].decode(), request.sid, OnTrial.code)
    assert request.lifecycle.phase is RequestPhase.SENT and request.peer != first


def test_what_waits_for_a_trial_waits_no_longer_than_others(shared: Room) -> None:
    request, sink = lost_some(shared, "w0")
    shared.worker("w1", capacity=4)
    waits_until = shared.now + QUEUE_S + 1.0
    while sink.error is None and shared.now < waits_until:
        if request.lifecycle.phase is RequestPhase.SENT:
            shared.refuse("w1", request.sid, OnTrial.code)
        shared.now += 0.1
        shared.heartbeat("w1", capacity=4)
        shared.dispatcher.tick()
    assert isinstance(sink.error, Overloaded)


def test_what_has_waited_for_room_does_not_begin_to_wait_anew_for_a_trial(shared: Room) -> None:
    request, sink = shared.inflight(streams=True)
    shared.worker("w1")
    others = [shared.inflight()[0] for _ in range(2)]
    for other in others:
        other.client_request = msgspec.structs.replace(other.client_request, body=b"other")
    shared.dispatcher.submit(others[0])
    request.lifecycle.deaths, began = SUSPECTED, shared.now
    shared.dispatcher.submit(request)
    shared.dispatcher.submit(others[1])
    shared.now += QUEUE_S - 4 * ASK_AGAIN_S
    shared.heartbeat("w1")
    shared.frames("w1", (others[0].sid, messages.END | HEAD, b"a"))
    while sink.error is None and shared.now < began + 3 * QUEUE_S:
        if request.lifecycle.phase is RequestPhase.SENT:
            shared.refuse("w1", request.sid, OnTrial.code)
        shared.now += ASK_AGAIN_S
        shared.heartbeat("w1", capacity=4)
        shared.dispatcher.tick()
    assert isinstance(sink.error, Overloaded) and shared.now - began < QUEUE_S + 3 * ASK_AGAIN_S
    assert request.moved_s == 0.0 and not request.t_first_sent, "no worker was lost, none had it"


def test_a_worker_that_dies_before_it_has_taken_a_request_did_not_die_of_it(shared: Room) -> None:
    request, _ = lost_some(shared, "w0", "w1")
    for n in range(2, 2 + MAX_ATTEMPTS):
        shared.worker(f"w{n}", capacity=4)
        assert request.lifecycle.phase is RequestPhase.SENT
        shared.heartbeat(f"w{n}", state=messages.WorkerState.STOPPED)
    assert request.lifecycle.phase is RequestPhase.QUEUED


def test_streams_get_their_comments_while_one_of_them_waits_for_a_trial() -> None:
    """It is placed again every 50 ms, which once put off the comments of all behind it."""
    room = Room(keepalive_s=1.0, deadly=DeadlyRequests(alone=False))
    room.worker("w0", capacity=4)
    request, sink = room.inflight(streams=True)
    request.lifecycle.deaths = SUSPECTED
    room.dispatcher.submit(request)
    _, beside = room.submit(PIRATE, streams=True)
    for _ in range(50):
        if request.lifecycle.phase is RequestPhase.SENT:
            room.refuse("w0", request.sid, OnTrial.code)
        room.now += ASK_AGAIN_S
        room.heartbeat("w0", capacity=4)
        room.dispatcher.tick()
    assert len(sink.comments) == len(beside.comments) == 2, "in two and a half seconds"


def test_a_trial_that_only_one_worker_can_have_keeps_no_other_from_a_free_one(shared: Room) -> None:
    def suspected(**model: object) -> InFlightRequest:
        request, sink = shared.inflight(streams=True)
        asked = msgspec.structs.replace(request.client_request, body=b"%d" % len(waiting))
        of = msgspec.structs.replace(request.model, **model)
        request = InFlightRequest(asked, of, sink)
        request.lifecycle.deaths = SUSPECTED
        waiting.append(request)
        shared.dispatcher.submit(request)
        return request

    waiting: list[InFlightRequest] = []
    for worker in ("w0", "w1"):
        shared.worker(worker, capacity=8)
        suspected()
    there, anywhere = suspected(only_on=(b"w0#1",)), suspected()
    assert there.lifecycle.phase is anywhere.lifecycle.phase is RequestPhase.QUEUED
    shared.frames("w1", (waiting[1].sid, HEAD, b"a"))
    assert there.lifecycle.phase is RequestPhase.QUEUED
    assert anywhere.peer == b"w1#1"


@pytest.mark.parametrize("alone", [True, False])
def test_workers_that_never_say_what_they_have_taken_are_not_all_lost(alone: bool) -> None:
    """They are of the version before, or their word does not leave them in time."""
    room, lost = Room(deadly=DeadlyRequests(alone=alone)), 0
    refused = False
    while not refused and lost < 10 * DEADLY:
        request, _ = room.inflight(streams=True, movable=True)
        try:
            room.dispatcher.check_deadly(request)
        except WorkersDied:
            refused = True
            break
        room.dispatcher.submit(request)
        while not request.lifecycle.over:
            room.worker(f"w{lost}")
            room.heartbeat(f"w{lost}", state=messages.WorkerState.STOPPED)
            lost += 1
    assert refused and lost <= DEADLY + MAX_ATTEMPTS


def test_a_fleet_full_of_requests_that_lost_one_worker_is_open_to_all_others() -> None:
    """They wait for a trial to end, and are of more tenants and adapters than a search tries in
    vain.
    """
    room = Room(max_queued=100, deadly=DeadlyRequests(alone=False))
    lost_some(room, "w0", "w1")
    room.worker("w2", capacity=64, slots=64)
    room.worker("w3", capacity=64, slots=64)
    room.heartbeat("w2", running=60, capacity=64, slots=64)
    for tenant, adapter in itertools.product(range(5), range(9)):
        ref = msgspec.structs.replace(PIRATE, name=f"pirate{adapter}")
        request, sink = room.inflight(ref, streams=True, movable=True)
        of = Requester(f"tenant{tenant}")
        room.dispatcher.submit(InFlightRequest(request.client_request, request.model, sink, of))
    room.dies("w3")
    for adapter in (None, msgspec.structs.replace(PIRATE, name="pirate0")):
        request, sink = room.inflight(adapter)
        honest = InFlightRequest(request.client_request, request.model, sink, Requester("honest"))
        room.dispatcher.submit(honest)
        assert honest.peer == b"w2#1", adapter


class LookedUp(DeadlyRequests):
    """Counts how often it is asked."""

    looks = 0

    def of(self, request: InFlightRequest, now: float) -> Died:
        self.looks += 1
        return super().of(request, now)


def test_a_lost_worker_with_many_requests_does_not_hold_the_gateway(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All are equally long. Once each was compared with each that another worker had."""
    digested = 0

    def counted(data: bytes = b"") -> object:
        nonlocal digested
        digested += 1
        return sha256(data)

    monkeypatch.setattr(requests, "sha256", counted)
    deadly, streams = LookedUp(), 90
    room = Room(max_requests=streams, deadly=deadly)
    for worker in ("w0", "w1", "w2"):
        room.worker(worker, capacity=streams)
    for n in range(streams):
        request, sink = room.inflight(streams=True, movable=True)
        asked = msgspec.structs.replace(request.client_request, body=b"%03d" % n)
        room.dispatcher.submit(InFlightRequest(asked, request.model, sink))
    assert room.reserved()["w0"] > streams // 5
    room.dies("w0")
    assert room.dispatcher.open_requests == streams and not room.dispatcher.queued("tiny")
    assert deadly.looks < 5 * streams and digested <= 2 * streams
