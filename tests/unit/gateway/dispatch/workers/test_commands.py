"""Adapter commands: who is asked, and who waits for which answer."""

from __future__ import annotations

import asyncio

import pytest

from gateway.dispatch.workers.commands import MAX_OPEN, PendingCommands
from shared.errors import InvalidAdapter, Overloaded, TooManyPins, WorkerUnavailable
from shared.link import messages
from shared.link.sockets import SendResult
from tests.unit.gateway.dispatch.test_dispatcher import PIRATE, STORED, Room


def tended(room: Room) -> list[tuple[str, messages.AdapterCommand]]:
    return [(w, m) for w, m in room.wires.data if isinstance(m, messages.AdapterCommand)]


def ask(
    room: Room, action: messages.AdapterAction = messages.AdapterAction.LOAD
) -> asyncio.Future[None]:
    worker = room.fleet.get("w0")
    assert worker is not None
    return room.dispatcher.send_command(worker, action, PIRATE, STORED)


def refuse(room: Room, sid: int, code: str) -> None:
    room.refuse("w0", sid, code, retryable=False)


async def test_a_command_goes_to_its_worker_and_is_done_when_the_worker_says_so() -> None:
    room = Room()
    room.worker("w0")
    future = ask(room, messages.AdapterAction.PIN)
    [(worker, send_command)] = tended(room)
    assert (worker, send_command.action, send_command.adapter, send_command.stored) == (
        "w0",
        messages.AdapterAction.PIN,
        PIRATE,
        STORED,
    )
    assert not future.done()
    room.frames("w0", done=[messages.Done(send_command.sid)])
    assert future.done() and future.exception() is None


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("invalid_adapter_rank", InvalidAdapter),
        ("too_many_pins", TooManyPins),
        ("worker_unavailable", WorkerUnavailable),
    ],
)
async def test_a_refused_command_fails_with_the_error_that_the_worker_named(
    code: str, error: type[Exception]
) -> None:
    room = Room()
    room.worker("w0")
    future = ask(room)
    refuse(room, tended(room)[0][1].sid, code)
    assert (
        future.done() and isinstance(future.exception(), error) and "why" in str(future.exception())
    )


async def test_a_command_names_the_hosts_that_have_the_files() -> None:
    room = Room()
    room.worker("w0", host="h0")
    there = messages.AdapterState(PIRATE.name, PIRATE.digest, messages.Tier.GPU)
    room.worker("w1", host="h1", peer_endpoint="tcp://h1:7000", adapters=(there,))
    ask(room, messages.AdapterAction.CACHE)
    assert tended(room)[0][1].peers == ("tcp://h1:7000",)


async def test_an_answer_to_one_command_is_none_to_another_or_to_a_request() -> None:
    room = Room()
    room.worker("w0")
    inflight, sink = room.submit(PIRATE)
    first, second = ask(room), ask(room)
    sids = [t.sid for _, t in tended(room)]
    assert len({inflight.sid, *sids}) == 3
    room.frames("w0", done=[messages.Done(sids[1])])
    assert second.done() and not first.done() and not sink.over
    refuse(room, inflight.sid, "invalid_adapter_rank")
    assert sink.error is not None and not first.done()


@pytest.mark.parametrize("how", ["lease", "restart", "stopped", "gone"])
async def test_a_command_fails_when_its_worker_is_lost(how: str) -> None:
    room = Room()
    room.worker("w0")
    future = ask(room)
    if how == "lease":
        room.now += 10.0
        room.dispatcher.tick()
    elif how == "restart":
        room.heartbeat("w0", epoch=2)
    elif how == "stopped":
        room.heartbeat("w0", state=messages.WorkerState.STOPPED)
    else:
        room.wires.state[messages.identity("w0", 1)] = SendResult.GONE
        assert ask(room).done()
    assert future.done() and isinstance(future.exception(), WorkerUnavailable)


async def test_a_worker_that_takes_nothing_fails_a_command_at_once() -> None:
    room = Room()
    room.heartbeat("w0")  # not attached
    assert isinstance(ask(room).exception(), WorkerUnavailable)
    room.attach("w0")
    room.wires.state[messages.identity("w0", 1)] = SendResult.FULL
    assert isinstance(ask(room).exception(), WorkerUnavailable)
    room.wires.state.clear()
    room.heartbeat("w0", state=messages.WorkerState.DRAINING)
    assert isinstance(ask(room).exception(), WorkerUnavailable)


async def test_open_commands_are_bounded_and_whoever_gives_up_makes_room() -> None:
    tending = PendingCommands()
    futures = [tending.begin(sid, "w0", 1) for sid in range(MAX_OPEN)]
    with pytest.raises(Overloaded):
        await tending.begin(MAX_OPEN, "w0", 1)
    futures[0].cancel()
    await asyncio.sleep(0)
    tending.begin(MAX_OPEN + 1, "w0", 1)
    assert len(tending) == MAX_OPEN
    tending.done(messages.identity("w0", 1), 0)  # the answer to the one that was given up
    tending.lost("w0", 1)
    assert len(tending) == 0 and all(f.done() for f in futures)
