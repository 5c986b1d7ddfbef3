"""Shell. A table in a file that all gateway processes of a machine have in memory: what is left of
each account's limits, exact whichever process a request comes to.

A change is made under a lock that the kernel gives back when its holder dies. A holder that stands
still is waited for LOCK_S and then passed by: one lost count is better than a gateway that stands
still as well.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import time
from hashlib import sha256
from pathlib import Path

MAX_PROCESSES = 64
LEVELS = 3  # of requests, tokens and new adapters
ROW = 2 + LEVELS + MAX_PROCESSES
"""Numbers of an account: its hash, the time of its levels, the levels, and how many of its requests
each process has open.
"""
HASH, AT, FIRST_LEVEL, FIRST_OPEN = 0, 1, 2, 2 + LEVELS
MAX_ROWS = 8192
PAIRS, PAIR = 65_536, 2  # (account, adapter): its hash, and when it was used last
PROBES = 16
LOCK_S = 0.02
"""A holder needs some microseconds, but may have to wait for a core."""
_HASH_BITS = 52  # a float holds such numbers exactly


class TableLock:
    """See the module. Written out, for a context manager made of a generator costs as much again as
    the lock.
    """

    def __init__(self, file: int) -> None:
        self._file = file
        self._locked = False

    def __enter__(self) -> None:
        until = 0.0
        while True:
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._locked = True
                return
            except OSError:
                now = time.monotonic()
                until = until or now + LOCK_S
                if now >= until:
                    return
                os.sched_yield()

    def __exit__(self, *_: object) -> None:
        if self._locked:
            self._locked = False
            fcntl.lockf(self._file, fcntl.LOCK_UN)


class SharedTable:
    """Of process `index`. Its open requests of an earlier life are forgotten."""

    def __init__(self, path: Path, index: int) -> None:
        self.own = FIRST_OPEN + index % MAX_PROCESSES
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        size = 8 * (ROW * MAX_ROWS + PAIR * PAIRS)
        if os.fstat(self._file).st_size != size:
            os.ftruncate(self._file, size)  # it holds no disk space before it is written
        self._map = mmap.mmap(self._file, size)
        self.cells = memoryview(self._map).cast("d")
        self._rows: dict[str, int] = {}
        self.alone = TableLock(self._file)
        """A context in which no other process changes anything."""
        with self.alone:
            for row in range(0, ROW * MAX_ROWS, ROW):
                if self.cells[row]:
                    self.cells[row + self.own] = 0.0

    def close(self) -> None:
        self.cells.release()
        self._map.close()
        os.close(self._file)

    def row(self, account: str) -> tuple[int, bool]:
        """(where its numbers begin, whether they are new). While alone. With too many accounts some
        share a row.
        """
        known = self._rows.get(account)
        if known is not None:
            return known, False
        wanted = _hash(account)
        first = int(wanted) % MAX_ROWS
        at = first * ROW
        for n in range(PROBES):
            at = (first + n) % MAX_ROWS * ROW
            if self.cells[at] in (0.0, wanted):
                break
        new = self.cells[at] == 0.0
        self.cells[at] = wanted
        if len(self._rows) >= MAX_ROWS:
            self._rows.clear()
        self._rows[account] = at
        return at, new

    def open_requests(self, row: int) -> float:
        """Of all processes."""
        return sum(self.cells[row + FIRST_OPEN : row + FIRST_OPEN + MAX_PROCESSES])

    def last_use(self, account: str, adapter: str) -> tuple[int, float]:
        """(where it is kept, when the account used the adapter last; minus infinity: not in living
        memory). To be passed to `use`.
        """
        wanted = _hash(f"{account}\n{adapter}")
        oldest = -1
        for n in range(PROBES):
            at = ROW * MAX_ROWS + (int(wanted) + n) % PAIRS * PAIR
            if self.cells[at] == wanted:
                return at, self.cells[at + 1]
            if oldest < 0 or self.cells[at + 1] < self.cells[oldest + 1]:
                oldest = at
        return oldest, -math.inf

    def use(self, at: int, account: str, adapter: str, now: float) -> None:
        self.cells[at], self.cells[at + 1] = _hash(f"{account}\n{adapter}"), now


def _hash(text: str) -> float:
    digest = sha256(text.encode("utf-8", "surrogateescape")).digest()
    return float(int.from_bytes(digest[:8]) % (1 << _HASH_BITS) or 1)
