"""Shell. A small state that outlives processes and is shared by those of one machine: a msgspec
struct in a JSON file, replaced as a whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from shared.errors import ConfigError

POLL_S = 0.5
"""How late another process's change is seen at most, besides the read itself."""
T = TypeVar("T", bound=msgspec.Struct)


class StateFile(Generic[T]):
    """Of type `kind`; a file that is not there reads as `kind()`, so every field needs a
    default.
    """

    def __init__(self, path: Path, kind: type[T]) -> None:
        self.path = path
        self._kind = kind
        self._decoder = msgspec.json.Decoder(kind)

    def read(self) -> T:
        """Raises ConfigError if somebody wrote what cannot be read; nothing is lost by it."""
        try:
            return self._decoder.decode(self.path.read_bytes())
        except FileNotFoundError:
            return self._kind()
        except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
            raise ConfigError(f"{self.path}: {exc}; mend the file or remove it") from exc

    def update(self, change: Callable[[T], T]) -> T:
        """Reads, changes and writes while no other process does. Written aside, synced and renamed:
        a reader sees all or nothing.

        Raises: ConfigError as `read`; OSError if the folder cannot be written; whatever `change`
        raises, with nothing changed.
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
        """The state now, and again whenever anybody has replaced it. A file that cannot be read is
        passed over until it is mended.
        """
        seen: object = None
        while True:
            stamp = self._stamp()
            if stamp != seen:
                seen = stamp
                with contextlib.suppress(ConfigError):
                    yield self.read()
            await asyncio.sleep(POLL_S)

    def _stamp(self) -> tuple[int, int, int]:
        try:
            s = self.path.stat()
        except OSError:
            return (0, 0, 0)
        return (s.st_ino, s.st_mtime_ns, s.st_size)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self.path.with_name(f".{self.path.name}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
