"""Shell. A process that ends when its parent does, by the kernel's hand: no orphan serves on or
holds a GPU. Linux only; elsewhere a no-op.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(sig: signal.Signals, parent: int | None = None) -> None:
    """The kernel sends `sig` to this process when the thread that created it ends; at once if
    `parent` (default: today's) is gone already.
    """
    if sys.platform != "linux":
        return
    expected = os.getppid() if parent is None else parent
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(sig), 0, 0, 0)
    if os.getppid() != expected:  # it ended before the kernel was asked
        os.kill(os.getpid(), sig)
