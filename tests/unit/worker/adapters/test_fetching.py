"""Shell. How an adapter's files are brought, over a real folder and a real disk cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from shared.adapters.checks import AdapterFacts
from shared.adapters.identity import AdapterRef
from shared.errors import AdapterNotFound, InvalidAdapter
from shared.stores.local import LocalStore
from tests.unit.worker.disk.whole_check import WholeCheck
from worker.adapters.fetching import AdapterFetcher, FetchHint
from worker.adapters.load_times import LoadTimes
from worker.disk.cache import DiskCache
from worker.disk.download import Source
from worker.engine.base import Engine, Loaded

WEIGHTS = "adapter_model.safetensors"


class NotingEngine:
    """What an engine is told, in order: (what, id), and the weights that it could read then."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []
        self.read: list[bytes] = []

    def read_ahead(self, ref: AdapterRef, int_id: int, folder: Path) -> None:
        self.told.append(("read ahead", int_id))
        self.read.append((folder / WEIGHTS).read_bytes())

    def forget(self, int_id: int) -> None:
        self.told.append(("forget", int_id))

    async def prepare(self, adapter: Loaded) -> None:
        self.told.append(("prepare", adapter.int_id))


class OneAdapter:
    """A store with one adapter, whose check may fail, and a worker that fetches it."""

    def __init__(self, folder: Path, peers: tuple[Source, ...] = ()) -> None:
        self.folder, self.engine, self.valid = folder, NotingEngine(), True
        (folder / "store" / "a").mkdir(parents=True)
        (folder / "store" / "a" / "adapter_config.json").write_text("{}")
        (folder / "store" / "a" / WEIGHTS).write_bytes(b"values")
        self.check = WholeCheck(self._check)
        self.store = LocalStore(str(folder / "store"))
        self._fetcher = AdapterFetcher(
            cast(Engine, self.engine),
            self.store,
            DiskCache(folder / "cache", 0),
            lambda ref, endpoints: peers,
            LoadTimes(),
        )

    def _check(self, folder: Path) -> AdapterFacts:
        self.engine.told.append(("check", 0))
        if not self.valid:
            raise InvalidAdapter("It is bad.", "nonfinite")
        return AdapterFacts(8, 6, ())

    async def fetch(self, ahead: bool = True) -> Callable[[], Any]:
        stored = await self.store.find("a")
        assert stored is not None
        ref = AdapterRef("base", "a", stored.digest)
        fetched = await self._fetcher.fetch(ref, FetchHint(stored), self.check, ahead=ahead)
        self.leave = lambda: self._fetcher.leave(fetched)
        return lambda: self._fetcher.prepare(ref, fetched)


async def test_the_engine_may_read_an_adapter_while_it_is_checked(tmp_path: Path) -> None:
    one = OneAdapter(tmp_path)
    prepare = await one.fetch()
    await prepare()
    [number] = {number for what, number in one.engine.told if what != "check"}
    assert one.engine.told == [("read ahead", number), ("check", 0), ("prepare", number)]
    assert one.engine.read == [b"values"]


async def test_what_was_read_of_a_bad_adapter_is_forgotten(tmp_path: Path) -> None:
    one = OneAdapter(tmp_path)
    one.valid = False
    with pytest.raises(InvalidAdapter):
        await one.fetch()
    (_, number), _, last = one.engine.told
    assert last == ("forget", number)


async def test_what_is_wanted_on_disk_only_is_not_read_or_is_forgotten(tmp_path: Path) -> None:
    one = OneAdapter(tmp_path)
    await one.fetch(ahead=False)
    assert one.engine.told == [("check", 0)]
    one.leave()
    assert one.engine.told[1][0] == "forget"


async def test_files_that_were_there_are_not_read_ahead(tmp_path: Path) -> None:
    one = OneAdapter(tmp_path)
    await one.fetch(ahead=False)
    await one.fetch()
    assert all(what == "check" for what, _ in one.engine.told)


async def test_a_download_that_failed_before_it_was_whole_leaves_nothing_to_forget(
    tmp_path: Path,
) -> None:
    one = OneAdapter(tmp_path)
    stored = await one.store.find("a")
    assert stored is not None
    (tmp_path / "store" / "a" / WEIGHTS).write_bytes(b"others")
    one.store.find = lambda name: _at_once(stored)  # type: ignore[method-assign]
    with pytest.raises(AdapterNotFound):
        await one.fetch()
    assert one.engine.told == []


async def _at_once(stored: Any) -> Any:
    return stored


async def test_bytes_of_peers_are_checked_first(tmp_path: Path) -> None:
    """If they are wrong, they are downloaded once more from the store."""

    class Peer:
        async def fetch(self, adapter: Any, into: Path, transfer: Any = None) -> None:
            await one.store.fetch(adapter, into, transfer)

    one = OneAdapter(tmp_path, (Peer(),))
    await one.fetch()
    assert one.engine.told == [("check", 0)]
