"""Shell. Brings the files of one adapter from a store into a folder: in parts side by side, each
going on where it was cut.

The first part in the air of every adapter needs nobody's leave; only the parts beside it share
lanes with other adapters. So a stuck transfer takes nothing that another adapter could wait for.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TypeAlias

from shared.adapters.identity import StoredAdapter, StoredFile
from shared.errors import AdapterNotFound, LoraplexError, StoreUnavailable
from shared.stores.listing import valid_path
from shared.stores.objects import TransferCut, Trouble, transient, unavailable

# What S3's own guidance calls a good range (8 to 16 MB); a part that was cut short by a crash costs
# at most this much again.
PART_BYTES = 8 << 20
# Parts of one adapter in the air, and parts beyond the first of all adapters of a worker.
PARTS_PER_ADAPTER = 4
SHARED_LANES = 16
# A transfer may take GRACE_S per try plus its size at this rate, whatever its pieces do: a store
# that trickles is a store that failed.
MIN_BYTES_PER_S = 256 * 1024
GRACE_S = 30.0
BACKOFF_S = 0.2
MAX_BACKOFF_S = 5.0
# Received pieces are gathered to this size before a thread writes them: a hop into a thread costs
# some 0.1 ms.
WRITE_BYTES = 1 << 20

Stream: TypeAlias = AbstractAsyncContextManager[AsyncGenerator[bytes, None]]
OpenStream: TypeAlias = Callable[[str, StoredFile, int, int], Stream]
"""(adapter's name, file, offset, length) -> its bytes."""
PartId: TypeAlias = tuple[str, int]
"""(path of the file, number of the part)."""


@dataclass(frozen=True, slots=True)
class FilePart:
    """`size_bytes` bytes of `file` from `offset` on; all parts of a file but the last have
    PART_BYTES.
    """

    file: StoredFile
    number: int
    offset: int
    size_bytes: int

    @property
    def id(self) -> PartId:
        return self.file.path, self.number


def parts_of(file: StoredFile) -> list[FilePart]:
    """The parts of one file in order; none for an empty one."""
    return [
        FilePart(file, number, offset, min(PART_BYTES, file.size_bytes - offset))
        for number, offset in enumerate(range(0, file.size_bytes, PART_BYTES))
    ]


def byte_range(file: StoredFile, offset: int, length: int) -> str:
    """The Range header for these bytes; empty for the whole file."""
    if offset + length < file.size_bytes:
        return f"bytes={offset}-{offset + length - 1}"
    return f"bytes={offset}-" if offset else ""


@dataclass(frozen=True, slots=True)
class Pace:
    """When a transfer has failed. A try ends when no byte comes for `stall_s` seconds (None: no
    limit of ours); `tries` in a row that bring not one byte of a part end the transfer.
    """

    stall_s: float | None
    tries: int

    def total_s(self, size_bytes: int) -> float | None:
        return (
            None
            if self.stall_s is None
            else self.stall_s * self.tries + size_bytes / MIN_BYTES_PER_S
        )


@dataclass(slots=True)
class Lanes:
    """Parts that may be in the air beside the first one of each adapter. Nobody waits for a lane:
    who gets none goes on with what it has.
    """

    free: int = SHARED_LANES

    def take(self) -> bool:
        if not self.free:
            return False
        self.free -= 1
        return True

    def give(self) -> None:
        self.free += 1


def _nothing(_: int) -> None: ...


def _no_matter(_: float) -> None: ...


def _no_part(_: FilePart, __: str) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """How one adapter is to be brought. `done` are parts that lie in the folder already (their
    files exist then).

    `on_bytes` runs on the loop for every piece; `on_part` in a thread, with the part's sha256, once
    its bytes were given to the kernel. `on_idle` runs on the loop where the source waits for the
    bytes itself: with the seconds since it got any.
    """

    pace: Pace = field(default_factory=lambda: Pace(GRACE_S, 1))
    lanes: Lanes = field(default_factory=Lanes)
    done: Mapping[PartId, str] = field(default_factory=dict)
    may_exist: bool = False
    on_bytes: Callable[[int], None] = _nothing
    on_part: Callable[[FilePart, str], None] = _no_part
    on_idle: Callable[[float], None] = _no_matter


async def fetch_adapter(
    adapter: StoredAdapter, into: Path, open_stream: OpenStream, transfer: Transfer | None = None
) -> None:
    """Every file of `adapter` below `into`, complete and of the listed version, or an exception.
    Nothing foreign is ever overwritten.

    Raises:
        StoreUnavailable: the store failed beyond the pace's patience; what came is left in `into`.
        AdapterNotFound: a file is gone or has another version than listed.
    """
    if not all(valid_path(file.path) for file in adapter.files):
        raise AdapterNotFound(
            f"The adapter `{adapter.name}` has a file outside of its folder.", param="model"
        )
    run = _Run(adapter, into, open_stream, transfer or Transfer())
    try:
        async with asyncio.timeout(run.transfer.pace.total_s(adapter.size_bytes)):
            await run.whole()
    except TimeoutError as exc:
        raise unavailable(Trouble.TOO_SLOW) from exc
    except OSError as exc:
        raise unavailable(Trouble.NOT_WRITABLE, exc.strerror or "") from exc


class _Run:
    """One transfer under way."""

    def __init__(
        self, adapter: StoredAdapter, into: Path, open_stream: OpenStream, transfer: Transfer
    ) -> None:
        self._adapter = adapter
        self._into = into
        self._open_stream = open_stream
        self.transfer = transfer
        parts = [
            part
            for file in adapter.files
            for part in parts_of(file)
            if part.id not in transfer.done
        ]
        self._queue = deque(parts)
        self._beside = 0
        self._tasks: list[asyncio.Task[None]] = []

    async def whole(self) -> None:
        await asyncio.to_thread(self._create)
        try:
            async with asyncio.TaskGroup() as group:
                self._tasks.append(
                    group.create_task(self._lane(group, False), name=f"fetch {self._adapter.name}")
                )
        except ExceptionGroup as failures:
            raise _foremost(failures) from failures
        finally:
            while self._beside:  # lanes of tasks that were cancelled before they ever ran
                self._beside -= 1
                self.transfer.lanes.give()
        # A TaskGroup takes a task that was cancelled from elsewhere for a finished one.
        if any(task.cancelled() for task in self._tasks):
            raise TransferCut

    def _create(self) -> None:
        """All files, still empty. O_EXCL and O_NOFOLLOW: neither a foreign file nor a symlink is
        written through.
        """
        flags = (
            os.O_WRONLY
            | os.O_CREAT
            | os.O_NOFOLLOW
            | os.O_CLOEXEC
            | (0 if self.transfer.may_exist else os.O_EXCL)
        )
        for file in self._adapter.files:
            target = self._into / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(target, flags, 0o644))

    async def _lane(self, group: asyncio.TaskGroup, shared: bool) -> None:
        try:
            while self._queue:
                part = self._queue.popleft()
                self._widen(group)
                await self._bring(part)
        except BaseException:
            self._queue.clear()  # nobody begins another part
            raise
        finally:
            if shared:
                self._beside -= 1
                self.transfer.lanes.give()

    def _widen(self, group: asyncio.TaskGroup) -> None:
        while (
            self._beside < min(PARTS_PER_ADAPTER - 1, len(self._queue))
            and self.transfer.lanes.take()
        ):
            self._beside += 1
            self._tasks.append(
                group.create_task(
                    self._lane(group, True), name=f"fetch beside {self._adapter.name}"
                )
            )

    async def _bring(self, part: FilePart) -> None:
        """One part, in as many tries as bring something, and `pace.tries` in a row that bring
        nothing.
        """
        handle = await asyncio.to_thread(_open_at, self._into / part.file.path, part.offset)
        try:
            sink = _Sink(handle, part.size_bytes)
            fruitless = 0
            while True:
                before = sink.received_bytes
                try:
                    await self._receive(part, sink)
                    break
                except StoreUnavailable as exc:
                    # All bytes and still a failure is a wrong checksum: nothing to resume.
                    if not transient(exc) or sink.received_bytes == part.size_bytes:
                        raise
                    fruitless = 0 if sink.received_bytes > before else fruitless + 1
                    if fruitless >= self.transfer.pace.tries:
                        raise
                if fruitless:
                    await asyncio.sleep(
                        min(MAX_BACKOFF_S, BACKOFF_S * 2 ** (fruitless - 1))
                        * random.uniform(0.5, 1.5)
                    )
            await asyncio.to_thread(self._finish, part, sink)
        finally:
            close_later(handle)

    async def _receive(self, part: FilePart, sink: _Sink) -> None:
        """One try."""
        stall_s = self.transfer.pace.stall_s
        loop = asyncio.get_running_loop()
        offset, length = part.offset + sink.received_bytes, part.size_bytes - sink.received_bytes
        try:
            async with (
                asyncio.timeout(stall_s) as patience,
                self._open_stream(self._adapter.name, part.file, offset, length) as chunks,
                aclosing(chunks),
            ):
                async for chunk in chunks:
                    await sink.add(chunk)
                    self.transfer.on_bytes(len(chunk))
                    if stall_s is not None:
                        patience.reschedule(loop.time() + stall_s)
        except TimeoutError as exc:
            raise unavailable(Trouble.TOO_SLOW) from exc
        if sink.received_bytes < part.size_bytes:
            raise TransferCut

    def _finish(self, part: FilePart, sink: _Sink) -> None:
        sink.write()
        sink.close()
        self.transfer.on_part(part, sink.sha256())


