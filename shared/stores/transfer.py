"""Shell. Downloads the files of one adapter from a store into a folder. The parts come side by
side, and each goes on where it was cut off.

Every adapter may always download one part. Only the parts beside it come out of a budget, which all
adapters share. So a stuck transfer holds nothing that another adapter waits for.
"""

from __future__ import annotations

import asyncio
import os
import random
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager, aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TypeAlias

from shared.adapters.identity import StoredAdapter, StoredFile
from shared.errors import AdapterNotFound, LoraplexError, StoreUnavailable
from shared.stores.listing import valid_path
from shared.stores.object_store import StoreProblem, TransferCut, transient, unavailable
from shared.stores.sink import PartSink

# Within the range that S3's guidance recommends (8 to 16 MB). A part that a crash cut off costs at
# most this much again.
PART_BYTES = 8 << 20
# Parts of one adapter that are downloaded at once, and such parts beyond the first of all adapters
# of a worker together.
PARTS_PER_ADAPTER = 4
SHARED_LANES = 16
# A transfer may take GRACE_S per try plus its size at this rate. A store that is slower has failed,
# even if bytes trickle in.
MIN_BYTES_PER_S = 256 * 1024
GRACE_S = 30.0
BACKOFF_S = 0.2
MAX_BACKOFF_S = 5.0

Stream: TypeAlias = AbstractAsyncContextManager[AsyncGenerator[bytes, None]]
OpenStream: TypeAlias = Callable[[str, StoredFile, int, int], Stream]
"""(adapter's name, file, offset, length) -> these bytes."""
OpenFile: TypeAlias = Callable[[str, StoredFile, int], AbstractContextManager[BinaryIO]]
"""(adapter's name, file, offset) -> the stored file, open at that byte. Called in a thread. Leaving
it raises AdapterNotFound if the file changed meanwhile.
"""
PartId: TypeAlias = tuple[str, int]
"""(path of the file, number of the part)."""


