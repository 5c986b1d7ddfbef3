"""Shell. What processes are, for tests that look for them while some end; what they may open."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager

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
