"""Shell. What is left of each account's limits, in a file that all gateway processes of a machine
map into memory. So a limit holds exactly, whichever process a request reaches.

Every change is made under a file lock. A process that alone uses the table keeps the lock, and so
takes it once, not with every request. It gives the lock back soon after another one has come: both
hold a place in a second file, by which they know of each other.

If the lock's holder stands still, the others wait for LOCK_S and then go on without it. One lost
count is better than a gateway that stands still as well.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import struct
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

from shared.errors import ConfigError
from shared.runtime.file_lock import RANGE_LOCK, FileLock

MAX_PROCESSES = 64
FIRST_OPEN = 6
ROW = FIRST_OPEN + MAX_PROCESSES
"""The numbers of one account: its hash, its balance, and for each process the number of open
requests.
"""
BALANCE = struct.Struct("5d")
"""When it was written; in how many seconds from then the buckets of requests, tokens and new
adapters are full; open requests of all processes. Read and written as one, which costs a tenth of
five numbers.
"""
NEW_BALANCE = (0.0, 0.0, 0.0, 0.0, 0.0)
"""All buckets are full: so a limit that is set later begins."""
NUMBER_BYTES = 8
MAX_ROWS = 8192
PAIRS, PAIR = 65_536, 2  # (account, adapter): its hash, and when it was used last
ROW_PROBES, PROBES = 256, 16
"""Places that are tried for an account and for a pair. Two of 5,000 accounts would meet in 16, and
none does in 256.
"""
HANDOVER_S = 1.0
"""How long a process that comes waits for one that keeps the lock, and looks for others ten times a
second. Its loop may be busy.
"""
_HASH_BITS = 52  # a float holds such numbers exactly


class SharedLimits:
    """The table as process `index` uses it. Open requests that this process had before a restart
    are forgotten. A table from before the machine's last start is forgotten as a whole: its times
    are those of another clock, by which a limit that was used up would not fill for days.

    Raises ConfigError if the file cannot be made.
    """

    def __init__(
        self,
        path: Path,
        index: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.own = FIRST_OPEN + index % MAX_PROCESSES
        size = NUMBER_BYTES * (ROW * MAX_ROWS + PAIR * PAIRS)
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            if os.fstat(self._file).st_size > size:
                os.ftruncate(self._file, size)
            # All its disk space is taken now. The kernel kills a process (SIGBUS) that writes to a
            # part of a mapped file for which a full disk has no room.
            os.posix_fallocate(self._file, 0, size)
            users = path.with_name(f"{path.name}.users")
            self._users = os.open(users, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise ConfigError(f"{path} cannot be made: {exc.strerror}") from exc
        self.map = mmap.mmap(self._file, size)
        self.cells = memoryview(self.map).cast("d")
        self.alone = FileLock(self._file)
        """A context in which no other process changes anything."""
        fcntl.fcntl(self._users, fcntl.F_OFD_SETLK, RANGE_LOCK.pack(fcntl.F_RDLCK, 0, 0, 0, 0))
        self.alone.take(HANDOVER_S)
        try:
            self._forget_earlier_life(clock())
        finally:
            self.alone.give_back()

    def close(self) -> None:
        self.cells.release()
        self.map.close()
        os.close(self._file)
        os.close(self._users)

    def keep_if_unshared(self) -> bool:
        """Keeps the lock if no other process uses the table, and gives it back if one does. Returns
        whether that has changed: what is known of the table is then of a time before.
        """
        query = RANGE_LOCK.pack(fcntl.F_WRLCK, 0, 0, 0, 0)
        others = RANGE_LOCK.unpack(fcntl.fcntl(self._users, fcntl.F_OFD_GETLK, query))[0]
        shared, lock = others != fcntl.F_UNLCK, self.alone
        if lock.kept is not shared:
            return False
        if shared:
            lock.give_back()
        else:
            lock.kept = lock.take(0.0)
        return lock.kept is not shared

    def _forget_earlier_life(self, now: float) -> None:
        rows = [row for row in range(0, ROW * MAX_ROWS, ROW) if self.cells[row]]
        if any(self.cells[row + 1] > now for row in rows):
            self.map[:] = bytes(len(self.map))
            rows = []
        for row in rows:
            self.cells[row + self.own] = 0.0
            each = self.cells[row + FIRST_OPEN : row + ROW]
            self.cells[row + FIRST_OPEN - 1] = sum(each)

    def row(self, account: str) -> int:
        """Where the account's numbers begin. The lock must be held. No two accounts share a row.
        An
        account that is gone keeps its row until others need it.
        """
        wanted = _hash(account)
        first = int(wanted) % MAX_ROWS
        near = [(first + n) % MAX_ROWS * ROW for n in range(ROW_PROBES)]
        for row in near:
            if self.cells[row] == wanted:
                return row
            if self.cells[row] == 0.0:
                break
        else:
            row = min(near, key=lambda at: self.cells[at + 1])
            self.map[NUMBER_BYTES * row : NUMBER_BYTES * (row + ROW)] = bytes(NUMBER_BYTES * ROW)
        BALANCE.pack_into(self.map, balance_of(row), *NEW_BALANCE)
        self.cells[row] = wanted
        return row

    def last_use(self, account: str, adapter: str) -> tuple[int, float]:
        """(the place of the pair, when the account last used the adapter). The time is minus
        infinity if it is not known. Pass the place to `use`.
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


def balance_of(row: int) -> int:
    """Where in the map it is."""
    return NUMBER_BYTES * (row + 1)


def _hash(text: str) -> float:
    digest = sha256(text.encode("utf-8", "surrogateescape")).digest()
    return float(int.from_bytes(digest[:8]) % (1 << _HASH_BITS) or 1)
