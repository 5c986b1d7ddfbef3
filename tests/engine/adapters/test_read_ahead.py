"""Shell. Adapters that the engine's process reads while they are checked. The templates are not
vLLM's own here: a test decides which headers are known, and when a file has been read.
"""

from __future__ import annotations

import asyncio
import os
import queue
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from shared.adapters.identity import AdapterRef
from shared.errors import InvalidAdapter
from worker.engine.base import Loaded
from worker.engine.vllm import worker_extension
from worker.engine.vllm.adapters import front_end
from worker.engine.vllm.adapters.front_end import Adapters
from worker.engine.vllm.adapters.prepare_link import (
    FOLDER_ENV,
    Drop,
    PrepareLink,
    RankLink,
    Ready,
    Request,
    ToPrepare,
    rank_link,
)
from worker.engine.vllm.worker_extension import STAGED_BYTES, _StagingArea


class Templates:
    """Reads a folder once `go_on` is set. `known`: whether its header is."""

    def __init__(self) -> None:
        self.known, self.read_by_vllm, self.weights = True, list[str](), 0
        self.go_on, self.reads = threading.Event(), threading.Event()

    def read_known(self, folder: Path, int_id: int) -> Any | None:
        self.reads.set()
        assert self.go_on.wait(60.0)
        if not folder.is_dir():
            raise FileNotFoundError(folder)
        return self._made(folder) if self.known else None

    def read(self, folder: Path, int_id: int, load_by_vllm: Any) -> Any:
        self.read_by_vllm.append(folder.name)
        return self._made(folder)

    def _made(self, folder: Path) -> Any:
        layer = SimpleNamespace(lora_a=SimpleNamespace(nbytes=self.weights), lora_b=None)
        return SimpleNamespace(loras={"layer": layer}, folder=folder.name)


class Area(_StagingArea):
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ready, self._bytes, self._failed, self._wanted = {}, {}, {}, {}
        self.templates = self._templates = Templates()  # type: ignore[assignment]
        self._thread = ThreadPoolExecutor(1)
        self.link = None

    def done(self) -> None:
        self.templates.go_on.set()
        self._thread.submit(lambda: None).result(60.0)


@pytest.fixture
def area() -> Iterator[Area]:
    made = Area()
    yield made
    made.done()
    made._thread.shutdown()


@pytest.fixture
def folders(tmp_path: Path) -> tuple[str, str]:
    """Where the files are before they are checked, and afterwards."""
    (tmp_path / "partial").mkdir()
    (tmp_path / "entry").mkdir()
    return str(tmp_path / "partial"), str(tmp_path / "entry")


def test_a_known_adapter_is_ready_as_soon_as_it_is_checked(
    area: Area, folders: tuple[str, str]
) -> None:
    area.start("a", 1, folders[0], False)
    area.done()
    area.start("a", 1, folders[1], True)
    assert area.state(1) == "" and area.take(1).folder == "partial"
    assert not area.templates.read_by_vllm


def test_an_adapter_of_a_new_kind_waits_until_it_is_checked(
    area: Area, folders: tuple[str, str]
) -> None:
    area.templates.known = False
    area.start("a", 1, folders[0], False)
    area.done()
    assert not area._ready and not area.templates.read_by_vllm
    area.start("a", 1, folders[1], True)
    area.done()
    assert area.state(1) == "" and area.templates.read_by_vllm == ["entry"]


@pytest.mark.parametrize("known", [True, False])
def test_one_that_is_checked_while_it_is_read_comes_from_its_new_place(
    area: Area, folders: tuple[str, str], known: bool
) -> None:
    area.templates.known = known
    area.start("a", 1, folders[0], False)
    assert area.templates.reads.wait(60.0)
    Path(folders[0]).rmdir()
    area.start("a", 1, folders[1], True)
    assert area.state(1) is None
    area.done()
    assert area.state(1) == "" and area.take(1).folder == "entry"


