"""Shell. The disk cache over real folders. Two caches with one root stand for two processes,
because flock tells them apart by descriptor.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shared.adapters.checks import AdapterFacts
from shared.adapters.identity import AdapterRef, StoredAdapter, StoredFile
from shared.errors import AdapterNotFound, InvalidAdapter, StoreUnavailable
from shared.stores import transfer as transfer_module
from shared.stores.local import LocalStore
from shared.stores.object_store import StoreProblem, unavailable
from shared.stores.transfer import (
    PARTS_PER_ADAPTER,
    FilePart,
    PartBudget,
    Transfer,
    TransferRetries,
    parts_of,
)
from tests.store_servers import LocalPlace
from tests.unit.worker.disk.whole_check import WholeCheck
from worker.disk import cache as cache_module
from worker.disk import layout
from worker.disk.cache import DiskCache
from worker.disk.download import PeerFailed
from worker.disk.folder import CacheFolder

PART = 64 * 1024
PIECE_BYTES = PART // 4
WEIGHTS = "adapter_model.safetensors"
pytestmark = pytest.mark.usefixtures("small_parts")


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer_module, "PART_BYTES", PART)


class WatchedStore(LocalStore):
    """A folder whose bytes come as a stream. It notes what is read of it. A test can make it hang,
    or fail after a number of reads.
    """

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.asked: list[tuple[str, int]] = []
        self.limit = 10**9
        self.failure: Exception | None = None
        self.fails_once: Callable[[], object] = lambda: True
        self.at_limit, self.go = asyncio.Event(), asyncio.Event()

    async def fetch(
        self, adapter: StoredAdapter, into: Path, transfer: Transfer | None = None
    ) -> None:
        await transfer_module.fetch_adapter(adapter, into, self._stream, transfer)

    @asynccontextmanager
    async def _stream(
        self, adapter_name: str, file: StoredFile, offset: int, length: int
    ) -> AsyncIterator[AsyncGenerator[bytes, None]]:
        if len(self.asked) >= self.limit:
            self.at_limit.set()
            if self.failure is not None:
                while not self.fails_once():
                    await asyncio.sleep(0)
                raise self.failure
            await self.go.wait()
        self.asked.append((file.path, offset))
        with self._listed(adapter_name, file, offset) as handle:

            async def pieces() -> AsyncGenerator[bytes, None]:
                for at in range(0, length, PIECE_BYTES):
                    yield handle.read(min(PIECE_BYTES, length - at))

            yield pieces()


class Host:
    """A store folder and a cache folder."""

    def __init__(self, folder: Path) -> None:
        self.place = LocalPlace(folder / "store")
        self.root = folder / "cache"
        self.checked: list[Path] = []
        self.check = WholeCheck(self._check)

    def cache(self, budget_bytes: int = 0, stall_s: float = 5.0, tries: int = 1) -> DiskCache:
        return DiskCache(self.root, budget_bytes, TransferRetries(stall_s, tries))

    def store(self) -> WatchedStore:
        return WatchedStore(str(self.place.folder))

    def put(self, name: str, weights: bytes) -> None:
        self.place.put(f"{name}/adapter_config.json", b'{"r": 8}')
        self.place.put(f"{name}/{WEIGHTS}", weights)

    def _check(self, folder: Path) -> AdapterFacts:
        self.checked.append(folder)
        if (folder / WEIGHTS).read_bytes().startswith(b"bad"):
            raise InvalidAdapter("It is bad.", "nonfinite")
        return AdapterFacts(8, 0, ())

    async def look_up(self, name: str) -> tuple[AdapterRef, StoredAdapter]:
        stored = await self.store().find(name)
        assert stored is not None
        return AdapterRef("base", name, stored.digest), stored

    def files(self, kind: str) -> list[Path]:
        return [path for path in (self.root / kind).rglob("*") if path.is_file()]


def end(cache: DiskCache) -> None:
    """The process ends, once it has done what it does in the background."""
    cache.close()
    cache._threads.shutdown(wait=True)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


async def test_what_was_fetched_is_served_without_the_store(host: Host) -> None:
    weights = os.urandom(5 * PART + 123)
    host.put("a", weights)
    ref, stored = await host.look_up("a")
    first = await host.cache().fetch(ref, stored, host.store(), host.check)
    assert (
        (first.folder / WEIGHTS).read_bytes() == weights
        and first.size_bytes == stored.size_bytes
        and first.facts.rank == 8
    )
    later = await host.cache().open(ref, host.check)
    assert later is not None and later.folder == first.folder and later.content == first.content
    assert host.files("partial") == host.files("trash") == []


@pytest.mark.parametrize("gone", ["", "entries", "partial", "trash"])
async def test_folders_that_somebody_removed_meanwhile_are_made_again(
    host: Host, gone: str
) -> None:
    host.put("a", b"weights")
    host.put("b", b"weights of another")
    before, cache = host.cache(), host.cache()
    await before.fetch(*await host.look_up("a"), host.store(), host.check)
    end(before)
    shutil.rmtree(host.root / gone)
    found = await cache.fetch(*await host.look_up("b"), host.store(), host.check)
    assert (found.folder / WEIGHTS).read_bytes() == b"weights of another"


async def test_equal_content_has_an_equal_hash_whatever_its_version(host: Host) -> None:
    weights = os.urandom(PART)
    host.put("a", weights)
    cache = host.cache()
    before = await cache.fetch(*await host.look_up("a"), host.store(), host.check)
    host.put("a", weights)
    after = await cache.fetch(*await host.look_up("a"), host.store(), host.check)
    assert before.folder != after.folder and before.content == after.content


async def test_of_two_processes_only_one_downloads(host: Host) -> None:
    host.put("a", os.urandom(3 * PART))
    ref, stored = await host.look_up("a")
    stores = [host.store(), host.store()]
    fetched = await asyncio.gather(
        *(host.cache().fetch(ref, stored, store, host.check) for store in stores)
    )
    assert (
        sorted(len(store.asked) for store in stores) == [0, 4]
        and fetched[0].folder == fetched[1].folder
    )


async def test_who_waits_takes_over_from_a_download_that_dies_and_fetches_only_the_rest(
    host: Host,
) -> None:
    weights = os.urandom(6 * PART)
    host.put("a", weights)
    ref, stored = await host.look_up("a")
    first, second = host.store(), host.store()
    first.limit = 4
    dying = asyncio.create_task(host.cache().fetch(ref, stored, first, host.check))
    await first.at_limit.wait()
    waiting = asyncio.create_task(host.cache().fetch(ref, stored, second, host.check))
    async with asyncio.timeout(10):
        while (
            len(
                [
                    p
                    for p in host.files("partial")
                    if p.name == "journal" and p.read_bytes().count(b"\n") > 1
                ]
            )
            < 1
        ):
            await asyncio.sleep(0.001)
        assert not waiting.done()
        dying.cancel()
        got = await waiting
    assert (got.folder / WEIGHTS).read_bytes() == weights
    assert 0 < len(second.asked) < 7


@pytest.mark.parametrize("by_s", [-86_400.0, 86_400.0], ids=["back", "forward"])
async def test_who_waits_for_a_download_is_not_misled_by_a_clock_that_is_set(
    host: Host, monkeypatch: pytest.MonkeyPatch, by_s: float
) -> None:
    """It waits for as long as a download may stand still, no more and no less."""
    looks, look = asyncio.Semaphore(0), CacheFolder.moved_at
    loop = asyncio.get_running_loop()

    def noted(folder: CacheFolder, key: str) -> float | None:
        loop.call_soon_threadsafe(looks.release)
        return look(folder, key)

    monkeypatch.setattr(CacheFolder, "moved_at", noted)
    monkeypatch.setattr(cache_module, "SETTLE_TIME_S", 0.5)
    host.put("a", os.urandom(3 * PART))
    ref, stored = await host.look_up("a")
    stuck = host.store()
    stuck.limit = 2
    first = asyncio.create_task(host.cache().fetch(ref, stored, stuck, host.check))
    await stuck.at_limit.wait()
    waiting = asyncio.create_task(
        host.cache(stall_s=0.0).fetch(ref, stored, host.store(), host.check)
    )
    async with asyncio.timeout(10):
        for _ in range(2):  # the first one has been judged by the second
            await looks.acquire()
        now = time.time
        monkeypatch.setattr(time, "time", lambda: now() + by_s)
        for _ in range(5):
            await looks.acquire()
        assert not waiting.done()
        with pytest.raises(StoreUnavailable, match="hangs"):
            await waiting
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)


async def test_a_part_that_was_damaged_while_it_lay_there_is_fetched_again(host: Host) -> None:
    weights = os.urandom(4 * PART)
    host.put("a", weights)
    ref, stored = await host.look_up("a")
    cut = host.store()
    cut.limit, cut.failure = 4, unavailable(StoreProblem.UNREACHABLE)
    with pytest.raises(StoreUnavailable):
        await host.cache().fetch(ref, stored, cut, host.check)
    (half,) = [path for path in host.files("partial") if path.name == WEIGHTS]
    half.write_bytes(b"\1" * half.stat().st_size)
    got = await host.cache().fetch(ref, stored, host.store(), host.check)
    assert (got.folder / WEIGHTS).read_bytes() == weights


async def test_parts_that_the_disk_cannot_read_any_more_keep_the_next_try_from_nothing(
    host: Host,
) -> None:
    weights = os.urandom(4 * PART)
    host.put("a", weights)
    ref, stored = await host.look_up("a")
    cut = host.store()
    cut.limit, cut.failure = 4, unavailable(StoreProblem.UNREACHABLE)
    with pytest.raises(StoreUnavailable):
        await host.cache().fetch(ref, stored, cut, host.check)
    (half,) = [path for path in host.files("partial") if path.name == WEIGHTS]
    half.unlink()
    half.mkdir()  # it can be opened, but not read
    cache = host.cache()
    with pytest.raises(StoreUnavailable):
        await cache.fetch(ref, stored, host.store(), host.check)
    got = await cache.fetch(ref, stored, host.store(), host.check)
    assert (got.folder / WEIGHTS).read_bytes() == weights


async def test_a_fetch_that_got_nothing_leaves_nothing(host: Host) -> None:
    host.put("a", b"x")
    ref, stored = await host.look_up("a")
    down = host.store()
    down.limit, down.failure = 0, unavailable(StoreProblem.UNREACHABLE)
    cache = host.cache()
    with pytest.raises(StoreUnavailable):
        await cache.fetch(ref, stored, down, host.check)
    cache.close()
    assert not host.cache().has(ref)
    async with asyncio.timeout(5):
        while any((host.root / "partial").iterdir()):
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "manifest", "symlink"])
@pytest.mark.parametrize("same_process", [True, False])
async def test_a_damaged_entry_is_never_served_and_comes_back_whole(
    host: Host, harm: str, same_process: bool
) -> None:
    weights = os.urandom(3 * PART)
    host.put("a", weights)
    ref, stored = await host.look_up("a")
    cache = host.cache()
    path = (await cache.fetch(ref, stored, host.store(), host.check)).folder / WEIGHTS
    match harm:
        case "flip":
            with path.open("r+b") as handle:
                handle.seek(PART + 7)
                handle.write(bytes([weights[PART + 7] ^ 1]))
        case "truncate":
            os.truncate(path, PART)
        case "remove":
            path.unlink()
        case "manifest":
            (path.parent.parent / "manifest").write_bytes(b"{")
        case "symlink":
            path.rename(path.with_name("other"))
            path.symlink_to("other")
    cache = cache if same_process else host.cache()
    assert await cache.open(ref, host.check) is None
    again = await cache.fetch(ref, stored, host.store(), host.check)
    assert (again.folder / WEIGHTS).read_bytes() == weights


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """The entries of which every byte is hashed. Threads of other tests may still hash theirs."""
    folders: list[Path] = []
    is_whole = layout.is_whole

    def noting(folder: Path, manifest: layout.Manifest) -> bool:
        if folder.is_relative_to(tmp_path):
            folders.append(folder)
        return is_whole(folder, manifest)

    monkeypatch.setattr(layout, "is_whole", noting)
    return folders


async def test_an_entry_is_hashed_and_checked_once_also_across_restarts(
    host: Host, hashed: list[Path]
) -> None:
    host.put("a", os.urandom(PART))
    ref, stored = await host.look_up("a")
    for start in range(3):
        cache = host.cache()
        for _ in range(3):
            assert await cache.open(ref, host.check) or not start
            await cache.fetch(ref, stored, host.store(), host.check)
            cache.keep(())  # it leaves its slot
        end(cache)
    assert len(host.checked) == 1 and len(hashed) == 1


@pytest.mark.parametrize("what", ["file", "rules", "boot", "verdict", "no verdict"])
async def test_what_changed_since_an_entry_was_checked_has_it_hashed_and_checked_again(
    host: Host, hashed: list[Path], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    host.put("a", os.urandom(PART))
    ref, stored = await host.look_up("a")
    cache, check = host.cache(), host.check
    found = await cache.fetch(ref, stored, host.store(), check)
    end(cache)
    verdict = found.folder.parent / layout.VERDICT
    match what:
        case "file":  # the same bytes, written once more
            (found.folder / WEIGHTS).write_bytes((found.folder / WEIGHTS).read_bytes())
        case "rules":
            check = replace(check, rules="others")
        case "boot":
            monkeypatch.setattr(layout, "host_of", lambda root: "of another boot")
        case "verdict":
            verdict.write_bytes(b"{")
        case "no verdict":
            verdict.unlink()
    for _ in range(2):
        cache = host.cache()
        assert await cache.open(ref, check)
        end(cache)
    # A new verdict counts from then on. There is none where nobody knows that the entry was synced.
    again = 2 if "verdict" in what else 1
    assert (len(host.checked), len(hashed)) == (1 + again, 1 + again)


async def test_a_verdict_that_cannot_be_written_keeps_nobody_from_an_adapter(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path, verdict: layout.EntryVerdict) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    host.put("a", os.urandom(PART))
    ref, stored = await host.look_up("a")
    cache = host.cache()
    await cache.fetch(ref, stored, host.store(), host.check)
    end(cache)
    monkeypatch.setattr(layout, "write_verdict", full)
    assert await host.cache().open(ref, replace(host.check, rules="others"))


async def test_an_entry_that_the_disk_refused_is_hashed_by_the_next_process(
    host: Host, hashed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise OSError(errno.EIO, "The disk is broken")

    host.put("a", os.urandom(PART))
    ref, stored = await host.look_up("a")
    with monkeypatch.context() as broken:
        broken.setattr(layout, "sync", refuse)
        cache = host.cache()
        await cache.fetch(ref, stored, host.store(), host.check)
        end(cache)
    for _ in range(2):  # the kernel tells of lost pages once, so a later sync says nothing
        cache = host.cache()
        assert await cache.open(ref, host.check)
        end(cache)
    assert len(hashed) == 2


async def test_an_adapter_is_used_before_the_disk_has_written_it(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.put("a", os.urandom(PART))
    ref, stored = await host.look_up("a")
    written, cache = threading.Event(), host.cache()
    monkeypatch.setattr(layout, "sync", lambda path: written.wait(60))
    try:
        async with asyncio.timeout(30):
            assert await cache.fetch(ref, stored, host.store(), host.check)
    finally:
        written.set()


@pytest.mark.parametrize("during", [False, True], ids=["in a thread", "while it is opened"])
async def test_what_the_disk_refuses_is_hashed_and_validated_once_more(
    host: Host, monkeypatch: pytest.MonkeyPatch, during: bool
) -> None:
    def refuse(path: Path) -> None:
        raise OSError(errno.EIO, "The disk is broken")

    host.put("a", os.urandom(PART))
    ref, stored = await host.look_up("a")
    cache = host.cache()
    monkeypatch.setattr(layout, "sync", refuse)
    submit, lease, waiting = cache._threads.submit, cache._lease, list[Any]()

    def later(job: Any, *args: Any) -> Any:
        return waiting.append(args) if job == cache._sync else submit(job, *args)

    def lease_after_sync(*args: Any) -> Any:
        for key in waiting:
            cache._sync(*key)
        waiting.clear()
        return lease(*args)

    if during:
        monkeypatch.setattr(cache._threads, "submit", later)
        monkeypatch.setattr(cache, "_lease", lease_after_sync)
    await cache.fetch(ref, stored, host.store(), host.check)
    async with asyncio.timeout(30):
        while len(host.checked) < 2:
            assert await cache.open(ref, host.check)


async def test_the_quota_holds_and_who_is_in_use_in_any_process_stays(host: Host) -> None:
    for name in "abcd":
        host.put(name, os.urandom(2 * PART))
    budget = 7 * PART  # three adapters
    mine, other = host.cache(budget), host.cache(budget)
    refs = {name: await host.look_up(name) for name in "abcd"}
    await mine.fetch(*refs["a"], host.store(), host.check)
    await other.fetch(*refs["b"], host.store(), host.check)
    await mine.fetch(*refs["c"], host.store(), host.check)
    mine.keep([refs["a"][0]])
    await other.fetch(*refs["d"], host.store(), host.check)
    assert {name for name in "abcd" if mine.has(refs[name][0])} == {"a", "b", "d"}


async def test_a_cache_full_of_adapters_in_use_says_503_and_keeps_no_half_download(
    host: Host,
) -> None:
    for name in "ab":
        host.put(name, os.urandom(2 * PART))
    cache = host.cache(3 * PART)
    await cache.fetch(*await host.look_up("a"), host.store(), host.check)
    with pytest.raises(StoreUnavailable, match="in use") as caught:
        await cache.fetch(*await host.look_up("b"), host.store(), host.check)
    assert caught.value.retry_after_s and list((host.root / "partial").iterdir()) == []
    cache.keep(())
    await cache.fetch(*await host.look_up("b"), host.store(), host.check)


async def test_what_the_last_process_left_half_done_goes_before_whole_adapters(host: Host) -> None:
    for name in "abc":
        host.put(name, os.urandom(3 * PART))
    cache = host.cache(8 * PART)
    a, b = await host.look_up("a"), await host.look_up("b")
    await cache.fetch(*a, host.store(), host.check)
    cache.keep(())
    cut = host.store()
    cut.limit, cut.failure = 2, unavailable(StoreProblem.UNREACHABLE)
    cut.fails_once = lambda: (there := cache.cached_on_disk(b[0])) and there.parts
    with pytest.raises(StoreUnavailable):
        await cache.fetch(*b, cut, host.check)
    await cache.fetch(*await host.look_up("c"), host.store(), host.check)
    assert cache.has(a[0]) and list((host.root / "partial").iterdir()) == []


async def test_an_adapter_larger_than_the_quota_is_the_adapters_fault(host: Host) -> None:
    host.put("a", os.urandom(2 * PART))
    with pytest.raises(InvalidAdapter, match="bytes"):
        await host.cache(PART).fetch(*await host.look_up("a"), host.store(), host.check)


@pytest.mark.parametrize("large", [WEIGHTS, "adapter_config.json"])
async def test_an_adapter_larger_than_any_may_be_is_not_fetched_and_removes_no_other(
    host: Host, large: str
) -> None:
    host.put("first", b"x" * 1000)
    host.put("large", b"x" * 1000)
    cache, store = host.cache(9 << 30), host.store()
    await cache.fetch(*await host.look_up("first"), store, host.check)
    cache.keep(())
    store.asked.clear()
    ref, stored = await host.look_up("large")
    files = tuple(
        StoredFile(f.path, (8 << 30) + 1 if f.path == large else 1, f.version) for f in stored.files
    )
    with pytest.raises(InvalidAdapter, match="more than") as refused:
        await cache.fetch(ref, StoredAdapter("large", ref.digest, files), store, host.check)
    assert refused.value.code == "invalid_adapter_too_large"
    assert not store.asked and len(host.files("entries")) > 0


async def test_an_invalid_version_is_fetched_once_and_the_next_version_again(host: Host) -> None:
    host.put("a", b"bad" + bytes(PART))
    cache, store = host.cache(), host.store()
    ref, stored = await host.look_up("a")
    for _ in range(3):
        with pytest.raises(InvalidAdapter, match="bad"):
            await cache.fetch(ref, stored, store, host.check)
    assert len(store.asked) == 3 and not cache.has(ref)
    host.put("a", b"good")
    assert (await cache.fetch(*await host.look_up("a"), store, host.check)).facts.rank == 8


async def test_a_version_that_left_the_store_is_not_found_and_leaves_nothing(host: Host) -> None:
    host.put("a", b"old")
    ref, stored = await host.look_up("a")
    host.put("a", b"new!")
    with pytest.raises(AdapterNotFound):
        await host.cache().fetch(ref, stored, host.store(), host.check)
    async with asyncio.timeout(5):
        while any((host.root / "partial").iterdir()):
            await asyncio.sleep(0.001)


async def test_a_stuck_download_is_given_up_after_the_stall_time(host: Host) -> None:
    host.put("a", b"x")
    stuck = host.store()
    stuck.limit = 0
    with pytest.raises(StoreUnavailable, match="too slow"):
        async with asyncio.timeout(5):
            await host.cache(stall_s=0.2, tries=2).fetch(
                *await host.look_up("a"), stuck, host.check
            )
    assert stuck.at_limit.is_set()


async def test_many_stuck_downloads_delay_no_other_one(host: Host) -> None:
    names = [f"stuck{i}" for i in range(20)]
    for name in [*names, "quick"]:
        host.put(name, os.urandom(8 * PART))
    cache, stuck = host.cache(), host.store()
    stuck.limit = 0
    hanging = [
        asyncio.create_task(cache.fetch(*await host.look_up(name), stuck, host.check))
        for name in names
    ]
    await stuck.at_limit.wait()
    async with asyncio.timeout(4):
        await cache.fetch(*await host.look_up("quick"), host.store(), host.check)
    assert not any(task.done() for task in hanging)
    for task in hanging:
        task.cancel()
    await asyncio.gather(*hanging, return_exceptions=True)


async def test_what_another_process_has_brought_waits_for_no_stuck_download(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "MAX_DOWNLOADS", 1)
    host.put("a", b"x")
    host.put("b", b"y")
    mine, other = host.cache(stall_s=60.0), host.cache(stall_s=60.0)
    slow, stuck = host.store(), host.store()
    slow.limit = stuck.limit = 0
    async with asyncio.TaskGroup() as group:
        brings = group.create_task(other.fetch(*await host.look_up("a"), slow, host.check))
        await slow.at_limit.wait()
        waits = group.create_task(mine.fetch(*await host.look_up("a"), host.store(), host.check))
        hangs = group.create_task(mine.fetch(*await host.look_up("b"), stuck, host.check))
        await stuck.at_limit.wait()
        slow.limit = 10
        slow.go.set()
        await brings
        async with asyncio.timeout(10):
            assert (await waits).content == brings.result().content
        hangs.cancel()
    end(mine)
    end(other)


async def test_shared_lanes_are_given_back_whether_a_transfer_ends_well_or_not(host: Host) -> None:
    host.put("a", os.urandom(8 * PART))
    _, stored = await host.look_up("a")
    budget = PartBudget(2)
    for number, failure in enumerate([None, unavailable(StoreProblem.ACCESS_DENIED)]):
        store = host.store()
        store.limit, store.failure = (10**9, None) if failure is None else (3, failure)
        into = host.root / str(number)
        into.mkdir(parents=True)
        with contextlib.suppress(StoreUnavailable):
            await store.fetch(stored, into, Transfer(budget=budget))
        assert budget.free == 2


async def test_files_are_shown_before_their_check_only_if_all_came_from_the_store_just_now(
    host: Host,
) -> None:
    """The check may ask for other parts once more."""
    host.put("whole", os.urandom(3 * PART))
    host.put("cut", os.urandom(9 * PART))
    shown: list[Path] = []

    def note(files: Path) -> None:
        assert not host.checked and (files / WEIGHTS).is_file()
        shown.append(files)

    ref, stored = await host.look_up("cut")
    store = host.store()
    store.limit, store.failure = 6, unavailable(StoreProblem.FAILED, "down")
    with pytest.raises(StoreUnavailable):
        await host.cache().fetch(ref, stored, store, host.check, (), note)
    await host.cache().fetch(ref, stored, host.store(), host.check, (), note)
    assert not shown, "it went on from an earlier try"
    host.checked.clear()
    ref, stored = await host.look_up("whole")
    await host.cache().fetch(ref, stored, host.store(), host.check, (), note)
    await host.cache().fetch(ref, stored, host.store(), host.check, (), note)
    assert len(shown) == 1, "the second time they were there"


class LookingCheck:
    """Looks at parts as they come, and refuses a folder of which one begins with `bad`. A look
    waits until `go`.
    """

    rules = "looks"

    def __init__(self) -> None:
        self.begun: list[LookedAt] = []
        self.go = threading.Event()
        self.go.set()

    def begin(self, folder: Path) -> LookedAt:
        self.begun.append(LookedAt(folder, self.go))
        return self.begun[-1]


class LookedAt:
    def __init__(self, folder: Path, go: threading.Event) -> None:
        self._folder, self._go = folder, go
        self.asked: list[tuple[str, int]] = []
        self.parts: dict[tuple[str, int], bytes] = {}

    def look(self, part: FilePart) -> None:
        self.asked.append(part.id)
        assert self._go.wait(60)
        with (self._folder / part.file.path).open("rb") as f:
            f.seek(part.offset)
            self.parts[part.id] = f.read(part.size_bytes)

    def facts(self) -> AdapterFacts:
        seen = [*self.parts.values(), (self._folder / WEIGHTS).read_bytes()]
        if any(data.startswith(b"bad") for data in seen):
            raise InvalidAdapter("It is bad.", "nonfinite")
        return AdapterFacts(8, 0, ())


async def test_parts_are_looked_at_once_they_are_whole_unless_they_were_there(host: Host) -> None:
    weights = os.urandom(9 * PART + 5)
    host.put("a", weights)
    ref, stored = await host.look_up("a")
    store, check = host.store(), LookingCheck()
    store.limit, store.failure = 6, unavailable(StoreProblem.FAILED, "down")
    with pytest.raises(StoreUnavailable):
        await host.cache().fetch(ref, stored, store, check)
    cache = host.cache()
    await cache.fetch(ref, stored, host.store(), check)
    cache._heavy.shutdown(wait=True)
    first, second = (begun.parts for begun in check.begun if begun.asked)
    assert second and not first.keys() & second.keys()
    for (path, number), seen in (first | second).items():
        at = number * PART
        assert path != WEIGHTS or seen == weights[at : at + PART]


async def test_a_download_ends_while_its_first_parts_are_still_looked_at(host: Host) -> None:
    """Few looks wait, since the checks of other adapters wait behind them."""
    host.put("a", os.urandom(20 * PART))
    ref, stored = await host.look_up("a")
    cache, check, brought = host.cache(), LookingCheck(), asyncio.Event()
    check.go.clear()
    fetched = asyncio.create_task(
        cache.fetch(ref, stored, host.store(), check, (), lambda _: brought.set())
    )
    async with asyncio.timeout(60):
        await brought.wait()
    waiting = cache._heavy._work_queue.qsize()
    check.go.set()
    assert (await fetched).facts.rank == 8
    assert 0 < waiting <= PARTS_PER_ADAPTER


async def test_a_thread_that_still_ends_a_peers_part_does_not_count_for_the_store(
    host: Host,
) -> None:
    """The peer fails while a thread has a part of it. That ends after the store's bytes came."""

    class Peer:
        async def fetch(self, adapter: StoredAdapter, into: Path, transfer: Any = None) -> None:
            self.transfer = transfer
            raise PeerFailed("The peer is gone.")

    class LateStore(WatchedStore):
        async def fetch(self, adapter: StoredAdapter, into: Path, transfer: Any = None) -> None:
            await super().fetch(adapter, into, transfer)
            (part, *_) = parts_of(next(f for f in adapter.files if f.path == WEIGHTS))
            peer.transfer.on_part(part, "0" * 64)

    weights, peer = os.urandom(2 * PART), Peer()
    host.put("a", weights)
    ref, stored = await host.look_up("a")
    check, cache = LookingCheck(), host.cache()
    found = await cache.fetch(ref, stored, LateStore(str(host.place.folder)), check, (peer,))
    assert [len(begun.parts) for begun in check.begun][1] == 0, "the peer's own check"
    end(cache)
    assert await host.cache().open(ref, check), "its hashes are the store's"
    assert (found.folder / WEIGHTS).read_bytes() == weights


