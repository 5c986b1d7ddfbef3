"""Shell. Folders and locks that belong to one process: what a process that was killed left behind
is told from what a live one uses by a lock that the kernel drops with its owner.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

PREFIX = "loraplex-"
_OWNER = "owner.lock"


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder of our own in the system's temporary folder; gone when we leave it. Folders of
    processes that were killed before they could do the same are removed first.
    """
    sweep()
    # under another name until it is locked, so that nobody takes it for one without an owner
    made = Path(tempfile.mkdtemp(prefix=f".{PREFIX}"))
    with (made / _OWNER).open("w") as owner:
        fcntl.flock(owner, fcntl.LOCK_EX)
        owner.write(f"{os.getpid()}\n")
        owner.flush()
        folder = made.rename(made.with_name(made.name[1:]))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def sweep() -> None:
    """Removes what dead owners left. Folders of other users, and those without a lock, stay."""
    with contextlib.suppress(OSError):
        for owner in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{_OWNER}"):
            with contextlib.suppress(OSError), owner.open("r+") as held:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(owner.parent, ignore_errors=True)


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[int | None]:
    """Holds the lock of this file until it is left, or for as long as this process lives. Yields
    None, or the pid of the live process that has it already (0: unknown).
    """
    with path.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read().strip()
            yield int(owner) if owner.isdigit() else 0
            return
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield None