def test_memory_for_the_next_adapter_is_pinned_only_after_this_one_is_ready(
    area: Area, folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = list[tuple[int, str | None]]()
    monkeypatch.setattr(
        worker_extension, "pin_spare", lambda count: pinned.append((count, area.state(1)))
    )
    area.templates.weights = 3
    area.start("a", 1, folders[1], True)
    area.done()
    assert pinned == [(3, "")]


def test_nothing_stays_of_one_that_is_refused(area: Area, folders: tuple[str, str]) -> None:
    area.start("a", 1, folders[0], False)
    area.start("b", 2, folders[0], False)
    area.drop(2)
    area.done()
    area.drop(1)
    assert (area._ready, area._bytes, area._wanted, area._failed) == ({}, {}, {}, {})


class NotingEngine:
    """Notes what each call asks for. `state` is what each of `ranks` says of all that is watched.
    `links` are those of them that the link reaches, and `requests` what came on it.
    """

    def __init__(self, state: str | None = "", ranks: int = 1, linked: int | None = None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.state, self.ranks = state, ranks
        self.called = asyncio.Event()
        self.requests = queue.SimpleQueue[Request]()
        self.linked = ranks if linked is None else linked
        self.links: list[RankLink] = []

    async def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        self.calls.append((method, *args))
        self.called.set()
        return [[self.state for _ in args[1]] for _ in range(self.ranks)]

    async def request(self) -> Request:
        """The next one on the link."""
        return await asyncio.to_thread(self.requests.get, timeout=60.0)

    def tell(self, int_id: int, failure: str = "", rank: int = 0) -> None:
        self.links[rank].tell(int_id, failure)


@asynccontextmanager
async def asked_of(engine: NotingEngine) -> AsyncIterator[Adapters]:
    link = PrepareLink()
    folder = Path(os.environ[FOLDER_ENV])
    engine.links = [RankLink(folder, engine.requests.put) for _ in range(engine.linked)]
    adapters = Adapters(cast(Any, engine), link, engine.ranks)
    try:
        async with asyncio.timeout(60.0):
            yield adapters
    finally:
        link.close()
        if adapters._poll is not None:
            adapters._poll.cancel()
    assert not adapters._told and not adapters._preparing, "nothing stays of what is over"
    assert FOLDER_ENV not in os.environ
    assert not folder.exists()  # noqa: ASYNC240
    engine.tell(1) if engine.links else None  # nobody listens any more


def loaded(int_id: int = 1) -> Loaded:
    return Loaded(REF, int_id, Path("/entry"), 8, 0, 0.0, 0.0)


REF = AdapterRef("base", "a", "0" * 16)
AHEAD = ToPrepare(f"base:a@{'0' * 16}", 1, "/partial", False)
CHECKED = ToPrepare(f"base:a@{'0' * 16}", 1, "/entry", True)


@pytest.fixture
def never_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_end, "ASK_AGAIN_S", 3600.0)


@pytest.mark.usefixtures("never_asked")
async def test_an_adapter_is_ready_once_the_last_rank_has_told_of_it_without_a_call() -> None:
    engine = NotingEngine(None, ranks=2)
    async with asked_of(engine) as adapters:
        prepared = asyncio.create_task(adapters.prepare(loaded()))
        assert [await engine.request() for _ in range(2)] == [CHECKED] * 2
        engine.tell(7)  # nobody wants it
        engine.tell(1)
        while len(adapters._told[1]) < 1:
            await asyncio.sleep(0)
        assert not prepared.done()
        engine.tell(1, rank=1)
        await prepared
        assert adapters._poll is not None
        await adapters._poll  # nobody is left to ask for
    assert not engine.calls


@pytest.mark.usefixtures("never_asked")
async def test_what_was_read_ahead_on_all_ranks_is_ready_at_once() -> None:
    engine = NotingEngine(None)
    async with asked_of(engine) as adapters:
        adapters.read_ahead(REF, 1, Path("/partial"))
        assert await engine.request() == AHEAD
        engine.tell(1)
        while not adapters._told[1]:
            await asyncio.sleep(0)
        await adapters.prepare(loaded())
    assert not engine.calls and engine.requests.empty()


@pytest.mark.usefixtures("never_asked")
async def test_one_that_is_not_wanted_any_more_is_dropped_and_forgotten() -> None:
    engine = NotingEngine(None)
    async with asked_of(engine) as adapters:
        adapters.read_ahead(REF, 1, Path("/partial"))
        adapters.forget(1)
        assert [await engine.request() for _ in range(2)] == [AHEAD, Drop(1)]
        engine.tell(1)  # it was ready just then


async def test_one_whose_caller_has_left_holds_up_no_other() -> None:
    engine = NotingEngine(None)
    async with asked_of(engine) as adapters:
        left = asyncio.create_task(adapters.prepare(loaded()))
        assert await engine.request() == CHECKED
        other = asyncio.create_task(adapters.prepare(loaded(2)))
        left.cancel()
        await asyncio.wait([left])
        adapters.forget(1)
        engine.state = ""  # neither is being prepared there
        await other


async def test_a_rank_whose_words_are_lost_is_asked() -> None:
    engine = NotingEngine(None)
    async with asked_of(engine) as adapters:
        prepared = asyncio.create_task(adapters.prepare(loaded()))
        await engine.called.wait()
        engine.state = ""
        await prepared


@pytest.mark.parametrize(("ranks", "linked"), [(1, 0), (2, 1), (1, 2)])
async def test_ranks_that_the_link_does_not_reach_are_called(ranks: int, linked: int) -> None:
    engine = NotingEngine(None, ranks, linked)
    async with asked_of(engine) as adapters:
        adapters.read_ahead(REF, 1, Path("/partial"))
        adapters.read_ahead(REF, 2, Path("/partial"))
        adapters.forget(2)
        await engine.called.wait()
        prepared = asyncio.create_task(adapters.prepare(loaded()))
        engine.state = ""
        await prepared
    started = [start[2:] for call in engine.calls for start in call[1]]
    assert started[:2] == [("/partial", False), ("/entry", True)]
    assert [2] in [list(call[3]) for call in engine.calls] and engine.requests.empty()


async def test_a_rank_whose_words_are_lost_is_asked_although_others_keep_coming() -> None:
    engine = NotingEngine()
    async with asked_of(engine) as adapters:
        prepared = asyncio.create_task(adapters.prepare(loaded()))
        number = 1
        while not prepared.done():
            number += 1
            adapters.read_ahead(REF, number, Path("/partial"))
            adapters.forget(number)
            await asyncio.sleep(0.002)
        await prepared


async def test_what_a_full_link_did_not_take_does_not_make_others_count_as_ready() -> None:
    """The rank says "ready" of what it never heard of. So a call begins all that it asks for."""
    engine = NotingEngine()
    async with asked_of(engine) as adapters:
        held = threading.Event()
        engine.links[0]._on_request = lambda _: held.wait(60) and None  # type: ignore[assignment]
        everyone = [asyncio.create_task(adapters.prepare(loaded(n))) for n in range(1, 40)]
        await asyncio.gather(*everyone)
        held.set()
    for _, starts, watched, _ in engine.calls:
        assert {*watched} <= {int_id for _, int_id, *_ in starts}


@pytest.mark.parametrize("waits", [False, True])
async def test_what_is_forgotten_after_it_was_begun_by_a_call_is_dropped_by_the_next(
    waits: bool,
) -> None:
    """The datagram may overtake the call, which waits for a step."""
    engine = NotingEngine(linked=0)
    async with asked_of(engine) as adapters:
        adapters.read_ahead(REF, 1, Path("/partial"))
        if waits:
            await engine.called.wait()
        adapters._link.send = lambda *_: True  # type: ignore[method-assign]
        adapters.forget(1)
        assert adapters._poll is not None
        await adapters._poll
    begun = [start[1] for call in engine.calls for start in call[1]]
    dropped = [int_id for call in engine.calls for int_id in call[3]]
    assert (begun, dropped) == (([1], [1]) if waits else ([], []))
    assert not adapters._called


async def test_one_that_is_being_read_is_not_ready_because_there_is_no_room_for_others(
    area: Area, folders: tuple[str, str]
) -> None:
    told: list[Ready] = []
    link = PrepareLink()
    link.listen(told.append)
    area.link = rank_link(area._on_request)
    area.start("a", 1, folders[0], False)
    area._bytes[9] = STAGED_BYTES + 1
    area.start("a", 1, folders[1], True)
    area.start("b", 2, folders[1], True)
    async with asyncio.timeout(60.0):
        while not told:
            await asyncio.sleep(0)
        assert [ready.int_id for ready in told] == [2]
        await asyncio.to_thread(area.done)
        while len(told) < 2:
            await asyncio.sleep(0)
    link.close()


async def test_any_words_can_be_told() -> None:
    told: list[Ready] = []
    link = PrepareLink()
    link.listen(told.append)
    rank = rank_link(lambda _: None)
    assert rank is not None
    rank.tell(1, "\udcff" * 501)
    async with asyncio.timeout(60.0):
        while not told:
            await asyncio.sleep(0)
    link.close()
    assert told[0].failure == "?" * 500


async def test_a_rank_that_has_ended_is_called() -> None:
    engine = NotingEngine()
    async with asked_of(engine) as adapters:
        engine.links[0]._socket.shutdown(socket.SHUT_RD)
        await adapters.prepare(loaded())
    assert engine.calls


@pytest.mark.usefixtures("never_asked")
async def test_the_reason_of_one_rank_is_the_answer() -> None:
    engine = NotingEngine(None, ranks=2)
    async with asked_of(engine) as adapters:
        prepared = asyncio.create_task(adapters.prepare(loaded()))
        engine.tell(1)
        engine.tell(1, "it has no weights, " + "really " * 1000, rank=1)
        with pytest.raises(InvalidAdapter, match="it has no weights"):
            await prepared


@pytest.mark.usefixtures("never_asked")
async def test_what_is_no_message_changes_nothing() -> None:
    engine = NotingEngine(None)
    async with asked_of(engine) as adapters:
        prepared = asyncio.create_task(adapters.prepare(loaded()))
        folder = Path(os.environ[FOLDER_ENV])
        assert await engine.request() == CHECKED
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as foreign:
            for path in folder.iterdir():  # noqa: ASYNC240
                for data in (b"", b"[]", b'{"type":"ready"}', b"\xff" * 10_000, b"{"):
                    foreign.sendto(data, str(path))
        adapters.forget(9)
        assert await engine.request() == Drop(9)
        engine.tell(1)
        await prepared


async def test_a_rank_tells_of_what_it_has_prepared_and_of_what_it_cannot(
    area: Area, folders: tuple[str, str]
) -> None:
    told: list[Ready] = []
    all_told = asyncio.Event()

    def on_ready(ready: Ready) -> None:
        told.append(ready)
        if len(told) == 3:
            all_told.set()

    def refuse(*_: object) -> Any:
        raise RuntimeError("it has no weights")

    link = PrepareLink()
    link.listen(on_ready)
    area.link = rank_link(area._on_request)
    area.templates.go_on.set()
    assert link.send(ToPrepare("a", 1, folders[0], False), 1)
    async with asyncio.timeout(60.0):
        while not told:
            await asyncio.sleep(0)
        area.templates.known, area.templates.read = False, refuse  # type: ignore[method-assign]
        for start in (ToPrepare("b", 2, folders[0], False), ToPrepare("b", 2, folders[1], True)):
            assert link.send(start, 1)
        while len(told) < 2:
            await asyncio.sleep(0)
        area._bytes[9] = STAGED_BYTES + 1
        assert link.send(
            ToPrepare("c", 3, folders[0], False), 1
        )  # it has to wait until it is checked
        assert link.send(ToPrepare("c", 3, folders[1], True), 1)
        await all_told.wait()
        assert link.send(Drop(1), 1)
        while 1 in area._ready:
            await asyncio.sleep(0)
    link.close()
    words = [(ready.int_id, ready.failure) for ready in told]
    assert words == [(1, ""), (2, "it has no weights"), (3, "")]
