"""The open requests of a worker whose answers are made in the background."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from shared.link import messages
from worker.engine.base import EngineRequest, Reply, Storing
from worker.requests.request_table import RequestTable
from worker.session import GatewaySession, Outbox
from worker.settings import KeepBounds

ID = "resp_1"
MOST_KEPT = 8


class Holding:
    """An engine that has told the client the id, and goes on until it may end."""

    def __init__(self) -> None:
        self.may_end = asyncio.Event()
        self.running = 0

    async def serve(self, call: EngineRequest, reply: Reply) -> None:
        self.running += 1
        try:
            reply.answered(200, b"queued")
            await self.may_end.wait()
            reply.stored(b"copy")
            reply.more(b"", True)
        finally:
            self.running -= 1

    def stores(self, answer_id: str) -> Storing:
        return Storing.ORIGINAL if answer_id == ID else Storing.NOT


class Worker:
    """A table with an engine, and the session of one gateway that sees what is sent to it."""

    def __init__(self, tasks: asyncio.TaskGroup) -> None:
        self.engine = Holding()
        self.ended: list[int] = []
        bounds = KeepBounds(60.0, MOST_KEPT, 1 << 20)
        engine: Any = self.engine
        self.table = RequestTable(engine, self.ended.append, print, bounds)
        self.table.tasks = tasks
        self.session = GatewaySession(None, "ipc:///nowhere", "w0", 1, None)
        self.sent: list[object] = []
        self.session.outbox = Outbox(self._take, lambda: None)

    def _take(self, data: bytes) -> bool:
        self.sent.append(messages.decode_worker_data(data))
        return True

    async def begin(self, number: int, sid: int = 7) -> None:
        message = messages.Generate(
            sid, "/v1/responses", "r", b"{}", answer_id=ID, background=True, movable=True
        )
        self.table.accept(number, self.session, message)
        self.table.start(number, None)
        await turns()

    async def found(self) -> messages.FoundAnswer:
        self.table.find(self.session, messages.FindAnswer(99, b"", ID))
        await turns()
        step = self.sent[-1]
        assert isinstance(step, messages.Step)
        return step.found[-1]


@pytest_asyncio.fixture
async def worker() -> AsyncIterator[Worker]:
    async with asyncio.TaskGroup() as tasks:
        worker = Worker(tasks)
        yield worker
        worker.engine.may_end.set()


async def turns(n: int = 6) -> None:
    for _ in range(n):
        await asyncio.sleep(0)


async def test_the_copy_leaves_before_the_end(worker: Worker) -> None:
    await worker.begin(1)
    worker.engine.may_end.set()
    await turns()
    answered, copy, end = worker.sent
    assert isinstance(answered, messages.Step) and isinstance(end, messages.Step)
    assert answered.frames[0][1] == 200 << messages.STATUS_SHIFT | messages.ANSWERED
    assert copy == messages.StoredCopy(ID, b"copy")
    assert end.frames[0][1] == messages.END and worker.ended == [1]


@pytest.mark.parametrize("lost", [True, False], ids=["the gateway is lost", "it ends"])
async def test_it_goes_on_without_its_gateway_and_says_that_it_did(
    worker: Worker, lost: bool
) -> None:
    await worker.begin(1)
    if lost:
        worker.table.refuse_all("worker_unavailable", "why", worker.session)
    else:
        worker.table.cancel(worker.session, 7)
    await turns()
    assert worker.engine.running == 1 and not worker.table.of(worker.session)
    assert worker.session.open_requests == 0
    worker.table.refuse_all("engine_error", "the engine is suspect")
    await turns()
    assert worker.engine.running == 1
    found = await worker.found()
    assert found.stored and found.alone
    worker.engine.may_end.set()
    await turns()
    assert worker.ended == [1] and worker.session.open_requests == 0
    assert not any(isinstance(one, messages.StoredCopy) for one in worker.sent)


async def test_it_ends_if_its_client_will_not_ask_for_it(worker: Worker) -> None:
    await worker.begin(1)
    worker.table.cancel(worker.session, 7, over=True)
    await turns()
    assert worker.ended == [1] and worker.engine.running == 0


async def test_its_gateway_sends_it_again_and_only_the_later_attempt_goes_on(
    worker: Worker,
) -> None:
    await worker.begin(1)
    worker.table.refuse_all("worker_unavailable", "why", worker.session)
    await worker.begin(2, sid=8)
    assert worker.ended == [1] and worker.engine.running == 1
    assert not (await worker.found()).alone


@pytest.mark.parametrize("lost", [True, False], ids=["the gateway is lost", "the client has left"])
async def test_an_answer_that_nobody_can_ask_for_ends_with_its_last_listener(
    worker: Worker, lost: bool
) -> None:
    for number in range(MOST_KEPT + 1):
        key = messages.AnswerKey(b"tag %d" % number, b"digest")
        message = messages.Generate(number, "/v1/completions", "r", b"{}", key=key)
        worker.table.accept(number, worker.session, message)
        worker.table.start(number, None)
    await turns()
    worker.table.expire(0.0)  # one too many is kept
    if lost:
        worker.table.refuse_all("worker_unavailable", "why", worker.session)
    else:
        for number in range(MOST_KEPT + 1):
            worker.table.cancel(worker.session, number)
    await turns()
    assert worker.ended == [0] and worker.engine.running == MOST_KEPT


async def test_an_answer_that_moves_back_ends_what_its_worker_went_on_with_alone(
    worker: Worker,
) -> None:
    key = messages.AnswerKey(b"tag", b"digest")
    for number, resume in ((1, None), (2, messages.Resume(b"aaaa"))):
        message = messages.Generate(
            number, "/v1/completions", "r", b"{}", key=key, movable=True, resume=resume
        )
        worker.table.accept(number, worker.session, message)
        worker.table.start(number, None)
        await turns()
        if resume is None:
            worker.table.refuse_all("worker_unavailable", "why", worker.session)
            assert worker.engine.running == 1, "somebody may ask for it"
    assert worker.ended == [1] and worker.engine.running == 1


# ---- requests of which workers died --------------------------------------------------------------


class Answering:
    """An engine whose requests do what `steps` says, one after the other."""

    def __init__(self) -> None:
        self.steps: asyncio.Queue[str] = asyncio.Queue()

    async def serve(self, call: EngineRequest, reply: Reply) -> None:
        while (step := await self.steps.get()) != "end":
            if step == "head":
                reply.head(200, True, b"a", False)
            elif step == "answered":
                reply.answered(200, b"queued")
            elif step == "tokens":
                reply.progress(bytes(4 * 16))
        reply.more(b"", True)

    def stores(self, answer_id: str) -> Storing:
        return Storing.NOT


def died_of(sid: int, deaths: int, *, to_its_end: bool = False) -> messages.Generate:
    return messages.Generate(
        sid, "/v1/completions", "r", b"%d" % sid, movable=True, deaths=deaths, to_its_end=to_its_end
    )


def flags_of(worker: Worker, sid: int) -> list[int]:
    steps = [step for step in worker.sent if isinstance(step, messages.Step)]
    return [flags for step in steps for of, flags, *_ in step.frames if of == sid]


@pytest_asyncio.fixture
async def answering() -> AsyncIterator[Worker]:
    async with asyncio.TaskGroup() as tasks:
        worker = Worker(tasks)
        worker.table._engine = worker.engine = Answering()  # type: ignore[assignment]
        yield worker
        worker.table.refuse_all("worker_unavailable", "over")


async def test_the_gateway_hears_that_it_is_taken_before_the_engine_has_it(
    answering: Worker,
) -> None:
    answering.table.accept(1, answering.session, died_of(7, 1))
    answering.table.accept(2, answering.session, died_of(8, 0))
    await turns()
    assert flags_of(answering, 7) == [messages.TAKEN] and not flags_of(answering, 8)


@pytest.mark.parametrize("step", ["head", "tokens", "end"])
@pytest.mark.parametrize("to_its_end", [False, True])
async def test_another_trial_may_begin_once_the_request_has_made_progress_or_has_ended(
    answering: Worker, step: str, to_its_end: bool
) -> None:
    table, engine = answering.table, answering.engine
    assert isinstance(engine, Answering)
    table.accept(1, answering.session, died_of(7, 2, to_its_end=to_its_end))
    table.start(1, None)
    await turns()
    assert not table.admits(died_of(8, 1)) and table.admits(died_of(8, 0))
    engine.steps.put_nowait(step)
    await turns()
    assert table.admits(died_of(8, 2)) is (step == "end" or not to_its_end)


async def test_another_trial_may_begin_once_the_gateway_has_cancelled_the_request(
    answering: Worker,
) -> None:
    answering.table.accept(1, answering.session, died_of(7, 2))
    answering.table.cancel(answering.session, 7)
    assert answering.table.admits(died_of(8, 2))


async def test_that_the_client_has_the_id_of_what_is_made_later_ends_no_trial(
    answering: Worker,
) -> None:
    table, engine = answering.table, answering.engine
    assert isinstance(engine, Answering)
    table.accept(1, answering.session, died_of(7, 2))
    table.start(1, None)
    engine.steps.put_nowait("answered")
    await turns()
    assert not table.admits(died_of(8, 1))
    engine.steps.put_nowait("tokens")
    await turns()
    assert table.admits(died_of(8, 1))
