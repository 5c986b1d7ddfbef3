"""Shell. How many workers died of what, in a file that all gateway processes of a machine map into
memory. It holds lengths and digests, never a body or a name.

What is found without the lock may be half written by another process, so it is read again with the
lock before it counts.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from shared.errors import ConfigError
from shared.runtime.file_lock import FileLock

KEPT_S = 300.0
"""As long as the workers may take to start again, with a large model."""
MAX_ROWS = 1024
PLACES = 8
"""Rows that are tried for one length. If all are taken, one with the fewest deaths is given up."""
NEWEST = struct.Struct("d")
"""Until when anything is remembered. It stands before the rows."""
ROW = struct.Struct("q16sdii")
"""The length, the digest, until when it counts, how many workers died, and whether one died after
it had begun to answer.
"""
DIGEST_BYTES = 16
MAX_LENGTH, MAX_DEATHS = 1 << 62, 1 << 30


class RowKey(NamedTuple):
    """`length`: that of a request's body in bytes, and below 0 for what is no request."""

    length: int
    digest: bytes


class Died(NamedTuple):
    """So many workers died of what has ended without its answer, as far as can be told. 0: of what
    has not ended yet. `begun`: one of them after it had begun to answer.
    """

    deaths: int = 0
    begun: bool = False


class Row(NamedTuple):
    """`since`: when it was written last."""

    at: int
    died: Died
    since: float


class DeathTable:
    """`path` None: this process remembers by itself. Times are seconds of the machine's monotonic
    clock. Close it at the end.

    Raises ConfigError if the file cannot be made.
    """

    def __init__(self, path: Path | None, now: float) -> None:
        size = NEWEST.size + ROW.size * MAX_ROWS
        self._file: int | None = None
        self._lock: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if path is not None:
            try:
                self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                os.posix_fallocate(self._file, 0, size)  # as in SharedLimits: see there
            except OSError as exc:
                raise ConfigError(f"{path} cannot be made: {exc.strerror}") from exc
            self._lock = FileLock(self._file)
        self._map = mmap.mmap(-1 if self._file is None else self._file, size)
        self._newest = memoryview(self._map)[: NEWEST.size].cast("d")
        with self._lock:
            if self._newest[0] > now + KEPT_S:  # of another clock, before the machine's start
                self._map[:] = bytes(size)

    def close(self) -> None:
        self._newest.release()
        self._map.close()
        if self._file is not None:
            os.close(self._file)

    def empty(self, now: float) -> bool:
        """Whether nothing is remembered: a look at one number."""
        return self._newest[0] <= now

    def has_length(self, length: int) -> bool:
        """Whether there may be a row of this length. If not, nobody needs a digest."""
        rows = (ROW.unpack_from(self._map, at) for at in _places(length))
        return any(of == length and until for of, _, until, _, _ in rows)

    def find(self, key: RowKey, now: float) -> Row | None:
        if self._find(key, now) is None:
            return None
        with self._lock:
            return self._find(key, now)

    def write(self, key: RowKey, died: Died, now: float) -> Died:
        """Returns what the row says now. What it said before is not forgotten. What no row can hold
        is left out.
        """
        if len(key.digest) != DIGEST_BYTES or abs(key.length) > MAX_LENGTH:
            return died
        with self._lock:
            before = self._find(key, now)
            if before is not None:
                died = Died(max(died.deaths, before.died.deaths), died.begun or before.died.begun)
            died = died._replace(deaths=min(died.deaths, MAX_DEATHS))
            at = self._place_for(key, now)
            ROW.pack_into(self._map, at, *key, now + KEPT_S, *died)
            self._newest[0] = max(self._newest[0], now + KEPT_S)
        return died

    def erase(self, key: RowKey) -> None:
        with self._lock:
            at = self._at(key)
            if at is not None:
                self._map[at : at + ROW.size] = bytes(ROW.size)

    # ---- inside ----------------------------------------------------------------------------------

    def _find(self, key: RowKey, now: float) -> Row | None:
        at = self._at(key)
        if at is None:
            return None
        _, _, until, deaths, begun = ROW.unpack_from(self._map, at)
        return Row(at, Died(deaths, bool(begun)), until - KEPT_S) if until > now else None

    def _at(self, key: RowKey) -> int | None:
        for at in _places(key.length):
            of, digest, until, _, _ = ROW.unpack_from(self._map, at)
            if until and (of, digest) == key:
                return at
        return None

    def _place_for(self, key: RowKey, now: float) -> int:
        def worth(at: int) -> tuple[int, float]:
            _, _, until, deaths, _ = ROW.unpack_from(self._map, at)
            return (deaths if until > now else 0), until

        at = self._at(key)
        return min(_places(key.length), key=worth) if at is None else at


def _places(length: int) -> Iterator[int]:
    for n in range(PLACES):
        yield NEWEST.size + (length + n) % MAX_ROWS * ROW.size
