"""Shell. The bytes of one part on their way into its file: hashed and written in threads."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from shared.stores.object_store import StoreProblem, TransferCut, unavailable

# Received pieces are gathered to this size before a thread writes them. Each hand-over to a thread
# costs about 0.1 ms, and a wait for the loop.
WRITE_BYTES = 1 << 20
# What is read, hashed and written in one call each. Each call waits for the interpreter, which a
# busy loop has for milliseconds. It stays in a core's cache. Linux looks for a large page of memory
# for a large write, and ext4 took five times as long for calls of 4 MiB.
CALL_BYTES = 1 << 20


class PartSink:
    """Takes `limit_bytes` bytes at most and writes them to the file `target`, from `offset` on. Its
    first thread opens the file. One thread at a time works for it.
    """

    def __init__(self, target: Path, offset: int, limit_bytes: int) -> None:
        self._target, self._offset, self._limit_bytes = target, offset, limit_bytes
        self._handle: BinaryIO | None = None
        self._pieces: list[bytes] = []  # a list, because joining would copy every byte once more
        self._waiting_bytes = 0
        self._hash = hashlib.sha256()
        self.received_bytes = 0
        self.abandoned = False
        """Nobody waits for a thread that still reads or writes. Once it has read, it writes
        nothing. Nobody else may use this sink meanwhile.
        """

    async def add(self, piece: bytes) -> None:
        """Raises StoreFailure for more bytes than the limit, OSError if they cannot be written."""
        if self.received_bytes + len(piece) > self._limit_bytes:
            raise unavailable(StoreProblem.BROKEN_REPLY, "more bytes than listed")
        self.received_bytes += len(piece)
        self._pieces.append(piece)
        self._waiting_bytes += len(piece)
        if self._waiting_bytes >= WRITE_BYTES:
            try:
                await asyncio.to_thread(self._write_pieces)
            except asyncio.CancelledError:
                self.abandoned = True
                raise

    def close_later(self) -> None:
        """Closes in a thread and does not wait. A thread that is still writing may hold the file's
        lock, on a stuck disk for long.
        """
        self.abandoned = True
        if self._handle is not None and not self._handle.closed:
            asyncio.get_running_loop().run_in_executor(None, _close, self._handle)

    # ---- in threads ------------------------------------------------------------------------------

    def copy(self, source: BinaryIO, on_bytes: Callable[[int], None]) -> None:
        """Takes the bytes that are missing from `source`, by way of a buffer that stays in a core's
        cache: new memory for each piece costs more than its read. Tells `on_bytes` of every call.

        Raises TransferCut if they cannot be read, or nobody waits for them any more.
        """
        target, buffer = self._open(), memoryview(bytearray(CALL_BYTES))
        while left := self._limit_bytes - self.received_bytes:
            try:
                count = source.readinto(buffer[:left])  # type: ignore[attr-defined]
            except OSError as exc:
                raise TransferCut from exc
            if not count or self.abandoned:
                raise TransferCut
            self._hash.update(buffer[:count])
            target.write(buffer[:count])
            self.received_bytes += count
            on_bytes(count)

    def finish(self) -> str:
        """Writes what still waits, closes the file, and returns the sha256 of all."""
        self._write_pieces()
        self._open().close()
        return self._hash.hexdigest()

    def _write_pieces(self) -> None:
        target = self._open()
        pieces, self._pieces, self._waiting_bytes = self._pieces, [], 0
        for piece in pieces:
            whole = memoryview(piece)
            for at in range(0, len(whole), CALL_BYTES):
                self._hash.update(whole[at : at + CALL_BYTES])
                target.write(whole[at : at + CALL_BYTES])

    def _open(self) -> BinaryIO:
        """Raises TransferCut if nobody waits for it any more: another sink has the file then."""
        if self._handle is None:
            self._handle = open_at(self._target, self._offset)
        if self.abandoned:  # looked at after `_handle` was set: `close_later` does the reverse
            _close(self._handle)
            raise TransferCut
        return self._handle


def open_at(target: Path, offset: int) -> BinaryIO:
    """An existing file, to be written from `offset` on. Follows no link."""
    handle = os.fdopen(os.open(target, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC), "r+b")
    handle.seek(offset)
    return handle


def _close(handle: BinaryIO) -> None:
    with suppress(OSError):
        handle.close()