async def test_what_was_written_after_the_download_is_not_taken_for_hashed(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.put("a", os.urandom(PART))
    ref, stored = await host.look_up("a")
    cache = host.cache()
    publish = cache._publish

    def written_to_before(key: str, *more: Any) -> Any:
        path = cache._cache_folder.partial(key) / layout.FILES / WEIGHTS
        path.write_bytes(os.urandom(PART))
        return publish(key, *more)

    monkeypatch.setattr(cache, "_publish", written_to_before)
    await cache.fetch(ref, stored, host.store(), host.check)
    end(cache)
    assert await host.cache().open(ref, host.check) is None, "it is damaged"


async def test_what_was_seen_of_a_peers_bytes_does_not_count_for_the_stores(host: Host) -> None:
    class Peer:
        async def fetch(self, adapter: StoredAdapter, into: Path, transfer: Any = None) -> None:
            await transfer_module.fetch_adapter(adapter, into, bad_bytes, transfer)

    @asynccontextmanager
    async def bad_bytes(
        name: str, file: StoredFile, offset: int, length: int
    ) -> AsyncIterator[AsyncGenerator[bytes, None]]:
        async def chunks() -> AsyncGenerator[bytes, None]:
            yield b"bad".ljust(length)[:length]

        yield chunks()

    weights = os.urandom(2 * PART)
    host.put("a", weights)
    ref, stored = await host.look_up("a")
    check = LookingCheck()
    found = await host.cache().fetch(ref, stored, host.store(), check, (Peer(),))
    assert (found.folder / WEIGHTS).read_bytes() == weights
