"""Shell. A small state that outlives processes and is shared by the processes of one machine. It is
a msgspec struct in a JSON file that is replaced as a whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Generic, TypeAlias, TypeVar

import msgspec

from shared.errors import ConfigError

POLL_S = 0.5
"""Time between two looks at the file. A change of another process is seen at most this
much late.
"""
T = TypeVar("T", bound=msgspec.Struct)
Stamp: TypeAlias = tuple[int, int, int]


def stamp_of(file: str | Path) -> Stamp:
    """Differs once the file has changed; all zero for one that is not there."""
    try:
        s = os.stat(file)
    except OSError:
        return (0, 0, 0)
    return (s.st_ino, s.st_mtime_ns, s.st_size)


class StateFile(Generic[T]):
    """The state, of type `kind`. A missing file reads as `kind()`, so every field needs a
    default.
    """

    def __init__(self, path: Path, kind: type[T]) -> None:
        self.path = path
        self._kind = kind
        self._decoder = msgspec.json.Decoder(kind)

    def read(self) -> T:
        """The state now. Raises ConfigError if the file cannot be read; the file is left
        as it is.
        """
        try:
            return self._decoder.decode(self.path.read_bytes())
        except FileNotFoundError:
            return self._kind()
        except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
            raise ConfigError(f"{self.path}: {exc}; mend the file or remove it") from exc
        except OSError as exc:
            raise ConfigError(f"{self.path}: cannot be read: {exc.strerror or exc}") from exc

    def update(self, change: Callable[[T], T]) -> T:
        """Reads, changes and writes the state while no other process does. The file is written
        aside, synced and renamed, so a reader sees all of the change or nothing.

        Raises ConfigError like `read`, OSError if the folder cannot be written, and whatever
        `change` raises. Then nothing has changed.
        """
        with self._alone():
            changed = change(self.read())
            aside = self.path.with_name(f".{self.path.name}.new")
            with aside.open("wb") as f:
                f.write(msgspec.json.format(msgspec.json.encode(changed), indent=1) + b"\n")
                f.flush()
                os.fsync(f.fileno())
            aside.rename(self.path)
        return changed

    async def changes(self) -> AsyncIterator[T]:
        """Yields the state now, and again whenever somebody has replaced it. A file that cannot be
        read is skipped until it is repaired.
        """
        seen: object = None
        while True:
            stamp = stamp_of(self.path)
            if stamp != seen:
                with contextlib.suppress(ConfigError):
                    state = self.read()
                    seen = stamp
                    yield state
            await asyncio.sleep(POLL_S)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self.path.with_name(f".{self.path.name}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
