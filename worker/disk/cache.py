"""Shell. Adapters on this host's disk, shared by all its workers: one download per version and
host, nothing served that was not hashed.

What a process serves it has either downloaded itself (hashed as it came) or hashed in full at its
own first use; afterwards one `lstat` per file tells whether somebody wrote to it. The full hash
costs 0.6 ms per MiB, once per process, on bytes that the engine is about to read anyway; it finds
what no cheaper check does: a disk that lied about a sync, a bit that flipped, a person who edited a
file.
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
from worker.disk.download import DownloadJob, Downloads, Source
from worker.disk.folder import CacheFolder
from worker.disk.journal import Journal
from worker.disk.layout import FILES, EntryLock, Stamp, entry_key, lock_entry

log = logging.getLogger("loraplex.disk_cache")
clock = time.monotonic

Check: TypeAlias = Callable[[Path], AdapterFacts]
P = ParamSpec("P")
T = TypeVar("T")

MAX_DOWNLOADS = 64
"""At once, per worker; the others wait in line. Each has at least one connection of its own."""
MAX_QUARANTINED = 10_000
MAX_SEEN = 10_000
"""Versions that this process remembers as hashed and validated; a forgotten one is hashed again."""
THREADS = 8
"""Of our own: a store that hangs in the loop's threads (a dead network file system) must not keep
us from what is on disk.
"""
HEAVY_THREADS = 2
"""For hashing and validating: more of them would only fight with the event loop for the
interpreter.
"""
POLL_SHARE, MIN_POLL_S, MAX_POLL_S = 0.05, 0.005, 0.1
"""Who waits for another process's download looks again after this share of the time waited so far:
a few looks, and at most 5 % late.
"""
DEFAULT_PATIENCE_S = 120.0
SETTLE_PATIENCE_S = 30.0


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds: until the download could begin, of it from peers, from the store, of validation and
    sync (side by side), of making it visible.
    """

    wait_s: float = 0.0
    peer_s: float = 0.0
    download_s: float = 0.0
    validate_s: float = 0.0
    settle_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Cached:
    """An adapter on disk, hashed, validated and in use: nobody on this host removes it until `keep`
    is called without it.

    `peer_bytes` of it came from other hosts just now.
    """

    folder: Path
    facts: AdapterFacts
    size_bytes: int
    content: str
    times: Times
    peer_bytes: int = 0


@dataclass(frozen=True, slots=True)
class CachedOnDisk:
    """What of an adapter lies on this host: its parts below `files` with their sha256; `moved_at`
    (wall clock) while others are on their way.
    """

    files: Path
    parts: Mapping[PartId, str]
    moved_at: float | None


@dataclass(frozen=True, slots=True)
class _Seen:
    stamps: tuple[Stamp, ...]
    facts: AdapterFacts


