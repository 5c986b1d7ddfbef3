"""Shell. Parts that a store has in files: they are copied in a thread that may stand still."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from shared.adapters.identity import StoredAdapter, StoredFile
from shared.errors import StoreUnavailable
from shared.stores import sink
from shared.stores.sink import CALL_BYTES, WRITE_BYTES
from shared.stores.transfer import (
    FilePart,
    Transfer,
    TransferRetries,
    copy_adapter,
    fetch_adapter,
)

WHOLE = os.urandom(3 * CALL_BYTES + 5)
STALL_S = 1.0


class Stuck(io.BytesIO):
    """Its first read stands still until `go_on`, and gives other bytes then."""

    def __init__(self) -> None:
        super().__init__(bytes(len(WHOLE)))
        self.go_on, self.reads_again = threading.Event(), threading.Event()

    def readinto(self, buffer: Any) -> int:
        if self.go_on.is_set():
            self.reads_again.set()
        assert self.go_on.wait(30)
        return super().readinto(buffer)


class Next(io.BytesIO):
    """While it is read, the other one goes on, and has time to do harm."""

    def __init__(self, stuck: Stuck) -> None:
        super().__init__(WHOLE)
        self._stuck = stuck

    def readinto(self, buffer: Any) -> int:
        if not self._stuck.go_on.is_set():
            self._stuck.go_on.set()
            self._stuck.reads_again.wait(STALL_S / 2)
        return super().readinto(buffer)


def stored() -> StoredAdapter:
    return StoredAdapter("a", "digest", (StoredFile("weights", len(WHOLE), "v"),))


async def fetch(into: Path, handles: list[Any], tries: int = 2) -> list[str]:
    """The sha256 of the parts that came. Each try reads the next of the handles."""
    came: list[str] = []

    @contextmanager
    def opened(name: str, file: StoredFile, offset: int) -> Iterator[Any]:
        handle = handles.pop(0)
        handle.seek(offset)
        yield handle

    def on_part(part: FilePart, sha256: str) -> None:
        came.append(sha256)

    how = Transfer(pace=TransferRetries(STALL_S, tries), on_part=on_part)
    await copy_adapter(stored(), into, opened, how)
    return came


def test_a_thread_that_stands_still_and_goes_on_later_changes_nothing(tmp_path: Path) -> None:
    stuck = Stuck()
    came = asyncio.run(fetch(tmp_path, [stuck, Next(stuck)]))  # its threads have ended afterwards
    assert came == [hashlib.sha256(WHOLE).hexdigest()]
    assert (tmp_path / "weights").read_bytes() == WHOLE


def test_a_thread_that_stands_still_in_open_and_goes_on_later_writes_nothing(
    tmp_path: Path,
) -> None:
    came, go_on, left = list[str](), threading.Event(), threading.Event()

    class Whole(io.BytesIO):
        """While it is read, the one before goes on, and has time to do harm."""

        def readinto(self, buffer: Any) -> int:
            go_on.set()
            assert left.wait(30)
            return super().readinto(buffer)

    @contextmanager
    def opened(name: str, file: StoredFile, offset: int) -> Iterator[Any]:
        tries.append(offset)
        if len(tries) > 1:
            yield Whole(WHOLE)
            return
        try:
            assert go_on.wait(30)
            yield io.BytesIO(bytes(len(WHOLE)))
        finally:
            left.set()

    tries = list[int]()
    how = Transfer(pace=TransferRetries(STALL_S, 2), on_part=lambda _, sha256: came.append(sha256))
    asyncio.run(copy_adapter(stored(), tmp_path, opened, how))
    assert came == [hashlib.sha256(WHOLE).hexdigest()] and tries == [0, 0]
    assert (tmp_path / "weights").read_bytes() == WHOLE


async def test_a_part_of_a_file_is_one_turn_of_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one makes the files. A busy loop lets each turn wait for milliseconds."""
    loop, turns = asyncio.get_running_loop(), list[Any]()
    run = loop.run_in_executor
    monkeypatch.setattr(
        loop, "run_in_executor", lambda *more: turns.append(more) or run(*more), raising=False
    )
    assert len(await fetch(tmp_path, [io.BytesIO(WHOLE)])) == 1
    assert len(turns) == 2


async def test_a_file_that_is_too_short_is_read_once_more_from_where_it_ended(
    tmp_path: Path,
) -> None:
    came = await fetch(tmp_path, [io.BytesIO(WHOLE[: CALL_BYTES + 1]), io.BytesIO(WHOLE)])
    assert came == [hashlib.sha256(WHOLE).hexdigest()]
    assert (tmp_path / "weights").read_bytes() == WHOLE


async def test_a_file_that_stands_still_after_its_first_bytes_is_given_up_after_the_tries(
    tmp_path: Path,
) -> None:
    class Slow(io.BytesIO):
        def readinto(self, buffer: Any) -> int:
            assert not self.tell() or release.wait(30)
            return super().readinto(buffer)

    release = threading.Event()
    handles: list[Any] = [Slow(WHOLE), Slow(WHOLE), Slow(WHOLE)]
    try:
        with pytest.raises(StoreUnavailable):
            await fetch(tmp_path, handles, tries=2)
    finally:
        release.set()
    assert len(handles) == 1, "what it brought before is read anew, so it is no progress"


async def test_a_file_that_cannot_be_read_is_given_up_after_the_tries(tmp_path: Path) -> None:
    class Broken(io.BytesIO):
        def readinto(self, buffer: Any) -> int:
            raise OSError(5, "Input/output error")

    handles: list[Any] = [Broken(), Broken(), Broken()]
    with pytest.raises(StoreUnavailable):
        await fetch(tmp_path, handles, tries=2)
    assert len(handles) == 1


class StuckTarget(io.BytesIO):
    """Its first write stands still until `go_on`."""

    def __init__(self, into: Any) -> None:
        super().__init__()
        self._into = into
        self.go_on, self.wrote = threading.Event(), threading.Event()

    def write(self, data: Any) -> int:
        assert self.go_on.wait(30)
        count: int = self._into.write(data)
        self.wrote.set()
        return count


def test_a_write_that_stands_still_and_goes_on_later_changes_no_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, came, targets = os.urandom(WRITE_BYTES), list[str](), list[StuckTarget]()
    opened = sink.open_at

    def open_at(target: Path, offset: int) -> Any:
        if targets:
            return opened(target, offset)
        targets.append(StuckTarget(opened(target, offset)))
        return targets[0]

    @asynccontextmanager
    async def stream(
        name: str, file: StoredFile, offset: int, length: int
    ) -> AsyncIterator[AsyncGenerator[bytes, None]]:
        async def pieces() -> AsyncGenerator[bytes, None]:
            if tries:
                targets[0].go_on.set()
                await asyncio.to_thread(targets[0].wrote.wait, STALL_S / 2)
            tries.append(offset)
            yield whole[offset:]

        yield pieces()

    tries = list[int]()
    monkeypatch.setattr(sink, "open_at", open_at)
    adapter = StoredAdapter("a", "digest", (StoredFile("weights", len(whole), "v"),))
    how = Transfer(pace=TransferRetries(STALL_S, 2), on_part=lambda _, sha256: came.append(sha256))
    asyncio.run(fetch_adapter(adapter, tmp_path, stream, how))
    assert came == [hashlib.sha256(whole).hexdigest()] and tries == [0, 0]
    assert (tmp_path / "weights").read_bytes() == whole
