"""Shell. A folder of adapters: a local disk or a shared file system. All file work happens in threads."""

from __future__ import annotations

import asyncio
import builtins
import hashlib
import os
import stat
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote

from shared.adapters import CONFIG_FILE, StoredAdapter, StoredFile
from shared.errors import ConfigError
from shared.stores.listing import Entry, Grouping, Skipped, valid_name
from shared.stores.objects import TransferCut, Trouble, changed, unavailable
from shared.stores.transfer import Transfer, close_later, fetch_adapter

_READ_BYTES = 4 << 20
# How much of either end of a file is read for its version. Both ends of two trainings differ: the tensors' order is alphabetical.
_SAMPLE_BYTES = 64 * 1024
_MAX_DEPTH = 32

_Stamp = tuple[int, int, int, int, int]


class LocalStore:
    """Adapters below one folder. Links are followed as long as they stay below it.

    A file's version is its modification time and a hash of its two ends. The time alone does not do: builds clamp it (container images,
    SOURCE_DATE_EPOCH), and two versions of an adapter have the same size. The inode does not do: copies on two hosts must agree.
    """

    def __init__(self, root: str) -> None:
        path = unquote(root) if root.startswith("/") else root
        if not path:
            raise ConfigError("the adapter folder is empty; use file:///folder or a path")
        self._root = os.path.abspath(os.path.expanduser(path))
        self.url = f"file://{self._root}"
        self.skipped = Skipped()
        self._samples: dict[str, tuple[_Stamp, str]] = {}

    async def __aenter__(self) -> LocalStore:
        return self

    async def __aexit__(self, *exc: object) -> None:
        return None

    async def list(self) -> AsyncIterator[StoredAdapter]:
        samples: dict[str, tuple[_Stamp, str]] = {}
        adapters, self.skipped = await asyncio.to_thread(self._scan, "", samples)
        self._samples = samples
        for adapter in adapters:
            yield adapter

    async def find(self, name: str) -> StoredAdapter | None:
        if not valid_name(name):
            return None
        return await asyncio.to_thread(self._look_up, name)

    async def fetch(self, adapter: StoredAdapter, into: Path, transfer: Transfer | None = None) -> None:
        await fetch_adapter(adapter, into, self._stream, transfer)

    def _look_up(self, name: str) -> StoredAdapter | None:
        real_root = self._real_root()
        if not _reached(real_root, name) or not os.path.isfile(os.path.join(real_root, name, CONFIG_FILE)):
            return None
        adapters, _ = self._scan(name, {})
        return next((a for a in adapters if a.name == name), None)

    def _scan(self, below: str, samples: dict[str, tuple[_Stamp, str]]) -> tuple[builtins.list[StoredAdapter], Skipped]:
        grouping = Grouping()
        walk = _Walk(self._real_root(), grouping)
        adapters: list[StoredAdapter] = []
        for key, path in walk.files(os.path.join(self._root, below) if below else self._root, below):
            try:
                entry = self._entry(key, path, samples)
            except OSError:
                grouping.skip(key)  # gone since, or not readable for us: the rest of the folder is as good as before
                continue
            adapters += grouping.add(entry)
        return adapters + grouping.finish(), grouping.skipped

    def _real_root(self) -> str:
        try:
            with os.scandir(self._root):
                return os.path.realpath(self._root)
        except PermissionError as exc:
            raise unavailable(Trouble.ACCESS_DENIED) from exc
        except OSError as exc:
            raise unavailable(Trouble.NO_FOLDER) from exc

    def _entry(self, key: str, path: str, samples: dict[str, tuple[_Stamp, str]]) -> Entry:
        """The listing's line for one file; its ends are read again only if its inode, size or times differ from the last listing's."""
        stamp = _stamp(os.stat(path))
        known = self._samples.get(key)
        if known is None or known[0] != stamp:
            with _open_regular(path) as handle:
                known = (_stamp(os.fstat(handle.fileno())), _sample(handle))
        samples[key] = known
        (_, _, size, mtime_ns, _), sample = known
        return Entry(key, size, f"{mtime_ns:x}-{sample}")

    @asynccontextmanager
    async def _stream(self, adapter_name: str, file: StoredFile, offset: int, length: int) -> AsyncIterator[AsyncGenerator[bytes, None]]:
        handle = await asyncio.to_thread(self._open_listed, adapter_name, file)
        try:
            yield _chunks(handle, adapter_name, file, offset, length)
        finally:
            close_later(handle)

    def _open_listed(self, adapter_name: str, file: StoredFile) -> BinaryIO:
        real_root = self._real_root()
        path = os.path.realpath(os.path.join(real_root, adapter_name, file.path))
        if not valid_name(adapter_name) or not _below(path, real_root):
            raise changed(adapter_name)
        try:
            handle = _open_regular(path)
        except PermissionError as exc:
            raise unavailable(Trouble.ACCESS_DENIED) from exc
        except FileNotFoundError as exc:
            raise changed(adapter_name) from exc
        except OSError as exc:
            raise unavailable(Trouble.FAILED, exc.strerror or "") from exc
        if _version(handle) != (file.size_bytes, file.version):
            handle.close()
            raise changed(adapter_name)
        return handle


