"""Shell. Adapters on this host's disk: one folder per version, written aside and renamed, so that a half-written one is never seen.

The folder's name is a hash of (base, name, digest), never a client's string. Folders are immutable and shared by the workers of the host; a
worker that loses the race to create one uses the winner's. Beyond the byte budget the folders that were used longest ago go, but none that a
worker may be about to load.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import shutil
import time
import uuid
from pathlib import Path

from shared.adapters import CONFIG_FILE, WEIGHTS_FILE, AdapterRef, StoredAdapter, check_adapter_config
from shared.errors import InvalidAdapter, StoreUnavailable
from shared.stores import AdapterStore

log = logging.getLogger("loraplex.disk_cache")

YOUNG_S = 120.0  # a folder used within this time is never evicted: some worker may be loading it
STALE_ASIDE_S = 3600.0  # what a killed worker left half-written


class DiskCache:
    """Folders below `root`, at most `budget_bytes` of them (0: no bound)."""

    def __init__(self, root: Path, budget_bytes: int) -> None:
        self._root = root
        self._aside = root / ".aside"
        self._budget_bytes = budget_bytes
        self._aside.mkdir(parents=True, exist_ok=True)
        self._sweep()

    def folder(self, ref: AdapterRef) -> Path:
        key = hashlib.sha256("\0".join((ref.base, ref.name, ref.digest)).encode()).hexdigest()[:32]
        return self._root / key

    def has(self, ref: AdapterRef) -> bool:
        return self.folder(ref).is_dir()

    async def fetch(
        self, ref: AdapterRef, stored: StoredAdapter, store: AdapterStore, timeout_s: float | None, max_rank: int
    ) -> tuple[Path, int]:
        """The adapter's folder and rank, fetched from the store unless it is here already.

        Raises:
            StoreUnavailable, AdapterNotFound: from the store. InvalidAdapter: it cannot be served; nothing of it is kept.
        """
        folder = self.folder(ref)
        if not folder.is_dir():
            aside = self._aside / uuid.uuid4().hex
            aside.mkdir()
            try:
                async with asyncio.timeout(timeout_s):
                    await store.fetch(stored, aside)
                await asyncio.to_thread(self._settle, aside, folder, max_rank)
            except TimeoutError as exc:
                raise StoreUnavailable(f"Fetching the adapter `{ref.name}` took longer than {timeout_s:g} s.", retry_after_s=5.0) from exc
            finally:
                shutil.rmtree(aside, ignore_errors=True)
            await asyncio.to_thread(self._evict, folder)
        else:
            os.utime(folder)
        rank = await asyncio.to_thread(_validate, folder, max_rank)
        return folder, rank

    def _settle(self, aside: Path, folder: Path, max_rank: int) -> None:
        _validate(aside, max_rank)
        for path in [*aside.rglob("*"), aside]:
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        try:
            aside.rename(folder)
        except OSError:
            if not folder.is_dir():  # lost the race to another worker: its folder is as good
                raise
        fd = os.open(self._root, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def _evict(self, keep: Path) -> None:
        if not self._budget_bytes:
            return
        aged = [(p.stat().st_mtime, _size_bytes(p), p) for p in self._root.iterdir() if p != self._aside and p.is_dir()]
        total = sum(size for _, size, _ in aged)
        for mtime, size, path in sorted(aged):
            if total <= self._budget_bytes or time.time() - mtime < YOUNG_S:
                return
            if path != keep:
                shutil.rmtree(path, ignore_errors=True)
                total -= size
                log.info("adapter removed from disk", extra={"folder": path.name, "bytes": size})

    def _sweep(self) -> None:
        for path in self._aside.iterdir():
            if time.time() - path.stat().st_mtime > STALE_ASIDE_S:
                shutil.rmtree(path, ignore_errors=True)


def _validate(folder: Path, max_rank: int) -> int:
    try:
        raw = (folder / CONFIG_FILE).read_bytes()
    except OSError as exc:
        raise InvalidAdapter(f"{CONFIG_FILE} is missing") from exc
    rank = check_adapter_config(raw, max_rank)
    if not (folder / WEIGHTS_FILE).is_file():
        raise InvalidAdapter(f"{WEIGHTS_FILE} is missing (weights in pickle files are refused)")
    return rank


def _size_bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
