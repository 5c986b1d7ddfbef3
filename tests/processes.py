"""Shell. What processes are, for tests that look for them and kill them while some end; what they
may open.
"""

from __future__ import annotations

import asyncio
import os
import resource
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

import psutil


@contextmanager
def no_descriptors_left() -> Iterator[None]:
    """Inside, this process can open nothing more."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open(os.devnull, os.O_RDONLY)  # the lowest that is free
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def family_of(pid: int) -> list[psutil.Process]:
    """Its children, their children and so on. Empty: it has ended meanwhile."""
    try:
        found: list[psutil.Process] = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return found


def lives(process: psutil.Process) -> bool:
    """A zombie has ended; whoever adopted it has not noticed yet."""
    with suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


async def still_alive(family: Iterable[psutil.Process], within_s: float) -> list[psutil.Process]:
    """Those that have not ended by then."""
    _, alive = await asyncio.to_thread(psutil.wait_procs, list(family), within_s)
    return [process for process in alive if lives(process)]


def kill(process: psutil.Process | asyncio.subprocess.Process) -> None:
    """Nothing if it has ended meanwhile."""
    with suppress(psutil.NoSuchProcess, ProcessLookupError):
        process.kill()


async def kill_with_family(process: asyncio.subprocess.Process) -> None:
    """Ends it and whatever it started; some of them may end meanwhile, or have ended."""
    if process.returncode is None:
        for member in family_of(process.pid):
            kill(member)
        kill(process)
    await process.wait()


def command_line(process: psutil.Process) -> list[str]:
    """Its arguments. Empty: it has ended meanwhile."""
    try:
        found: list[str] = process.cmdline()
    except psutil.NoSuchProcess:  # a zombie is one of them
        return []
    return found


def called(process: psutil.Process) -> str:
    """Its name and its arguments: vLLM's processes rename themselves. Empty: it has ended
    meanwhile.
    """
    try:
        return str(process.name()) + " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""