async def _chunks(handle: BinaryIO, adapter_name: str, file: StoredFile, offset: int, length: int) -> AsyncGenerator[bytes, None]:
    try:
        await asyncio.to_thread(handle.seek, offset)
        while length and (chunk := await asyncio.to_thread(handle.read, min(length, _READ_BYTES))):
            length -= len(chunk)
            yield chunk
        if await asyncio.to_thread(_version, handle) != (file.size_bytes, file.version):
            raise changed(adapter_name)  # written in place while we read
    except OSError as exc:
        raise TransferCut from exc


class _Walk:
    """All files below a folder in ascending order of their keys, which is what Grouping needs."""

    def __init__(self, real_root: str, grouping: Grouping) -> None:
        self._real_root = real_root
        self._grouping = grouping

    def files(self, folder: str, key: str, above: tuple[tuple[int, int], ...] = ()) -> Iterator[tuple[str, str]]:
        """(key, path) of each file. `above` holds the folders on the way here: a link back to one of them would never end."""
        try:
            status = os.stat(folder)
            with os.scandir(folder) as entries:
                # A folder's keys begin with its name and a slash, and "-" and "." sort before the slash.
                names = sorted((e.name + "/" if self._is_folder(e) else e.name) for e in entries)
        except OSError:
            self._grouping.skip(key)
            return
        here = (status.st_dev, status.st_ino)
        if here in above or len(above) >= _MAX_DEPTH:
            self._grouping.skip(key)
            return
        for name in names:
            child, path = (f"{key}/{name}" if key else name), os.path.join(folder, name.rstrip("/"))
            if name.startswith(".") or (os.path.islink(path) and not _below(os.path.realpath(path), self._real_root)):
                self._grouping.skip(child)
            elif name.endswith("/"):
                yield from self.files(path, child[:-1], (*above, here))
            else:
                yield child, path

    @staticmethod
    def _is_folder(entry: os.DirEntry[str]) -> bool:
        try:
            return entry.is_dir()
        except OSError:
            return False


def _below(path: str, real_root: str) -> bool:
    return path.startswith(real_root.rstrip("/") + "/")


def _reached(real_root: str, name: str) -> bool:
    """Whether a listing gets to this folder: no step of the way leaves the root or leads back to a folder above."""
    steps = name.split("/")
    folders = [os.path.realpath(os.path.join(real_root, *steps[: i + 1])) for i in range(len(steps))]
    return all(_below(folder, real_root) for folder in folders) and len(set(folders)) == len(folders)


def _open_regular(path: str) -> BinaryIO:
    """Opens a file for reading; a folder, pipe or device is "not found" instead of a hang."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise FileNotFoundError("not a regular file")
    return os.fdopen(fd, "rb")


def _stamp(status: os.stat_result) -> _Stamp:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _sample(handle: BinaryIO) -> str:
    fd = handle.fileno()
    size = os.fstat(fd).st_size
    ends = os.pread(fd, _SAMPLE_BYTES, 0) + os.pread(fd, _SAMPLE_BYTES, max(_SAMPLE_BYTES, size - _SAMPLE_BYTES))
    return hashlib.blake2b(ends, digest_size=8).hexdigest()


def _version(handle: BinaryIO) -> tuple[int, str]:
    status = os.fstat(handle.fileno())
    return status.st_size, f"{status.st_mtime_ns:x}-{_sample(handle)}"
