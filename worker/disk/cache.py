"""Shell. Adapters on this host's disk, shared by all its workers. There is one download per version
and host, and nothing is served that was not hashed.

A process has either downloaded an adapter itself, and hashed it as it came, or it hashes all of it
at its own first use. Afterwards one `lstat` per file tells whether anything wrote to it. The full
hash costs 0.6 ms per MiB, once per process, on bytes that the engine is about to read anyway. It
finds what no cheaper check does: a disk that lied about a sync, a flipped bit, an edited file.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeAlias, TypeVar

from shared.adapters.checks import AdapterFacts
from shared.adapters.identity import AdapterRef, StoredAdapter
from shared.errors import InvalidAdapter, StoreUnavailable
from shared.stores import AdapterStore
from shared.stores.objects import Trouble, unavailable
from shared.stores.transfer import GRACE_S, Lanes, Pace, PartId
from worker.disk import layout
from worker.disk.download import Download, DownloadJob, Source
from worker.disk.folder import CacheFolder
from worker.disk.journal import Journal
from worker.disk.layout import FILES, EntryLock, Stamp, entry_key, lock_entry

log = logging.getLogger("loraplex.disk_cache")
clock = time.monotonic

Check: TypeAlias = Callable[[Path], AdapterFacts]
P = ParamSpec("P")
T = TypeVar("T")

MAX_DOWNLOADS = 64
"""Downloads at once per worker; the others wait in line. Each has at least one connection of its
own.
"""
MAX_QUARANTINED = 10_000
MAX_SEEN = 10_000
"""Versions that this process remembers as hashed and validated. A forgotten one is hashed again."""
THREADS = 8
"""Threads of the cache's own. A store may hang in the event loop's threads (a dead network file
system), and that must not block the adapters that are on disk.
"""
HEAVY_THREADS = 2
"""Threads for hashing and validating. More of them would only compete with the event loop for the
interpreter.
"""
POLL_SHARE, MIN_POLL_S, MAX_POLL_S = 0.05, 0.005, 0.1
"""A process that waits for another one's download looks again after this share of the time that it
has waited. It takes a few looks, and is at most 5 % late.
"""
DEFAULT_PATIENCE_S = 120.0
SETTLE_PATIENCE_S = 30.0


@dataclass(frozen=True, slots=True)
class FetchTimes:
    """Seconds of one fetch: the wait until the download could begin, the download from peers, the
    download from the store, validation and sync (side by side), and making it visible.
    """

    wait_s: float = 0.0
    peer_s: float = 0.0
    download_s: float = 0.0
    validate_s: float = 0.0
    settle_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Cached:
    """An adapter on disk that was hashed and validated and is in use. No process of this host
    removes it until `keep` is called without it.

    `peer_bytes` of it came from other hosts just now.
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
    parts are still downloaded, `moved_at` says when bytes last came (wall clock).
    """

    files: Path
    parts: Mapping[PartId, str]
    moved_at: float | None


@dataclass(frozen=True, slots=True)
class _Verified:
    stamps: tuple[Stamp, ...]
    facts: AdapterFacts


class DiskCache:
    """The cache of one worker process. Other processes use the same `root` at the same time."""

    def __init__(self, root: Path, budget_bytes: int, pace: Pace | None = None) -> None:
        self._pace = pace or Pace(GRACE_S, 3)
        self._cache_folder = CacheFolder(root, budget_bytes)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="disk")
        self._heavy = ThreadPoolExecutor(HEAVY_THREADS, thread_name_prefix="disk-heavy")
        self._lanes = Lanes()
        self._gate = asyncio.Semaphore(MAX_DOWNLOADS)
        self._leases: dict[str, tuple[EntryLock, int]] = {}
        self._seen: OrderedDict[str, _Verified] = OrderedDict()
        self._quarantine: OrderedDict[str, InvalidAdapter] = OrderedDict()
        self._underway: dict[str, tuple[StoredAdapter, float]] = {}
        self.host = layout.host_of(root)

    def has(self, ref: AdapterRef) -> bool:
        """Whether the adapter seems to be here. Only `open` knows."""
        return self._cache_folder.entry(entry_key(ref)).is_dir()

    async def open(self, ref: AdapterRef, check: Check) -> Cached | None:
        """Puts the adapter in use if it is on disk; None if it is not. Asks no store.

        Raises:
            InvalidAdapter: the adapter was found invalid before, or is found so now.
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
            raise unavailable(Trouble.NOT_WRITABLE, exc.strerror or "") from exc
        if taken is None:
            return None
        held, manifest, seen = taken
        return self._lease(key, held, manifest, seen, FetchTimes(validate_s=clock() - start))

    def cached_on_disk(self, ref: AdapterRef) -> CachedOnDisk | None:
        """For other hosts, called in a thread. What there is of an adapter that is complete, or
        that this process is fetching or waits for while another process fetches it.
        """
        key = entry_key(ref)
        entry, partial = self._cache_folder.entry(key), self._cache_folder.partial(key)
        manifest = layout.read_manifest(entry)
        if manifest is not None and manifest.ref == ref:
            parts = {
                (file.path, number): sha256
                for file in manifest.files
                for number, sha256 in enumerate(file.parts)
            }
            return CachedOnDisk(entry / FILES, parts, None)
        underway = self._underway.get(key)
        if underway is None:
            return None
        stored, began = underway
        return CachedOnDisk(
            partial / FILES,
            Journal(partial, stored).listed_parts(),
            layout.moved_at(partial) or began,
        )

    async def fetch(
        self,
        ref: AdapterRef,
        stored: StoredAdapter,
        store: AdapterStore,
        check: Check,
        peers: Sequence[Source] = (),
    ) -> Cached:
        """Puts the adapter in use: from disk, else from `peers`, else from the store. If another
        process of this host is downloading it already, waits for that one.

        Raises:
            StoreUnavailable: the store failed more often than the pace allows, or the disk is full.
            AdapterNotFound: the store has another version by now.
            InvalidAdapter: the adapter cannot be served. Nothing of it is kept, and this process
                does not ask the store again for this version.
        """
        key = entry_key(ref)
        self._underway[key] = stored, time.time()
        try:
            return await self._fetch(key, DownloadJob(ref, stored, store, peers), check)
        finally:
            self._underway.pop(key, None)

    async def _fetch(self, key: str, job: DownloadJob, check: Check) -> Cached:
        start = clock()
        while True:
            cached = await self.open(job.ref, check)
            if cached is not None:
                return cached
            async with self._gate:
                try:
                    turn = await self._in_thread(self._cache_folder.begin, key, job.stored)
                    if isinstance(turn, EntryLock):
                        cached = await self._download(key, job, check, turn, clock() - start)
                except OSError as exc:
                    raise unavailable(Trouble.NOT_WRITABLE, exc.strerror or "") from exc
            if cached is not None:
                return cached
            await self._wait(key, start)

    def keep(self, refs: Iterable[AdapterRef]) -> None:
        """Ends the use of every adapter that is not among `refs`. The caller names all that are in
        use each time, so that no adapter stays in use by an oversight.
        """
        wanted = {entry_key(ref) for ref in refs}
        for key in [key for key in self._leases if key not in wanted]:
            held, size_bytes = self._leases.pop(key)
            # it was in use until now, and ages from here on
            self._threads.submit(self._cache_folder.use, key, size_bytes)
            held.release()

    def close(self) -> None:
        self.keep(())
        self._threads.shutdown(wait=False)
        self._heavy.shutdown(wait=False)

    # ---- from disk -------------------------------------------------------------------------------

    def _take(
        self, key: str, ref: AdapterRef, check: Check
    ) -> tuple[EntryLock, layout.Manifest, _Verified] | None:
        """Called in a thread. An adapter that is damaged on disk is thrown away."""
        entry = self._cache_folder.entry(key)
        try:
            held = lock_entry(entry, exclusive=False)
        except FileNotFoundError:
            return None
        if held is None:  # it is being removed or becomes visible at this moment
            return None
        try:
            return self._inspect(key, ref, check, held)
        except BaseException:
            held.release()
            raise

    def _inspect(
        self, key: str, ref: AdapterRef, check: Check, held: EntryLock
    ) -> tuple[EntryLock, layout.Manifest, _Verified] | None:
        entry = self._cache_folder.entry(key)
        manifest = layout.read_manifest(entry)
        stamps = (
            layout.stamps(entry, manifest) if manifest is not None and manifest.ref == ref else None
        )
        seen = self._seen.get(key)
        known = seen is not None and seen.stamps == stamps
        if manifest is None or stamps is None or not (known or layout.is_whole(entry, manifest)):
            log.error(
                "adapter on disk is damaged and is dropped", extra={"adapter": str(ref), "key": key}
            )
            self._cache_folder.discard(entry, held)
            return None
        if seen is None or not known:
            seen = _Verified(stamps, check(entry / FILES))
        self._cache_folder.use(key, manifest.size_bytes)
        return held, manifest, seen

    def _lease(
        self,
        key: str,
        held: EntryLock,
        manifest: layout.Manifest,
        seen: _Verified,
        times: FetchTimes,
        peer_bytes: int = 0,
    ) -> Cached:
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

    async def _download(
        self, key: str, job: DownloadJob, check: Check, held: EntryLock, wait_s: float
    ) -> Cached | None:
        """None if another process removed the adapter right after it became visible."""
        partial = self._cache_folder.partial(key)
        download = Download(job, partial, self._pace, self._lanes)
        keep = handed_over = False
        try:
            await download.resume(self._threads)
            await download.bring()
            brought = clock()
            facts = await self._settle(partial / FILES, check, download)
            checked = clock()
            manifest = layout.manifest_of(job.ref, job.stored, download.parts)
            handed_over = True
            lease = await self._in_thread(
                self._publish, key, manifest, held, download.peer_s + download.store_s
            )
        except (StoreUnavailable, asyncio.CancelledError):
            keep = bool(download.parts)  # the next try goes on from here
            raise
        except InvalidAdapter as exc:
            raise self._quarantined(key, exc) from None
        finally:
            if not handed_over and keep:
                held.release()  # at once: a process that makes room must find it unlocked
            elif not handed_over:
                # not awaited: this may run while being cancelled
                self._threads.submit(self._end, partial, held)
        if lease is None:
            return None
        own, stamps = lease
        times = FetchTimes(
            wait_s, download.peer_s, download.store_s, checked - brought, clock() - checked
        )
        return self._lease(key, own, manifest, _Verified(stamps, facts), times, download.peer_bytes)

    async def _settle(self, files: Path, check: Check, download: Download) -> AdapterFacts:
        """Validates and syncs. An adapter counts as invalid only by the store's own bytes, never by
        those of a peer.
        """
        try:
            return await self._settled(files, check)
        except InvalidAdapter:
            if not await download.doubt():
                raise
            return await self._settled(files, check)

    async def _settled(self, files: Path, check: Check) -> AdapterFacts:
        """Validates and syncs side by side."""
        checking = asyncio.get_running_loop().run_in_executor(self._heavy, check, files)
        syncing = asyncio.ensure_future(self._in_thread(layout.sync_files, files))
        await asyncio.wait((checking, syncing))
        syncing.result()
        return checking.result()

    def _publish(
        self, key: str, manifest: layout.Manifest, held: EntryLock, cost_s: float
    ) -> tuple[EntryLock, tuple[Stamp, ...]] | None:
        """Called in a thread; runs to its end even if the task is cancelled meanwhile. The lease
        gets a lock of its own, and `held` is released here.
        """
        entry = self._cache_folder.entry(key)
        try:
            if layout.stamps(self._cache_folder.partial(key), manifest) is None:
                raise unavailable(Trouble.BROKEN_REPLY, "not all bytes are there")
            if not self._cache_folder.publish(key, held, manifest, cost_s):
                return None
            own = lock_entry(entry, exclusive=False)
            stamps = layout.stamps(entry, manifest)
            return None if own is None or stamps is None else (own, stamps)
        finally:
            self._end(self._cache_folder.partial(key), held)

    def _end(self, partial: Path, held: EntryLock) -> None:
        """Removes a partial folder that no later try can go on from."""
        self._cache_folder.discard(partial, held)

    async def _wait(self, key: str, start: float) -> None:
        """Waits until the other process has the adapter, has failed, or is dead.

        It looks again and again instead of blocking in flock: that would take a thread per adapter,
        and nothing could cancel it.
        """
        stall_s = self._pace.stall_s
        patience_s = (
            DEFAULT_PATIENCE_S
            if stall_s is None
            else stall_s * self._pace.tries + SETTLE_PATIENCE_S
        )
        while True:
            await asyncio.sleep(min(MAX_POLL_S, max(MIN_POLL_S, (clock() - start) * POLL_SHARE)))
            moved_at = await self._in_thread(self._cache_folder.moved_at, key)
            if moved_at is None:
                return
            if time.time() - moved_at > patience_s:
                raise StoreUnavailable(
                    "Another worker of this host began to fetch the adapter and hangs.",
                    retry_after_s=5.0,
                )

    # ---- inside ----------------------------------------------------------------------------------

    def _quarantined(self, key: str, exc: InvalidAdapter) -> InvalidAdapter:
        # the frames of its traceback would keep locks and buffers alive
        self._quarantine[key] = exc.with_traceback(None)
        while len(self._quarantine) > MAX_QUARANTINED:
            self._quarantine.popitem(last=False)
        return exc

    async def _in_thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(
            self._threads, lambda: function(*args, **kwargs)
        )