class DiskCache:
    """Of one worker process; others work on the same `root` at the same time."""

    def __init__(self, root: Path, budget_bytes: int, pace: Pace | None = None) -> None:
        self._pace = pace or Pace(GRACE_S, 3)
        self._cache_folder = CacheFolder(root, budget_bytes)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="disk")
        self._heavy = ThreadPoolExecutor(HEAVY_THREADS, thread_name_prefix="disk-heavy")
        self._lanes = Lanes()
        self._gate = asyncio.Semaphore(MAX_DOWNLOADS)
        self._leases: dict[str, tuple[EntryLock, int]] = {}
        self._seen: OrderedDict[str, _Seen] = OrderedDict()
        self._quarantine: OrderedDict[str, InvalidAdapter] = OrderedDict()
        self._underway: dict[str, tuple[StoredAdapter, float]] = {}
        self.host = layout.host_of(root)

    def has(self, ref: AdapterRef) -> bool:
        """Whether it seems to be here; `open` knows."""
        return self._cache_folder.entry(entry_key(ref)).is_dir()

    async def open(self, ref: AdapterRef, check: Check) -> Cached | None:
        """The adapter from disk, put in use; None if it is not here. Asks no store.

        Raises:
            InvalidAdapter: it was found invalid before, or is now.
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
        return self._lease(key, held, manifest, seen, Times(validate_s=clock() - start))

    def cached_on_disk(self, ref: AdapterRef) -> CachedOnDisk | None:
        """For other hosts, in a thread: what there is of an adapter, whole or while this process
        fetches it or waits for who does.
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
        """The adapter from disk, else from `peers` or the store unless another process of this host
        is at it already; put in use.

        Raises:
            StoreUnavailable: the store failed beyond the pace's patience, or the disk has no room.
            AdapterNotFound: the store has another version by now.
            InvalidAdapter: it cannot be served; nothing of it is kept, and nobody asks the store
                again for this version.
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
        """Ends the use of every adapter that is not among `refs`: the whole truth each time, so
        that nothing is left in use by an oversight.
        """
        wanted = {entry_key(ref) for ref in refs}
        for key in [key for key in self._leases if key not in wanted]:
            held, size_bytes = self._leases.pop(key)
            # in use until now: it ages from here
            self._threads.submit(self._cache_folder.use, key, size_bytes)
            held.release()

    def close(self) -> None:
        self.keep(())
        self._threads.shutdown(wait=False)
        self._heavy.shutdown(wait=False)

    # ---- from disk -------------------------------------------------------------------------------

    def _take(
        self, key: str, ref: AdapterRef, check: Check
    ) -> tuple[EntryLock, layout.Manifest, _Seen] | None:
        """In a thread. What it finds damaged it throws away."""
        entry = self._cache_folder.entry(key)
        try:
            held = lock_entry(entry, exclusive=False)
        except FileNotFoundError:
            return None
        if held is None:  # is just being removed, or just becoming visible
            return None
        try:
            return self._inspect(key, ref, check, held)
        except BaseException:
            held.release()
            raise

    def _inspect(
        self, key: str, ref: AdapterRef, check: Check, held: EntryLock
    ) -> tuple[EntryLock, layout.Manifest, _Seen] | None:
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
            seen = _Seen(stamps, check(entry / FILES))
        self._cache_folder.use(key, manifest.size_bytes)
        return held, manifest, seen

    def _lease(
        self,
        key: str,
        held: EntryLock,
        manifest: layout.Manifest,
        seen: _Seen,
        times: Times,
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
        """None if somebody else's hand was quicker at the very end."""
        partial = self._cache_folder.partial(key)
        intake = Downloads(job, partial, self._pace, self._lanes)
        keep = handed_over = False
        try:
            await intake.resume(self._threads)
            await intake.bring()
            brought = clock()
            facts = await self._settle(partial / FILES, check, intake)
            checked = clock()
            manifest = layout.manifest_of(job.ref, job.stored, intake.parts)
            handed_over = True
            lease = await self._in_thread(
                self._publish, key, manifest, held, intake.peer_s + intake.store_s
            )
        except (StoreUnavailable, asyncio.CancelledError):
            keep = bool(intake.parts)  # whoever comes next goes on from here
            raise
        except InvalidAdapter as exc:
            raise self._quarantined(key, exc) from None
        finally:
            if not handed_over and keep:
                held.release()  # at once: who looks for what can go must find it free
            elif not handed_over:
                # not awaited: this may run while being cancelled
                self._threads.submit(self._end, partial, held)
        if lease is None:
            return None
        own, stamps = lease
        times = Times(wait_s, intake.peer_s, intake.store_s, checked - brought, clock() - checked)
        return self._lease(key, own, manifest, _Seen(stamps, facts), times, intake.peer_bytes)

    async def _settle(self, files: Path, check: Check, intake: Downloads) -> AdapterFacts:
        """Validates and syncs. What only the store may say is that an adapter is bad: a peer's
        bytes are not held against it.
        """
        try:
            return await self._settled(files, check)
        except InvalidAdapter:
            if not await intake.doubt():
                raise
            return await self._settled(files, check)

    async def _settled(self, files: Path, check: Check) -> AdapterFacts:
        """Side by side."""
        checking = asyncio.get_running_loop().run_in_executor(self._heavy, check, files)
        syncing = asyncio.ensure_future(self._in_thread(layout.sync_files, files))
        await asyncio.wait((checking, syncing))
        syncing.result()
        return checking.result()

    def _publish(
        self, key: str, manifest: layout.Manifest, held: EntryLock, cost_s: float
    ) -> tuple[EntryLock, tuple[Stamp, ...]] | None:
        """In a thread, to its end even if the task is cancelled meanwhile. The lease gets a grip of
        its own: `held` ends here.
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
        """Of a download of which nothing is left to go on from."""
        self._cache_folder.discard(partial, held)

    async def _wait(self, key: str, start: float) -> None:
        """Until the other process has the adapter, has failed, or is dead.

        By looking, not by a blocking flock: that would take a thread per adapter, which nothing
        could call back.
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
        # its frames would keep locks and buffers alive
        self._quarantine[key] = exc.with_traceback(None)
        while len(self._quarantine) > MAX_QUARANTINED:
            self._quarantine.popitem(last=False)
        return exc

    async def _in_thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(
            self._threads, lambda: function(*args, **kwargs)
        )
