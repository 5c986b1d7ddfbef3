"""Shell. The adapters on this host's disk, shared by all its workers. Each version is downloaded
once per host, and nothing is served that was not hashed.

A process that downloads an adapter hashes it on the way, checks it, and leaves its verdict with the
entry once that is synced. From then on one `lstat` per file tells each process of the host whether
anything wrote to it. The full hash, 0.6 ms per MiB, is taken where there is no verdict, or one of
other rules or of an earlier boot of the host. So it finds what a crash of the host or an edit did.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, Protocol, TypeVar

from shared.adapters.checks import AdapterFacts
from shared.adapters.identity import AdapterRef, StoredAdapter
from shared.errors import InvalidAdapter, StoreUnavailable
from shared.stores import AdapterStore
from shared.stores.object_store import StoreProblem, unavailable
from shared.stores.transfer import GRACE_S, PartBudget, PartId, TransferRetries
from worker.disk import layout
from worker.disk.download import Download, DownloadJob, FolderCheck, Source, nothing
from worker.disk.download_journal import DownloadJournal
from worker.disk.folder import CacheFolder, NoDownload
from worker.disk.layout import FILES, EntryLock, EntryVerdict, Stamp, entry_key, lock_entry

log = logging.getLogger("loraplex.disk_cache")
clock = time.monotonic

P = ParamSpec("P")
T = TypeVar("T")

MAX_DOWNLOADS = 64
"""Downloads at once per worker; further ones wait. Each has at least one connection of its own."""
MAX_QUARANTINED = 10_000
MAX_SEEN = 10_000
"""Versions that this process remembers as hashed and validated. A forgotten one is hashed again."""
THREADS = 8
"""Threads of the cache's own. The event loop's threads may all hang in a store (a dead network file
system). That must not block the adapters that are on disk.
"""
HEAVY_THREADS = 2
"""Threads for hashing and validating. More of them would only compete with the event loop for the
interpreter.
"""
POLL_SHARE, MIN_POLL_S, MAX_POLL_S = 0.05, 0.005, 0.1
"""A process that waits for another process's download looks again after this share of the time it
has waited. So it looks a few times only, and sees the end at most 5% late.
"""
MAX_STILL_S = 120.0
SETTLE_TIME_S = 30.0


class Check(Protocol):
    """What every adapter must pass. Checks with equal `rules` say the same of the same files."""

    @property
    def rules(self) -> str: ...

    def begin(self, folder: Path) -> FolderCheck: ...


@dataclass(frozen=True, slots=True)
class FetchTimes:
    """Seconds of one fetch. `wait_s`: until the download could begin. `peer_s` and `download_s`:
    downloading from peers and from the store. `validate_s`: validation.
    `settle_s`: making the entry visible.
    """

    wait_s: float = 0.0
    peer_s: float = 0.0
    download_s: float = 0.0
    validate_s: float = 0.0
    settle_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Cached:
    """An adapter on disk that was hashed and validated, and is in use. No process of this host
    removes it until `keep` is called without it.

    `content` is the sha256 over its files. `peer_bytes` of them came from other hosts in this
    fetch.
    """

    folder: Path
    facts: AdapterFacts
    size_bytes: int
    content: str
    times: FetchTimes
    peer_bytes: int = 0


@dataclass(frozen=True, slots=True)
class CachedOnDisk:
    """The parts of an adapter that lie below `files` on this host, with their sha256. While other
    parts are still being downloaded, `moved_at` is the time at which bytes last came (wall clock).
    """

    files: Path
    parts: Mapping[PartId, str]
    moved_at: float | None


@dataclass(frozen=True, slots=True)
class _Verified:
    stamps: tuple[Stamp, ...]
    facts: AdapterFacts


@dataclass(frozen=True, slots=True)
class _Begun:
    held: EntryLock
    download: Download


class DiskCache:
    """The disk cache of one worker process. Other processes use the same `root` at the same time.

    `host` names this cache: it is equal in all processes that share the folder.
    """

    def __init__(self, root: Path, budget_bytes: int, pace: TransferRetries | None = None) -> None:
        self._pace = pace or TransferRetries(GRACE_S, 3)
        self._cache_folder = CacheFolder(root, budget_bytes)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="disk")
        self._heavy = ThreadPoolExecutor(HEAVY_THREADS, thread_name_prefix="disk-heavy")
        self._budget = PartBudget()
        self._gate = asyncio.Semaphore(MAX_DOWNLOADS)
        self._leases: dict[str, tuple[EntryLock, int]] = {}
        self._seen: OrderedDict[str, _Verified] = OrderedDict()
        self._unsynced: set[str] = set()  # to be hashed once more, whatever was seen
        self._quarantine: OrderedDict[str, InvalidAdapter] = OrderedDict()
        self._underway: dict[str, tuple[StoredAdapter, float]] = {}
        self.host = layout.host_of(root)

    def has(self, ref: AdapterRef) -> bool:
        """Whether an entry of the adapter exists. Only `open` knows whether it is good."""
        return self._cache_folder.entry(entry_key(ref)).is_dir()

    async def open(self, ref: AdapterRef, check: Check) -> Cached | None:
        """Puts the adapter in use if it is on disk; returns None if it is not. Asks no store.

        Raises:
            InvalidAdapter: the adapter was found invalid before, or is found so now.
            StoreUnavailable: the disk cannot be read or written.
        """
        key = entry_key(ref)
        if bad := self._quarantine.get(key):
            raise bad.with_traceback(None)
        start = clock()
        try:
            pool = self._threads if key in self._seen else self._heavy
            taken = await asyncio.get_running_loop().run_in_executor(
                pool, self._take, key, ref, check
            )
        except InvalidAdapter as exc:
            raise self._quarantined(key, exc) from None
        except OSError as exc:
            raise unavailable(StoreProblem.NOT_WRITABLE, exc.strerror or "") from exc
        if taken is None:
            return None
        held, manifest, seen = taken
        return self._lease(key, held, manifest, seen, FetchTimes(validate_s=clock() - start))

    def cached_on_disk(self, ref: AdapterRef) -> CachedOnDisk | None:
        """What this host can give to other hosts; called in a thread. Returns the parts of an
        adapter that is complete, or that this process fetches, even if it waits for another
        process's download.
        """
        key = entry_key(ref)
        entry, partial = self._cache_folder.entry(key), self._cache_folder.partial(key)
        underway = self._underway.get(key)  # first: what is over is published
        for _ in range(2):  # it may be published between a look at the one and at the other
            manifest = layout.read_manifest(entry)
            if manifest is not None and manifest.ref == ref:
                parts = {
                    (file.path, number): sha256
                    for file in manifest.files
                    for number, sha256 in enumerate(file.parts)
                }
                return CachedOnDisk(entry / FILES, parts, None)
            if underway is None:
                return None
            listed = DownloadJournal(partial, underway[0]).listed_parts()
            moved_at = layout.moved_at(partial)
            if moved_at is not None:
                return CachedOnDisk(partial / FILES, listed, moved_at)
        assert underway is not None
        return CachedOnDisk(partial / FILES, {}, underway[1])

    async def fetch(
        self,
        ref: AdapterRef,
        stored: StoredAdapter,
        store: AdapterStore,
        check: Check,
        peers: Sequence[Source] = (),
        on_brought: Callable[[Path], None] = nothing,
    ) -> Cached:
        """Puts the adapter in use: from disk, else from `peers`, else from the store. If another
        process of this host is downloading it already, waits for that download.

        `on_brought` is called with the folder of its files if they all came from the store just
        now, before they are checked. They move to their place afterwards.

        Raises:
            StoreUnavailable: the store failed more often than the pace allows, or the disk is full.
            AdapterNotFound: the store has another version by now.
            InvalidAdapter: the adapter cannot be served. Nothing of it is kept, and this process
                does not ask the store again for this version.
        """
        key = entry_key(ref)
        self._underway[key] = stored, time.time()
        try:
            return await self._fetch(key, DownloadJob(ref, stored, store, peers, on_brought), check)
        finally:
            self._underway.pop(key, None)

    async def _fetch(self, key: str, job: DownloadJob, check: Check) -> Cached:
        start, cached = clock(), None
        if bad := self._quarantine.get(key):
            raise bad.with_traceback(None)
        while True:
            async with self._gate:
                try:
                    begun = await self._in_thread(self._begin, key, job, check)
                    if isinstance(begun, _Begun):
                        cached = await self._download(key, job, check, begun, clock() - start)
                except OSError as exc:
                    raise unavailable(StoreProblem.NOT_WRITABLE, exc.strerror or "") from exc
            if begun is NoDownload.CACHED:
                cached = await self.open(job.ref, check)
            if cached is not None:
                return cached
            await self._wait(key, start)
            cached = await self.open(job.ref, check)  # of another process: that takes no turn
            if cached is not None:
                return cached

    def keep(self, refs: Iterable[AdapterRef]) -> None:
        """Ends the use of every adapter that is not among `refs`. The caller names all adapters in
        use each time, so none stays in use by mistake.
        """
        wanted = {entry_key(ref) for ref in refs}
        for key in [key for key in self._leases if key not in wanted]:
            held, size_bytes = self._leases.pop(key)
            # It was in use until now: its age counts from here.
            self._threads.submit(self._cache_folder.use, key, size_bytes)
            held.release()

    def close(self) -> None:
        """Ends the use of all adapters. Never waits."""
        self.keep(())
        self._threads.shutdown(wait=False)
        self._heavy.shutdown(wait=False)

    # ---- from disk -------------------------------------------------------------------------------

    def _take(
        self, key: str, ref: AdapterRef, check: Check
    ) -> tuple[EntryLock, layout.Manifest, _Verified] | None:
        """Locks the entry and checks it; called in a thread. None if there is no good entry."""
        entry = self._cache_folder.entry(key)
        try:
            held = lock_entry(entry, exclusive=False)
        except FileNotFoundError:
            return None
        if held is None:  # another process is removing or publishing it at this moment
            return None
        try:
            return self._inspect(key, ref, check, held)
        except BaseException:
            held.release()
            raise

    def _inspect(
        self, key: str, ref: AdapterRef, check: Check, held: EntryLock
    ) -> tuple[EntryLock, layout.Manifest, _Verified] | None:
        """Checks the locked entry: by `lstat` if it was hashed before, else by its full hash. An
        entry that is damaged is removed.
        """
        entry = self._cache_folder.entry(key)
        manifest = layout.read_manifest(entry)
        stamps = (
            layout.stamps(entry, manifest) if manifest is not None and manifest.ref == ref else None
        )
        seen = verdict = None
        if key in self._unsynced:
            self._unsynced.discard(key)
        else:
            verdict = layout.read_verdict(entry)
            seen = self._seen.get(key) or self._seen_by_others(verdict, check.rules)
        known = seen is not None and seen.stamps == stamps
        if manifest is None or stamps is None or not (known or layout.is_whole(entry, manifest)):
            log.error(
                "adapter on disk is damaged and is dropped", extra={"adapter": str(ref), "key": key}
            )
            self._cache_folder.discard(entry, held)
            return None
        if seen is None or not known:
            seen = _Verified(stamps, check.begin(entry / FILES).facts())
            if verdict is not None:  # so it was synced once
                self._note_verdict(key, seen, check.rules)
        self._cache_folder.use(key, manifest.size_bytes)
        return held, manifest, seen

    def _seen_by_others(self, verdict: EntryVerdict | None, rules: str) -> _Verified | None:
        """What a process of this host found by the same rules, perhaps in an earlier life."""
        if verdict is None or (verdict.host, verdict.rules) != (self.host, rules):
            return None
        return _Verified(verdict.stamps, verdict.facts)

    def _lease(
        self,
        key: str,
        held: EntryLock,
        manifest: layout.Manifest,
        seen: _Verified,
        times: FetchTimes,
        peer_bytes: int = 0,
    ) -> Cached:
        """Keeps the lock on the entry until `keep` ends its use."""
        self._seen[key] = seen
        self._seen.move_to_end(key)
        while len(self._seen) > MAX_SEEN:
            self._seen.popitem(last=False)
        if key in self._leases:
            held.release()
        else:
            self._leases[key] = held, manifest.size_bytes
        return Cached(
            self._cache_folder.entry(key) / FILES,
            seen.facts,
            manifest.size_bytes,
            manifest.content,
            times,
            peer_bytes,
        )

    # ---- from the store --------------------------------------------------------------------------

    def _begin(self, key: str, job: DownloadJob, check: Check) -> _Begun | NoDownload:
        """Takes the right to download, and what an earlier try left; called in a thread."""
        held = self._cache_folder.begin(key, job.stored)
        if isinstance(held, NoDownload):
            return held
        partial = self._cache_folder.partial(key)
        try:
            download = Download(
                job,
                partial,
                self._pace,
                self._budget,
                lambda: check.begin(partial / FILES),
                self._heavy,
            )
            download.resume()
        except BaseException:
            self._end(partial, held)  # the next try could not read it either
            raise
        return _Begun(held, download)

    async def _download(
        self, key: str, job: DownloadJob, check: Check, begun: _Begun, wait_s: float
    ) -> Cached | None:
        """Downloads, validates and publishes the adapter. None if another process removed it right
        after it became visible.
        """
        held, download, partial = begun.held, begun.download, self._cache_folder.partial(key)
        keep = handed_over = False
        try:
            await download.bring()
            brought = clock()
            if download.from_store_alone:
                job.on_brought(partial / FILES)
            facts = await self._settle(download)
            checked = clock()
            manifest = layout.manifest_of(job.ref, job.stored, download.parts)
            handed_over = True
            lease = await self._in_thread(
                self._publish, key, manifest, held, download.peer_s + download.store_s
            )
        except (StoreUnavailable, asyncio.CancelledError):
            keep = bool(download.parts)  # the next try goes on from these parts
            raise
        except InvalidAdapter as exc:
            raise self._quarantined(key, exc) from None
        finally:
            if not handed_over and keep:
                held.release()  # released at once, so a process that makes room finds it unlocked
            elif not handed_over:
                # Not awaited, because this may run while the task is being cancelled.
                self._threads.submit(self._end, partial, held)
        if lease is None:
            return None
        own, stamps = lease
        times = FetchTimes(
            wait_s, download.peer_s, download.store_s, checked - brought, clock() - checked
        )
        seen = _Verified(stamps, facts)
        cached = self._lease(key, own, manifest, seen, times, download.peer_bytes)
        self._threads.submit(self._sync, key, seen, check.rules)
        return cached

    async def _settle(self, download: Download) -> AdapterFacts:
        """Validates the files. An adapter counts as invalid only if the store's own bytes are
        invalid; the bytes of a peer are downloaded again from the store.
        """
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._heavy, download.check.facts)
        except InvalidAdapter:
            if not await download.doubt():
                raise
            return await loop.run_in_executor(self._heavy, download.check.facts)

    def _publish(
        self, key: str, manifest: layout.Manifest, held: EntryLock, cost_s: float
    ) -> tuple[EntryLock, tuple[Stamp, ...]] | None:
        """Makes the download an entry; called in a thread, which runs to its end even if the task
        is cancelled. The entry gets a lock of its own, and `held` is released.
        """
        entry = self._cache_folder.entry(key)
        try:
            if layout.stamps(self._cache_folder.partial(key), manifest) is None:
                raise unavailable(StoreProblem.BROKEN_REPLY, "not all bytes are there")
            if not self._cache_folder.publish(key, held, manifest, cost_s):
                return None
            own = lock_entry(entry, exclusive=False)
            stamps = layout.stamps(entry, manifest)
            return None if own is None or stamps is None else (own, stamps)
        finally:
            self._end(self._cache_folder.partial(key), held)

    def _note_verdict(self, key: str, seen: _Verified, rules: str) -> None:
        """Spares others the hash and the check. Where it cannot be written, nothing is lost: the
        entry is gone, or the disk is full.
        """
        with suppress(OSError):
            layout.write_verdict(
                self._cache_folder.entry(key),
                EntryVerdict(self.host, rules, seen.stamps, seen.facts),
            )

    def _sync(self, key: str, seen: _Verified, rules: str) -> None:
        """Writes an entry to the disk, hashes what lies there, and writes the verdict; called in a
        thread, while the adapter is in use already.

        If the host loses power before, the next process finds a damaged entry by its hash. If the
        disk refuses, what is in memory may be lost later, so this process hashes it once more. Then
        there is no verdict either, ever: the kernel tells of lost pages once, so a sync that
        succeeds afterwards says nothing.
        """
        try:
            self._cache_folder.sync(key)
            entry = self._cache_folder.entry(key)
            manifest = layout.read_manifest(entry)
            if (
                manifest is not None
                and layout.stamps(entry, manifest) == seen.stamps
                and layout.is_whole(entry, manifest)
            ):
                self._note_verdict(key, seen, rules)
        except OSError as exc:
            log.warning(
                "adapter was not synced to the disk", extra={"key": key, "reason": exc.strerror}
            )
            self._unsynced.add(key)  # `_seen` may be written after this

    def _end(self, partial: Path, held: EntryLock) -> None:
        """Removes a partial folder that no later try can go on from."""
        self._cache_folder.discard(partial, held)

    async def _wait(self, key: str, start: float) -> None:
        """Waits until the other process has the adapter, has failed, or is dead.

        It polls, because blocking in flock would take a thread per adapter that nothing could
        cancel. Raises StoreUnavailable if the other process hangs.
        """
        stall_s = self._pace.stall_s
        max_still_s = MAX_STILL_S if stall_s is None else stall_s * self._pace.tries + SETTLE_TIME_S
        seen_at, still_since = 0.0, start
        while True:
            await asyncio.sleep(min(MAX_POLL_S, max(MIN_POLL_S, (clock() - start) * POLL_SHARE)))
            moved_at = await self._in_thread(self._cache_folder.moved_at, key)
            if moved_at is None:
                return
            if moved_at != seen_at:
                # read once, and then measured: the wall clock may be set meanwhile
                age_s = 0.0 if seen_at else max(0.0, time.time() - moved_at)
                seen_at, still_since = moved_at, clock() - age_s
            if clock() - still_since > max_still_s:
                raise StoreUnavailable(
                    "Another worker of this host began to fetch the adapter and hangs.",
                    retry_after_s=5.0,
                )

    # ---- inside ----------------------------------------------------------------------------------

    def _quarantined(self, key: str, exc: InvalidAdapter) -> InvalidAdapter:
        # Without its traceback, whose frames would keep locks and buffers alive.
        self._quarantine[key] = exc.with_traceback(None)
        while len(self._quarantine) > MAX_QUARANTINED:
            self._quarantine.popitem(last=False)
        return exc

    async def _in_thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(
            self._threads, lambda: function(*args, **kwargs)
        )
