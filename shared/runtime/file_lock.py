"""Shell. Locks on open files, between processes of one machine. The kernel gives back those of a
process that dies.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time

LOCK_S = 0.02
"""A holder needs only microseconds, but it may have to wait for a core."""
RANGE_LOCK = struct.Struct("hhqqi4x")
"""The kernel's `struct flock`: kind of lock, whence, start, length (0: all), pid."""


class FileLock:
    """The lock of the open file `file`. One who enters waits for LOCK_S at most, and then goes on
    without it. While it is `kept`, to enter and leave it costs nothing.

    It is a class, because a context manager made from a generator would cost as much as the lock
    itself.
    """

    def __init__(self, file: int) -> None:
        self._file = file
        self._locked = False
        self.kept = False

    def __enter__(self) -> None:
        if not self.kept:
            self.take(LOCK_S)

    def __exit__(self, *_: object) -> None:
        if not self.kept:
            self.give_back()

    def take(self, within_s: float) -> bool:
        """Whether it was taken."""
        until = 0.0
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._locked = True
                return True
            except OSError:
                now = time.monotonic()
                until = until or now + within_s
                if now >= until:
                    return False
                os.sched_yield()

    def give_back(self) -> None:
        self.kept = False
        if self._locked:
            self._locked = False
            fcntl.flock(self._file, fcntl.LOCK_UN)
