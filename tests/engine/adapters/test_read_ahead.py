"""Shell. Adapters that the engine's process reads while they are checked. The templates are not
vLLM's own here: a test decides which headers are known, and when a file has been read.
"""

from __future__ import annotations

import asyncio
import os
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
from worker.engine.vllm.adapters import front_end
from worker.engine.vllm.adapters.front_end import Adapters
from worker.engine.vllm.adapters.ready_socket import ReadySocket, tell
from worker.engine.vllm.worker_extension import _StagingArea


class Templates:
    """Reads a folder once `go_on` is set. `known`: whether its header is."""

    def __init__(self) -> None:
        self.known, self.read_by_vllm = True, list[str]()
        self.go_on, self.reads = threading.Event(), threading.Event()

    def read_known(self, folder: Path, int_id: int) -> Any | None:
        self.reads.set()
        assert self.go_on.wait(60.0)
        if not folder.is_dir():
            raise FileNotFoundError(folder)
        return SimpleNamespace(loras={}, folder=folder.name) if self.known else None

    def read(self, folder: Path, int_id: int, load_by_vllm: Any) -> Any:
        self.read_by_vllm.append(folder.name)
        return SimpleNamespace(loras={}, folder=folder.name)


class Area(_StagingArea):
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ready, self._bytes, self._failed, self._wanted = {}, {}, {}, {}
        self.templates = self._templates = Templates()  # type: ignore[assignment]
        self._thread = ThreadPoolExecutor(1)
        self.ready_socket = ""

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
    assert area.take(1) is None and not area.templates.read_by_vllm
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


def test_nothing_stays_of_one_that_is_refused(area: Area, folders: tuple[str, str]) -> None:
    area.start("a", 1, folders[0], False)
    area.start("b", 2, folders[0], False)
    area.drop(2)
    area.done()
    area.drop(1)
    assert (area._ready, area._bytes, area._wanted, area._failed) == ({}, {}, {}, {})


class NotingEngine:
    """Notes what each call asks for. `state` is what each of `ranks` says of all that is watched.
    The last argument of a call is where the ranks tell of what is ready.
    """

    def __init__(self, state: str | None = "", ranks: int = 1) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.state, self._ranks = state, ranks
        self.called = asyncio.Event()

    async def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        self.calls.append((method, *args))
        self.called.set()
        return [[self.state for _ in args[1]] for _ in range(self._ranks)]


@asynccontextmanager
async def asked_of(engine: NotingEngine) -> AsyncIterator[Adapters]:
    adapters = Adapters(cast(Any, engine))
    try:
        async with asyncio.timeout(60.0):
            yield adapters
    finally:
        adapters.close()
        if adapters._poll is not None:
            adapters._poll.cancel()
    assert not adapters._told and not adapters._preparing, "nothing stays of what is over"


def loaded(int_id: int = 1) -> Loaded:
    return Loaded(REF, int_id, Path("/entry"), 8, 0, 0.0, 0.0)


REF = AdapterRef("base", "a", "0" * 16)


@pytest.fixture
def never_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_end, "ASK_AGAIN_S", 3600.0)


@pytest.mark.usefixtures("never_again")
async def test_what_is_asked_for_does_not_wait_until_the_next_look() -> None:
    engine = NotingEngine()
    async with asked_of(engine) as adapters:
        adapters.read_ahead(REF, 1, Path("/partial"))
        await engine.called.wait()
        await adapters.prepare(loaded())
    assert [call[1][0][2:] for call in engine.calls] == [("/partial", False), ("/entry", True)]


@pytest.mark.usefixtures("never_again")
async def test_an_adapter_is_ready_once_the_last_rank_has_told_of_it() -> None:
    engine = NotingEngine(None, ranks=2)
    async with asked_of(engine) as adapters:
        prepared = asyncio.create_task(adapters.prepare(loaded()))
        await engine.called.wait()
        socket = engine.calls[0][-1]
        tell(socket, 7, "")  # nobody wants it
        tell(socket, 1, "")
        while len(adapters._told[1]) < 1:
            await asyncio.sleep(0)
        assert not prepared.done()
        tell(socket, 1, "")
        await prepared
        assert adapters._poll is not None
        await adapters._poll  # nobody is left to ask for
    assert len(engine.calls) == 1


@pytest.mark.usefixtures("never_again")
async def test_what_was_read_ahead_on_all_ranks_is_ready_without_a_further_call() -> None:
    engine = NotingEngine(None)
    async with asked_of(engine) as adapters:
        adapters.read_ahead(REF, 1, Path("/partial"))
        await engine.called.wait()
        tell(engine.calls[0][-1], 1, "")
        while not adapters._told[1]:
            await asyncio.sleep(0)
        await adapters.prepare(loaded())
    assert len(engine.calls) == 1


async def test_a_rank_whose_words_are_lost_is_asked() -> None:
    engine = NotingEngine(None)
    async with asked_of(engine) as adapters:
        prepared = asyncio.create_task(adapters.prepare(loaded()))
        await engine.called.wait()
        engine.state = ""
        await prepared


@pytest.mark.usefixtures("never_again")
async def test_the_reason_of_one_rank_is_the_answer() -> None:
    engine = NotingEngine(None, ranks=2)
    async with asked_of(engine) as adapters:
        prepared = asyncio.create_task(adapters.prepare(loaded()))
        await engine.called.wait()
        tell(engine.calls[0][-1], 1, "")
        tell(engine.calls[0][-1], 1, "it has no weights, " + "really " * 1000)
        with pytest.raises(InvalidAdapter, match="it has no weights"):
            await prepared


@pytest.mark.usefixtures("never_again")
async def test_what_is_no_message_changes_nothing() -> None:
    engine = NotingEngine(None)
    async with asked_of(engine) as adapters:
        prepared = asyncio.create_task(adapters.prepare(loaded()))
        await engine.called.wait()
        path = engine.calls[0][-1]
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as foreign:
            for data in (b"", b"[]", b"[1]", b'["1",""]', b"\xff" * 10_000, b'[1,""'):
                foreign.sendto(data, path)
        tell(path, 1, "")
        await prepared
    tell(path, 1, "")  # nobody listens any more
    assert not os.path.exists(path)  # noqa: ASYNC240


async def test_a_rank_tells_of_what_it_has_prepared_and_of_what_it_cannot(
    area: Area, folders: tuple[str, str]
) -> None:
    told: list[tuple[int, str]] = []
    all_told = asyncio.Event()

    def on_ready(int_id: int, words: str) -> None:
        told.append((int_id, words))
        if len(told) == 2:
            all_told.set()

    def refuse(*_: object) -> Any:
        raise RuntimeError("it has no weights")

    ready = ReadySocket(on_ready)
    area.ready_socket = ready.path
    area.templates.go_on.set()
    area.start("a", 1, folders[0], False)
    area.done()
    area.templates.known, area.templates.read = False, refuse  # type: ignore[method-assign]
    area.start("b", 2, folders[0], False)  # it has to wait until it is checked
    area.done()
    area.start("b", 2, folders[1], True)
    async with asyncio.timeout(60.0):
        await all_told.wait()
    ready.close()
    assert told == [(1, ""), (2, "it has no weights")]
