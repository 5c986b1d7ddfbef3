"""Shell. Adapters that the engine's process reads while they are checked. The templates are not
vLLM's own here: a test decides which headers are known, and when a file has been read.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from shared.adapters.identity import AdapterRef
from worker.engine.base import Loaded
from worker.engine.vllm import adapters
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
    """Notes what each call asks for. All that is watched is ready."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.called = asyncio.Event()

    async def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        self.calls.append((method, *args))
        self.called.set()
        return [["" for _ in args[1]]]


async def test_what_is_asked_for_does_not_wait_until_the_next_look(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(adapters, "POLL_S", 3600.0)
    engine = NotingEngine()
    asked = adapters.Adapters(cast(Any, engine))
    ref = AdapterRef("base", "a", "0" * 16)
    asked.read_ahead(ref, 1, Path("/partial"))
    async with asyncio.timeout(60.0):
        await engine.called.wait()
        await asked.prepare(Loaded(ref, 1, Path("/entry"), 8, 0, 0.0, 0.0))
    assert [call[1][0][2:] for call in engine.calls] == [("/partial", False), ("/entry", True)]
    assert asked._poll is not None
    asked._poll.cancel()