def _foremost(failures: ExceptionGroup[Exception]) -> Exception:
    """The failure that tells most: "it changed" before "it failed". A bug stays the group that it
    came in.
    """
    known = [exc for exc in failures.exceptions if isinstance(exc, LoraplexError | OSError)]
    if len(known) < len(failures.exceptions):
        return failures
    return next((exc for exc in known if isinstance(exc, AdapterNotFound)), known[0])


def _open_at(target: Path, offset: int) -> BinaryIO:
    handle = os.fdopen(os.open(target, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC), "r+b")
    handle.seek(offset)
    return handle


class _Sink:
    """Gathers received pieces, hashes and writes them in a thread; refuses more than was asked
    for.
    """

    def __init__(self, handle: BinaryIO, limit_bytes: int) -> None:
        self._handle = handle
        self._limit_bytes = limit_bytes
        self._pieces: list[bytes] = []  # a list: joining them would copy every byte once more
        self._waiting_bytes = 0
        self._hash = hashlib.sha256()
        self.received_bytes = 0

    async def add(self, piece: bytes) -> None:
        if self.received_bytes + len(piece) > self._limit_bytes:
            raise unavailable(Trouble.BROKEN_REPLY, "more bytes than listed")
        self.received_bytes += len(piece)
        self._pieces.append(piece)
        self._waiting_bytes += len(piece)
        if self._waiting_bytes >= WRITE_BYTES:
            await asyncio.to_thread(self.write)

    def write(self) -> None:
        pieces, self._pieces, self._waiting_bytes = self._pieces, [], 0
        for piece in pieces:
            self._hash.update(piece)
            self._handle.write(piece)

    def close(self) -> None:
        self._handle.close()

    def sha256(self) -> str:
        return self._hash.hexdigest()


def close_later(handle: BinaryIO) -> None:
    """Closes in a thread, without waiting: a thread that outlived our cancellation may hold the
    file's lock, on a stuck disk for long.
    """
    if not handle.closed:
        asyncio.get_running_loop().run_in_executor(None, _close, handle)


def _close(handle: BinaryIO) -> None:
    with suppress(OSError):
        handle.close()
