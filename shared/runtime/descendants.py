"""Shell. The processes below this one: which they are, when one ends, and how to end them. It works
on Linux only; elsewhere it finds none.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path


def descendants(pid: int | None = None) -> list[int]:
    """All processes below `pid` (default: this one), parents first. Threads do not count."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            # the state and the parent come after the name, which may contain anything
            parent = int(entry.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.parent.name))
    found, below = [], children.get(os.getpid() if pid is None else pid, [])
    while below:
        found += below
        below = [child for parent in below for child in children.get(parent, [])]
    return found


def command_line(pid: int) -> str:
    try:
        return (
            Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        )
    except OSError:
        return ""


def is_stopped(pid: int) -> bool:
    """Whether a signal has stopped the process. It goes on with SIGCONT alone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] == "T"


def on_exit(pid: int, callback: Callable[[], None]) -> Callable[[], None]:
    """Calls `callback` on the running loop as soon as the process has ended, whoever its parent is.
    Returns a function that cancels it.
    """
    loop = asyncio.get_running_loop()
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        loop.call_soon(callback)
        return lambda: None
    except (OSError, AttributeError):  # this kernel or system has no such descriptors
        return lambda: None

    def close() -> None:
        nonlocal fd
        if fd >= 0:
            loop.remove_reader(fd)
            os.close(fd)
            fd = -1

    def ended() -> None:
        close()
        callback()

    loop.add_reader(fd, ended)
    return close


def kill_all(pids: Iterable[int]) -> None:
    """Sends SIGKILL, which ends even a stopped process."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def out_of_memory_kills() -> int:
    """How many processes of our control group the kernel has killed because memory ran out. Where
    the group does not say, those of the whole machine; 0 if the kernel does not say either.
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        group = Path("/proc/self/cgroup").read_text().rpartition("::")[2].strip()
        return _oom_kills(Path(f"/sys/fs/cgroup{group}/memory.events"))
    with contextlib.suppress(OSError, ValueError, IndexError):
        return _oom_kills(Path("/proc/vmstat"))
    return 0


def _oom_kills(counters: Path) -> int:
    words = counters.read_text().split()
    return int(words[words.index("oom_kill") + 1])
