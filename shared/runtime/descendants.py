"""Shell. The processes below this one: which they are, when one ends, and their end. Linux only;
elsewhere there are none.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path


def descendants(pid: int | None = None) -> list[int]:
    """All processes below `pid` (default: this one), parents first. Threads are none."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            # after the name, which may hold anything: state, parent
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


def on_exit(pid: int, callback: Callable[[], None]) -> Callable[[], None]:
    """Calls back on the running loop as soon as the process has ended, whoever its parent is.
    Returns what takes the request back.
    """
    loop = asyncio.get_running_loop()
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        loop.call_soon(callback)
        return lambda: None
    except (OSError, AttributeError):  # a kernel or a system without them
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
    """SIGKILL, which a stopped process obeys too."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def out_of_memory_kills() -> int:
    """How many processes of our control group the kernel has killed for want of memory; 0 where it
    does not say.
    """
    try:
        group = Path("/proc/self/cgroup").read_text().rpartition("::")[2].strip()
        lines = Path(f"/sys/fs/cgroup{group}/memory.events").read_text().split()
        return int(lines[lines.index("oom_kill") + 1])
    except (OSError, ValueError, IndexError):
        return 0
