"""Shell. The cache's folder on disk: which process may download, which adapters are removed to make
room, and when an adapter becomes visible. Every call blocks, so call it in threads.

A change that other processes must see as a whole is a rename. Whether another process works on a
folder is answered by a lock. So a process may die between any two lines: the next process finds the
state before or the state after.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path

from shared.adapters.checks import AdapterLimits, check_sizes
from shared.adapters.identity import StoredAdapter
from shared.errors import ConfigError, InvalidAdapter, StoreUnavailable
from shared.runtime.process import make_private
from worker.disk import eviction, layout
from worker.disk.download_journal import DownloadJournal
from worker.disk.layout import FILES, JOURNAL, EntryLock, Manifest, lock_entry

log = logging.getLogger("loraplex.disk_cache")

PARTIAL_KEEP_S = 24 * 3600.0
"""A partial download that no process has continued for this long is removed."""
KEEP_FREE_BYTES = 256 << 20
"""Space of the file system that the cache leaves to other programs, for example for their logs."""
LOCK_TIMEOUT_S = 5.0
"""Longest wait for the folder's own lock. It is held for milliseconds, so a process that holds it
for longer hangs.
"""
LOCK_POLL_S = 0.002


class NoDownload(Enum):
    """Why a download cannot begin."""

    CACHED = "cached"  # the entry is complete
    IN_PROGRESS = "in progress"  # another process is downloading it


class CacheFolder:
    """The adapters below `root`. The entries and the downloads in progress take at most
    `budget_bytes` together (0: as much as the disk holds).

    Raises ConfigError if the folder cannot be made, or the file system has no locks.
    """

    def __init__(self, root: Path, budget_bytes: int) -> None:
        self._root, self._budget_bytes = root, budget_bytes
        self._entries, self._partials, self._trash = (
            root / "entries",
            root / "partial",
            root / "trash",
        )
        self._folders = (root, self._entries, self._partials, self._trash)
        self._sizes: dict[tuple[str, int], int] = {}
        try:
            for folder in self._folders:
                make_private(folder)
        except OSError as exc:
            raise ConfigError(
                f"gateway.state_dir: cannot make {folder}: {exc.strerror}", param="state_dir"
            ) from exc
        try:
            held = lock_entry(self._trash, exclusive=False)
        except OSError as exc:
            raise ConfigError(
                "gateway.state_dir lies on a file system without flock; use a local disk",
                param="state_dir",
            ) from exc
        if held is not None:
            held.release()
        self._drop_old_partials()
        self.empty_trash()

    def entry(self, key: str) -> Path:
        """Where the complete adapter lies."""
        return self._entries / key

    def partial(self, key: str) -> Path:
        """Where the adapter lies while it is being downloaded."""
        return self._partials / key

    # ---- a download's life -----------------------------------------------------------------------

    def begin(self, key: str, stored: StoredAdapter) -> EntryLock | NoDownload:
        """Reserves the adapter's bytes and returns the exclusive right to download it. Parts that
        an earlier try left are still in place.

        Raises:
            StoreUnavailable: there is no room, because every other adapter is in use.
            InvalidAdapter: the adapter alone is larger than the budget, or than any may be. Then
                no other adapter makes room for it.
        """
        check_sizes({file.path: file.size_bytes for file in stored.files}, AdapterLimits())
        if self._budget_bytes and stored.size_bytes > self._budget_bytes:
            raise InvalidAdapter(
                f"The adapter takes {stored.size_bytes} bytes; the server's disk cache holds less.",
                "too_large",
            )
        partial = self.partial(key)
        for folder in self._folders:  # who tidies up may have taken them, if they were empty
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._alone():
            if self.entry(key).is_dir():
                return NoDownload.CACHED
            if not partial.is_dir():
                self._make_room(stored.size_bytes)
            (partial / FILES).mkdir(parents=True, exist_ok=True)
            held = lock_entry(partial, exclusive=True)
            if held is None:
                return NoDownload.IN_PROGRESS
            DownloadJournal(partial, stored).start()
        self.empty_trash()
        return held

    def publish(self, key: str, held: EntryLock, manifest: Manifest, cost_s: float) -> bool:
        """Makes a complete download an entry; `held` then is a shared lock on it. False if another
        process removed the entry in that moment.
        """
        partial, entry = self.partial(key), self.entry(key)
        layout.write_manifest(partial, manifest)
        layout.write_use_frequency(
            partial,
            eviction.used(
                eviction.UseFrequency(cost_s=cost_s),
                manifest.size_bytes,
                layout.read_clock(self._root),
            ),
        )
        with self._alone():
            partial.rename(entry)
        (entry / JOURNAL).unlink(missing_ok=True)
        return held.share() and held.holds(entry)

    def sync(self, key: str) -> None:
        """Writes an entry to the disk. An entry that is gone already is no error."""
        with suppress(FileNotFoundError):
            layout.sync_files(self.entry(key))
        layout.sync(self._entries)

    def moved_at(self, key: str) -> float | None:
        """When another process's download last got bytes (wall clock). None if no process is
        downloading it.
        """
        partial = self.partial(key)
        try:
            held = lock_entry(partial, exclusive=True)
        except FileNotFoundError:
            return None
        if held is None:
            return layout.moved_at(partial)
        held.release()
        return None

    def use(self, key: str, size_bytes: int) -> None:
        """Counts one use of the entry."""
        entry = self.entry(key)
        layout.write_use_frequency(
            entry,
            eviction.used(
                layout.read_use_frequency(entry), size_bytes, layout.read_clock(self._root)
            ),
        )

    def discard(self, folder: Path, held: EntryLock) -> None:
        """Moves the folder out of sight at once, if it is still the one that `held` locks. Its
        bytes are freed as soon as no process uses them. Releases `held`.
        """
        try:
            with self._alone():
                if held.holds(folder):
                    self._throw_away(folder)
        finally:
            held.release()
        self.empty_trash()

    def empty_trash(self) -> None:
        """Deletes the discarded folders that no process uses any more."""
        for folder in list(self._trash.iterdir()):
            try:
                held = lock_entry(folder, exclusive=True)
            except OSError:
                continue  # another process was quicker
            if held is not None:
                shutil.rmtree(folder, ignore_errors=True)
                held.release()

    def used_bytes(self) -> int:
        """The bytes of all entries and of all downloads in progress."""
        return sum(self._scan().values())

    # ---- inside ----------------------------------------------------------------------------------

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Inside, no other process scans, evicts or reserves. Raises StoreUnavailable after
        LOCK_TIMEOUT_S.
        """
        fd = os.open(self._root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            deadline = time.monotonic() + LOCK_TIMEOUT_S
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise StoreUnavailable(
                            "The adapter cache of this host is locked by a process that hangs."
                        ) from None
                    time.sleep(LOCK_POLL_S)
            yield
        finally:
            os.close(fd)

    def _make_room(self, incoming_bytes: int) -> None:
        """Removes adapters until `incoming_bytes` fit. Raises StoreUnavailable if too much is in
        use.
        """
        sizes = self._scan()
        status = os.statvfs(self._root)
        # The remaining bytes of other downloads in progress are promised already.
        promised = sum(
            max(0, size - layout.size_on_disk(path))
            for path, size in sizes.items()
            if path.parent == self._partials
        )
        free_bytes = status.f_bavail * status.f_frsize - promised
        room = eviction.bytes_to_free(
            sum(sizes.values()), incoming_bytes, self._budget_bytes, free_bytes, KEEP_FREE_BYTES
        )
        if not room.must_bytes:
            return
        freed, clock = self._drop_idle_partials(sizes), layout.read_clock(self._root)
        entries = {path.name: size for path, size in sizes.items() if path.parent == self._entries}
        candidates = [
            eviction.EvictionCandidate(
                key, size, layout.read_use_frequency(self.entry(key)).priority
            )
            for key, size in entries.items()
        ]
        for victim in eviction.leaving(candidates):
            if freed >= room.aim_bytes:
                break
            if self._evict(victim.key):
                freed += victim.size_bytes
                clock = max(clock, victim.priority)
                log.info(
                    "adapter removed from disk",
                    extra={"key": victim.key, "bytes": victim.size_bytes},
                )
        layout.write_clock(self._root, clock)
        if freed < room.must_bytes:
            raise StoreUnavailable(
                "The adapter cache of this host is full of adapters in use: "
                "gateway.disk_cache_bytes or the disk is too small.",
                retry_after_s=LOCK_TIMEOUT_S,
            )

    def _evict(self, key: str) -> bool:
        """Removes an entry. False if a process uses it."""
        try:
            held = lock_entry(self.entry(key), exclusive=True)
        except FileNotFoundError:
            return False
        if held is None:
            return False
        self._throw_away(self.entry(key))
        held.release()
        return True

    def _scan(self) -> dict[Path, int]:
        """Every entry and partial folder, with the bytes that it takes or will take. These sizes
        never change, so each is read once per process.
        """
        sizes: dict[Path, int] = {}
        known: dict[tuple[str, int], int] = {}
        for parent in (self._entries, self._partials):
            for name, inode in layout.keys_in(parent):
                size = self._sizes.get((name, inode))
                if size is None:
                    manifest = layout.read_manifest(parent / name)
                    size = manifest.size_bytes if manifest else layout.planned_bytes(parent / name)
                sizes[parent / name] = known[name, inode] = size
        self._sizes = known
        return sizes

    def _drop_idle_partials(self, sizes: dict[Path, int]) -> int:
        """Removes the partial folders that no process works on, and returns the bytes that were
        freed. When room is short, half a download is worth less than any complete adapter.
        """
        freed = 0
        for path, size in sizes.items():
            if path.parent == self._partials and self._drop_partial(path):
                freed += size
        return freed

    def _drop_old_partials(self) -> None:
        for name, _ in layout.keys_in(self._partials):
            moved = layout.moved_at(self._partials / name)
            if moved is None or time.time() - moved > PARTIAL_KEEP_S:
                self._drop_partial(self._partials / name)

    def _drop_partial(self, partial: Path) -> bool:
        try:
            held = lock_entry(partial, exclusive=True)
        except FileNotFoundError:
            return False
        if held is None:
            return False
        self._throw_away(partial)
        held.release()
        return True

    def _throw_away(self, folder: Path) -> None:
        with suppress(FileNotFoundError):
            folder.rename(self._trash / f"{folder.name}.{uuid.uuid4().hex}")
