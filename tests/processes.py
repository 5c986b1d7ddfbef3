"""Shell. What processes are, for tests that look for them while some end."""

from __future__ import annotations

import psutil


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
