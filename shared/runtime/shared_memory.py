"""Shell. Named shared memory that killed processes leave behind. The kernel keeps it until somebody
removes its name. vLLM makes some for its ranks, up to some hundred megabytes.

So the names are written down while the processes live, and removed after their end. Linux only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

SEGMENTS = Path("/dev/shm")
SUFFIX = ".shm"
"""Ending of a file with such names, one per line."""


def note_segments(place: Path, pids: Iterable[int]) -> None:
    """Adds to the file `place` the names of the segments that these processes have mapped."""
    found = {name for pid in pids for name in _mapped(pid)}
    if found:
        place.write_text("\n".join(sorted(found | set(_noted(place)))))


def remove_segments(place: Path) -> None:
    """Removes what `place` names, and `place`. The processes must have ended."""
    for name in _noted(place):
        with contextlib.suppress(OSError):
            (SEGMENTS / name).unlink()
    with contextlib.suppress(OSError):
        place.unlink()


def _noted(place: Path) -> list[str]:
    try:
        return [name for name in place.read_text().split("\n") if name and "/" not in name]
    except OSError:
        return []


def _mapped(pid: int) -> Iterable[str]:
    """The names that a process has mapped. In a line of /proc/PID/maps the file's name comes last
    and may hold spaces.
    """
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            _, found, name = line.partition(f" {SEGMENTS}/")
            if found and "/" not in name:
                yield name.removesuffix(" (deleted)")
