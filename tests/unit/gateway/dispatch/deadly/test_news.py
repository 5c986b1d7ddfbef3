"""What one gateway knows of deaths reaches the gateways of other machines by way of a worker."""

from __future__ import annotations

import pytest

from gateway.dispatch.deadly.news import MAX_UNTOLD
from gateway.dispatch.deadly.requests import DeadlyRequests, key_of_request
from gateway.dispatch.lifecycle import DEADLY
from shared.errors import WorkersDied
from shared.link import messages
from shared.link.sockets import SendResult
from tests.unit.gateway.dispatch.test_dispatcher import HEAD, Room


def gateway(*, alone: bool = False) -> Room:
    return Room(deadly=DeadlyRequests(alone=alone))


def told(room: Room) -> list[tuple[str, messages.KnownDeaths]]:
    return [(to, sent) for to, sent in room.wires.data if isinstance(sent, messages.KnownDeaths)]


def pass_on(room: Room, *others: Room) -> None:
    for to, known in told(room):
        for other in others:
            peer = messages.identity(to, 1)
            other.dispatcher.inbox.on_data(peer, messages.encode(known))


def deaths_known_to(room: Room) -> int:
    """Of the request that `submit` makes, or of a copy that has not ended yet."""
    request, _ = room.inflight()
    try:
        room.dispatcher.check_deadly(request)
    except WorkersDied:
        return DEADLY
    return room.dispatcher._deadly.suspicion(request, room.now).deaths


def test_each_death_is_told_to_one_worker_that_lives() -> None:
    room = gateway()
    room.worker("w0")
    request, _ = room.submit()
    for n in range(DEADLY):
        room.worker(f"w{n + 1}")
        room.dies(f"w{n}")
    assert told(room) == [
        (f"w{n + 1}", messages.KnownDeaths(*key_of_request(request), ended))
        for n, ended in enumerate([0, 0, DEADLY])
    ]


def test_the_gateways_of_other_machines_suspect_copies_and_refuse_what_is_deadly() -> None:
    here, there = gateway(), gateway()
    here.worker("w0")
    here.submit()
    for n in range(DEADLY):
        here.worker(f"w{n + 1}")
        here.dies(f"w{n}")
        pass_on(here, there)
        assert deaths_known_to(there) == (DEADLY if n + 1 == DEADLY else 1)


def test_they_forget_a_request_that_got_further() -> None:
    here, there = gateway(), gateway()
    here.worker("w0")
    request, _ = here.submit()
    here.worker("w1")
    here.dies("w0")
    pass_on(here, there)
    assert deaths_known_to(there) == 1
    here.frames("w1", (request.sid, messages.END | HEAD, b"a"))
    pass_on(here, there)
    assert deaths_known_to(there) == 0


def test_what_was_heard_is_not_told_again() -> None:
    room = gateway()
    room.worker("w0")
    peer = messages.identity("w0", 1)
    for deaths in (2, 0):
        known = messages.KnownDeaths(2, bytes(16), deaths, forgotten=not deaths)
        room.dispatcher.inbox.on_data(peer, messages.encode(known))
    assert not told(room)


def test_a_lower_count_that_is_heard_late_changes_nothing() -> None:
    room = gateway()
    request, _ = room.inflight()
    for deaths in (2, 1):
        known = messages.KnownDeaths(*key_of_request(request), deaths)
        room.dispatcher.inbox.on_data(b"w0#1", messages.encode(known))
    assert deaths_known_to(room) == 2


@pytest.mark.parametrize("state", [SendResult.FULL, SendResult.GONE])
def test_while_no_worker_can_be_told_the_news_waits_for_the_next_one(state: SendResult) -> None:
    room = gateway()
    room.worker("w0")
    request, _ = room.submit()
    room.dies("w0")
    room.dispatcher.cancel(request)
    assert not told(room)
    room.worker("w1")
    room.wires.state[b"w1#1"] = state
    room.dispatcher.tick()
    room.worker("w2")
    room.dispatcher.tick()
    room.dispatcher.tick()
    assert {to for to, _ in told(room) if to != "w1"} == {"w2"}
    assert [known.deaths for to, known in told(room) if to == "w2"] == [0, 1]


def test_news_that_cannot_be_told_is_bounded_and_the_oldest_goes() -> None:
    room = gateway()
    for n in range(2 * MAX_UNTOLD):
        room.dispatcher._news.tell("tiny", messages.KnownDeaths(n, bytes(16), 1))
    room.worker("w0")
    room.dispatcher.tick()
    assert [known.length for _, known in told(room)] == [*range(MAX_UNTOLD, 2 * MAX_UNTOLD)]


def test_the_only_gateway_tells_nobody() -> None:
    room = gateway(alone=True)
    room.worker("w0")
    room.submit()
    room.worker("w1")
    room.dies("w0")
    assert not told(room)


@pytest.mark.parametrize(
    "known",
    [
        messages.KnownDeaths(1 << 80, bytes(16), 1),
        messages.KnownDeaths(2, bytes(3), 1),
        messages.KnownDeaths(2, bytes(16), 1 << 80),
        messages.KnownDeaths(2, bytes(16), -1),
    ],
)
def test_what_no_gateway_says_does_no_harm(known: messages.KnownDeaths) -> None:
    room = gateway()
    room.dispatcher._deadly.heard(known, room.now)
    assert deaths_known_to(room) == 0 and room.dispatcher.audit()
