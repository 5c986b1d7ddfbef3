"""Shell. What all stores share: listing, finding and fetching adapters through two operations, `pages` and `stream`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, suppress
from enum import Enum
from pathlib import Path
from typing import BinaryIO, Protocol, TypeAlias

from shared.adapters import CONFIG_FILE, StoredAdapter, StoredFile
from shared.errors import AdapterNotFound, LoraplexError, StoreUnavailable
from shared.stores.listing import Entry, Grouping, OutOfOrder, valid_name, valid_path

# Files of one adapter that are fetched at once. Most adapters have two that matter, and one of these holds nearly all the bytes.
FETCH_CONCURRENCY = 4
# A file may take GRACE_S plus its size at this rate, whatever its pieces do: a store that trickles is a store that failed.
MIN_BYTES_PER_S = 256 * 1024
GRACE_S = 30.0
# A cut transfer goes on where it stopped, this many times, and only if it had brought at least one byte.
MAX_RESUMES = 3
# Received pieces are gathered to this size before a thread writes them: a hop into a thread costs some 0.1 ms.
WRITE_BYTES = 1 << 20
# What a throttled client is told to wait.
THROTTLED_RETRY_AFTER_S = 5.0

Stream: TypeAlias = AbstractAsyncContextManager[AsyncGenerator[bytes, None]]
OpenStream: TypeAlias = Callable[[str, StoredFile, int], Stream]


class Trouble(Enum):
    """Why a store is unavailable, in words that name no path, no key and no credential."""

    NO_CREDENTIALS = "no usable credentials for the adapter store were found"
    ACCESS_DENIED = "the adapter store denied access: check the credentials and the bucket's permissions"
    NO_BUCKET = "the adapter store has no such bucket"
    NO_FOLDER = "the adapter folder does not exist or is not a folder"
    WRONG_REGION = "the adapter store's bucket lies in another region: set `region`"
    UNREACHABLE = "the adapter store is unreachable"
    THROTTLED = "the adapter store asked to slow down"
    TOO_SLOW = "the adapter store is too slow: the transfer was given up"
    CUT = "the adapter store cut the transfer"
    BROKEN_REPLY = "the adapter store sent a reply that makes no sense"
    FAILED = "the adapter store failed"
    NOT_WRITABLE = "the adapter cannot be written to the local disk"


def unavailable(trouble: Trouble, detail: str = "") -> StoreUnavailable:
    """The error for `trouble`; `detail` is a status or an error code, never a message of the other side."""
    message = f"{trouble.value} ({detail})" if detail else trouble.value
    return StoreUnavailable(message, retry_after_s=THROTTLED_RETRY_AFTER_S if trouble is Trouble.THROTTLED else None)


def changed(adapter_name: str) -> AdapterNotFound:
    return AdapterNotFound(f"The adapter `{adapter_name}` changed in its store while it was being fetched.", param="model")


class TransferCut(StoreUnavailable):
    """The body of a file broke off; asking for the rest may work."""

    def __init__(self) -> None:
        super().__init__(Trouble.CUT.value)


class Objects(Protocol):
    """The two operations of an object store. Both raise only StoreUnavailable or AdapterNotFound."""

    def pages(self, prefix: str) -> AsyncGenerator[Sequence[Entry], None]:
        """The entries whose key begins with `prefix`, page by page, in ascending order. Keys and prefix are relative to the root."""
        ...

    def stream(self, adapter_name: str, file: StoredFile, offset: int) -> Stream:
        """The bytes of one file from `offset` on. Raises AdapterNotFound if it is gone or has another version, TransferCut if it breaks."""
        ...


async def list_adapters(objects: Objects, grouping: Grouping) -> AsyncIterator[StoredAdapter]:
    """Every adapter of an object store, each as soon as its folder has been listed to its end."""
    try:
        async with aclosing(objects.pages("")) as pages:
            async for page in pages:
                for entry in page:
                    for adapter in grouping.add(entry):
                        yield adapter
    except OutOfOrder as exc:
        raise unavailable(Trouble.BROKEN_REPLY, "keys out of order") from exc
    for adapter in grouping.finish():
        yield adapter


async def find_adapter(objects: Objects, name: str) -> StoredAdapter | None:
    """One adapter: one list request in the usual case, and three for a folder that has no config but any number of pages below it."""
    if not valid_name(name):
        return None
    config_key = f"{name}/{CONFIG_FILE}"
    grouping = Grouping()
    found: list[StoredAdapter] = []
    seen, number = False, 0
    try:
        async with aclosing(objects.pages(f"{name}/")) as pages:
            async for page in pages:
                number += 1
                seen = seen or any(entry.key == config_key for entry in page)
                passed = bool(page) and page[-1].key > config_key
                if not seen and (passed or (number == 2 and not await _exists(objects, config_key))):
                    return None
                found += [a for entry in page for a in grouping.add(entry) if a.name == name]
    except OutOfOrder as exc:
        raise unavailable(Trouble.BROKEN_REPLY, "keys out of order") from exc
    found += [a for a in grouping.finish() if a.name == name]
    return found[0] if found else None


async def _exists(objects: Objects, key: str) -> bool:
    async with aclosing(objects.pages(key)) as pages:
        async for page in pages:
            return any(entry.key == key for entry in page)
    return False


async def fetch_adapter(adapter: StoredAdapter, into: Path, open_stream: OpenStream) -> None:
    """Every file of `adapter` below `into`, complete and of the listed version, or an exception. Nothing is ever overwritten."""
    if not all(valid_path(file.path) for file in adapter.files):
        raise AdapterNotFound(f"The adapter `{adapter.name}` has a file outside of its folder.", param="model")
    gate = asyncio.Semaphore(FETCH_CONCURRENCY)

    async def fetch(file: StoredFile) -> None:
        async with gate:
            await _fetch_file(adapter.name, file, into / file.path, open_stream)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(fetch(file), name=f"fetch {adapter.name}/{file.path}") for file in adapter.files]
    except ExceptionGroup as failures:
        expected = [exc for exc in failures.exceptions if isinstance(exc, LoraplexError)]
        if len(expected) < len(failures.exceptions):
            raise
        # "It changed" tells the caller more than "it failed".
        first = next((exc for exc in expected if isinstance(exc, AdapterNotFound)), expected[0])
        raise first from first.__cause__
    # A TaskGroup takes a task that was cancelled from elsewhere for a finished one.
    if any(task.cancelled() for task in tasks):
        raise TransferCut


async def _fetch_file(adapter_name: str, file: StoredFile, target: Path, open_stream: OpenStream) -> None:
    try:
        handle = await asyncio.to_thread(_create, target)
        try:
            async with asyncio.timeout(GRACE_S + file.size_bytes / MIN_BYTES_PER_S):
                await _receive(adapter_name, file, handle, open_stream)
            await asyncio.to_thread(handle.close)
        finally:
            close_later(handle)
    except TimeoutError as exc:
        raise unavailable(Trouble.TOO_SLOW) from exc
    except OSError as exc:
        raise unavailable(Trouble.NOT_WRITABLE, exc.strerror or "") from exc


def _create(target: Path) -> BinaryIO:
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.open("xb")  # O_CREAT | O_EXCL: neither an existing file nor a symlink is written through


async def _receive(adapter_name: str, file: StoredFile, handle: BinaryIO, open_stream: OpenStream) -> None:
    """Writes exactly `file.size_bytes` bytes; a transfer that was cut goes on where it stopped."""
    sink = _Sink(handle, file.size_bytes)
    for attempt in range(MAX_RESUMES + 1):
        before = sink.received_bytes
        try:
            async with open_stream(adapter_name, file, before) as chunks, aclosing(chunks):
                async for chunk in chunks:
                    await sink.add(chunk)
            if sink.received_bytes < file.size_bytes:
                raise TransferCut
            break
        except TransferCut:
            # All bytes and still a failure is a wrong checksum: nothing to resume.
            if sink.received_bytes in (before, file.size_bytes) or attempt == MAX_RESUMES:
                raise
    await sink.flush()


class _Sink:
    """Gathers received pieces and writes them in a thread; refuses more than was listed."""

    def __init__(self, handle: BinaryIO, limit_bytes: int) -> None:
        self._handle = handle
        self._limit_bytes = limit_bytes
        self._waiting = bytearray()
        self.received_bytes = 0

    async def add(self, piece: bytes) -> None:
        self.received_bytes += len(piece)
        if self.received_bytes > self._limit_bytes:
            raise unavailable(Trouble.BROKEN_REPLY, "more bytes than listed")
        self._waiting += piece
        if len(self._waiting) >= WRITE_BYTES:
            await self.flush()

    async def flush(self) -> None:
        piece, self._waiting = self._waiting, bytearray()
        await asyncio.to_thread(self._handle.write, piece)


def close_later(handle: BinaryIO) -> None:
    """Closes in a thread, without waiting: a thread that outlived our cancellation may hold the file's lock, on a stuck disk for long."""
    if not handle.closed:
        asyncio.get_running_loop().run_in_executor(None, _close, handle)


def _close(handle: BinaryIO) -> None:
    with suppress(OSError):
        handle.close()