@dataclass(frozen=True, slots=True)
class FilePart:
    """`size_bytes` bytes of `file`, from `offset` on. All parts but the last of a file have
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
    """The parts of one file in order. An empty file has none."""
    return [
        FilePart(file, number, offset, min(PART_BYTES, file.size_bytes - offset))
        for number, offset in enumerate(range(0, file.size_bytes, PART_BYTES))
    ]


def byte_range(file: StoredFile, offset: int, length: int) -> str:
    """The Range header for these bytes. "" for the whole file."""
    if offset + length < file.size_bytes:
        return f"bytes={offset}-{offset + length - 1}"
    return f"bytes={offset}-" if offset else ""


@dataclass(frozen=True, slots=True)
class TransferRetries:
    """When a transfer has failed. A try ends when no byte comes for `stall_s` seconds (None: no
    limit of ours). After `tries` tries in a row without a byte, the transfer ends.
    """

    stall_s: float | None
    tries: int

    def total_s(self, size_bytes: int) -> float | None:
        """How long a transfer of this size may take, in seconds. None: no limit."""
        return (
            None
            if self.stall_s is None
            else self.stall_s * self.tries + size_bytes / MIN_BYTES_PER_S
        )


@dataclass(slots=True)
class PartBudget:
    """Counts the parts that are downloaded beside the first one of each adapter. Nobody waits:
    a transfer that may not begin another part goes on with those it has.
    """

    free: int = SHARED_LANES

    def take(self) -> bool:
        """Counts one more part. False: there are as many as may be."""
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
    """How one adapter is to be downloaded. The parts of `done` lie in the folder already, and their
    files exist.

    `on_bytes` runs for every piece, on the loop or in a thread. `on_part` runs in a thread after
    the bytes of a part were given to the kernel; it gets the part's sha256. `on_idle` runs on the
    loop while the source itself waits for bytes. It gets the seconds since the source last got any.
    """

    pace: TransferRetries = field(default_factory=lambda: TransferRetries(GRACE_S, 1))
    budget: PartBudget = field(default_factory=PartBudget)
    done: Mapping[PartId, str] = field(default_factory=dict)
    may_exist: bool = False
    on_bytes: Callable[[int], None] = _nothing
    on_part: Callable[[FilePart, str], None] = _no_part
    on_idle: Callable[[float], None] = _no_matter


async def fetch_adapter(
    adapter: StoredAdapter, into: Path, open_stream: OpenStream, transfer: Transfer | None = None
) -> None:
    """Downloads every file of `adapter` below `into`, complete and of the listed version. It never
    overwrites a file that is not its own.

    Raises:
        StoreUnavailable: the store failed more often than the pace allows. What came stays in
            `into`.
        AdapterNotFound: a file is gone or has another version than listed.
    """
    await _whole(_StreamTransfer(adapter, into, transfer or Transfer(), open_stream))


async def copy_adapter(
    adapter: StoredAdapter, into: Path, open_file: OpenFile, transfer: Transfer | None = None
) -> None:
    """Like fetch_adapter, from a store whose bytes lie in files."""
    await _whole(_FileTransfer(adapter, into, transfer or Transfer(), open_file))


async def _whole(run: _Run) -> None:
    adapter = run.adapter
    if not all(valid_path(file.path) for file in adapter.files):
        raise AdapterNotFound(
            f"The adapter `{adapter.name}` has a file outside of its folder.", param="model"
        )
    try:
        async with asyncio.timeout(run.transfer.pace.total_s(adapter.size_bytes)):
            await run.whole()
    except TimeoutError as exc:
        raise unavailable(StoreProblem.TOO_SLOW) from exc
    except OSError as exc:
        raise unavailable(StoreProblem.NOT_WRITABLE, exc.strerror or "") from exc


class _Run(ABC):
    """One transfer in progress."""

    def __init__(self, adapter: StoredAdapter, into: Path, transfer: Transfer) -> None:
        self.adapter = adapter
        self._into = into
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
                    group.create_task(
                        self._download_parts(group, False), name=f"fetch {self.adapter.name}"
                    )
                )
        except ExceptionGroup as failures:
            raise _foremost(failures) from failures
        finally:
            # give back the budget of tasks that were cancelled before their first step
            while self._beside:
                self._beside -= 1
                self.transfer.budget.give()
        # A TaskGroup treats a task that was cancelled from outside as finished.
        if any(task.cancelled() for task in self._tasks):
            raise TransferCut

    def _create(self) -> None:
        """Makes all files, still empty. O_EXCL and O_NOFOLLOW keep it from writing through a
        foreign file or a symlink.
        """
        flags = (
            os.O_WRONLY
            | os.O_CREAT
            | os.O_NOFOLLOW
            | os.O_CLOEXEC
            | (0 if self.transfer.may_exist else os.O_EXCL)
        )
        for file in self.adapter.files:
            target = self._into / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(target, flags, 0o644))

    async def _download_parts(self, group: asyncio.TaskGroup, shared: bool) -> None:
        try:
            while self._queue:
                part = self._queue.popleft()
                self._widen(group)
                await self._bring(part)
        except BaseException:
            self._queue.clear()  # no task begins another part
            raise
        finally:
            if shared:
                self._beside -= 1
                self.transfer.budget.give()

    def _widen(self, group: asyncio.TaskGroup) -> None:
        while (
            self._beside < min(PARTS_PER_ADAPTER - 1, len(self._queue))
            and self.transfer.budget.take()
        ):
            self._beside += 1
            self._tasks.append(
                group.create_task(
                    self._download_parts(group, True), name=f"fetch beside {self.adapter.name}"
                )
            )

    async def _bring(self, part: FilePart) -> None:
        """Downloads one part. A try that brings bytes is followed by another one. After
        `pace.tries` tries in a row without a byte it gives up.
        """
        sink = self._sink(part)
        try:
            fruitless = 0
            while True:
                before = sink.received_bytes
                try:
                    return await self._receive(part, sink)
                except StoreUnavailable as exc:
                    # If all bytes came and it still failed, the checksum is wrong. There is nothing
                    # to resume.
                    came = 0 if sink.abandoned else sink.received_bytes
                    if not transient(exc) or came == part.size_bytes:
                        raise
                    fruitless = 0 if came > before else fruitless + 1
                    if fruitless >= self.transfer.pace.tries:
                        raise
                    if sink.abandoned:
                        sink.close_later()
                        sink = self._sink(part)
                if fruitless:
                    await asyncio.sleep(
                        min(MAX_BACKOFF_S, BACKOFF_S * 2 ** (fruitless - 1))
                        * random.uniform(0.5, 1.5)
                    )
        finally:
            sink.close_later()

    def _sink(self, part: FilePart) -> PartSink:
        return PartSink(self._into / part.file.path, part.offset, part.size_bytes)

    @abstractmethod
    async def _receive(self, part: FilePart, sink: PartSink) -> None:
        """One try. Ends with `_finish` once all bytes came."""

    def _finish(self, part: FilePart, sink: PartSink) -> None:
        self.transfer.on_part(part, sink.finish())


class _StreamTransfer(_Run):
    def __init__(
        self, adapter: StoredAdapter, into: Path, transfer: Transfer, open_stream: OpenStream
    ) -> None:
        super().__init__(adapter, into, transfer)
        self._open_stream = open_stream

    async def _receive(self, part: FilePart, sink: PartSink) -> None:
        stall_s = self.transfer.pace.stall_s
        loop = asyncio.get_running_loop()
        offset, length = part.offset + sink.received_bytes, part.size_bytes - sink.received_bytes
        try:
            async with (
                asyncio.timeout(stall_s) as stall_timeout,
                self._open_stream(self.adapter.name, part.file, offset, length) as pieces,
                aclosing(pieces),
            ):
                async for piece in pieces:
                    await sink.add(piece)
                    self.transfer.on_bytes(len(piece))
                    if stall_s is not None:
                        stall_timeout.reschedule(loop.time() + stall_s)
        except TimeoutError as exc:
            raise unavailable(StoreProblem.TOO_SLOW) from exc
        if sink.received_bytes < part.size_bytes:
            raise TransferCut
        await asyncio.to_thread(self._finish, part, sink)


class _FileTransfer(_Run):
    """A part is one turn of a thread: the loop of a busy process lets others wait for milliseconds
    at each hand-over.
    """

    def __init__(
        self, adapter: StoredAdapter, into: Path, transfer: Transfer, open_file: OpenFile
    ) -> None:
        super().__init__(adapter, into, transfer)
        self._open_file = open_file

    async def _receive(self, part: FilePart, sink: PartSink) -> None:
        turn = asyncio.get_running_loop().run_in_executor(None, self._copy, part, sink)
        try:
            while True:
                before = sink.received_bytes
                await asyncio.wait({turn}, timeout=self.transfer.pace.stall_s)
                if turn.done():
                    return turn.result()
                if sink.received_bytes == before:
                    raise unavailable(StoreProblem.TOO_SLOW)
        finally:
            if not turn.done():
                sink.abandoned = True
                turn.cancel()

    def _copy(self, part: FilePart, sink: PartSink) -> None:
        at = part.offset + sink.received_bytes
        with self._open_file(self.adapter.name, part.file, at) as source:
            sink.copy(source, self.transfer.on_bytes)
        self._finish(part, sink)


def _foremost(failures: ExceptionGroup[Exception]) -> Exception:
    """The failure that says most: "it changed" comes before "it failed". A bug stays in
    its group.
    """
    known = [exc for exc in failures.exceptions if isinstance(exc, LoraplexError | OSError)]
    if len(known) < len(failures.exceptions):
        return failures
    return next((exc for exc in known if isinstance(exc, AdapterNotFound)), known[0])
