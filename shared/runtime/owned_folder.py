"""Shell. Folders and locks that belong to one process. The kernel drops a lock when its process
ends. So a folder without a lock is what a killed process left behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from shared.errors import ConfigError
from shared.runtime.shared_memory import SUFFIX, remove_segments

PREFIX = "loraplex-"
_OWNER = "owner.lock"
MAX_SOCKET_PATH = 107
"""Bytes that Linux allows for the path of a socket."""
MAX_PID_DIGITS = 16
MAX_RUN_DIR = MAX_SOCKET_PATH - len("/supervisor.sock")
"""The longest path of a folder with the sockets of gateways and supervisor, in bytes."""
MAX_BASE = MAX_RUN_DIR - len(f"/{PREFIX}12345678")
"""The longest path of a folder in which a temporary folder with such sockets is made."""


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder in the system's temporary folder, which is removed at the end. Folders of processes
    that were killed before they could remove theirs are removed first.
    """
    sweep()
    # made under another name until it is locked, so that nobody takes it for one without an owner
    made = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=_base()))
    with (made / _OWNER).open("w") as owner:
        fcntl.flock(owner, fcntl.LOCK_EX)
        owner.write(f"{os.getpid()}\n")
        owner.flush()
        folder = made.rename(made.with_name(made.name[1:]))
        try:
            yield folder
        finally:
            _remove(folder)


def _base() -> Path:
    """The system's temporary folder, or /tmp where its name is too long for sockets in it."""
    found = Path(tempfile.gettempdir())
    return found if len(os.fsencode(found)) <= MAX_BASE else Path("/tmp")


def sweep() -> None:
    """Removes the folders of dead owners. Folders of other users, and those without a lock file,
    stay.
    """
    with contextlib.suppress(OSError):
        for owner in _base().glob(f"{PREFIX}*/{_OWNER}"):
            with contextlib.suppress(OSError), owner.open("r+") as held:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(owner.parent)


def _remove(folder: Path) -> None:
    """The folder, and the shared memory that its owner's processes may have left."""
    for place in folder.glob(f"*{SUFFIX}"):
        remove_segments(place)
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[int | None]:
    """Holds the lock of this file while inside, at most for as long as this process lives. Yields
    None, or the pid of the live process that holds it already (0: unknown). Raises ConfigError if
    the file cannot be opened.
    """
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise ConfigError(f"{path} cannot be opened: {exc.strerror}") from exc
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(lock, MAX_PID_DIGITS).strip()
            yield int(owner) if owner.isdigit() else 0
            return
        with contextlib.suppress(OSError):  # on a full disk nobody learns who holds it
            os.ftruncate(lock, 0)
            os.write(lock, b"%d\n" % os.getpid())
        yield None
    finally:
        os.close(lock)
