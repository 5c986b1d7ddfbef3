"""Shell. The kernel ends a process when its parent ends, so no orphan goes on serving or holds a
GPU. It works on Linux only; elsewhere it does nothing.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(sig: signal.Signals, parent: int | None = None) -> None:
    """The kernel sends `sig` to this process when the thread that created it ends. The signal comes
    at once if `parent` (default: the present one) has ended already.
    """
    if sys.platform != "linux":
        return
    expected = os.getppid() if parent is None else parent
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(sig), 0, 0, 0)
    if os.getppid() != expected:  # the parent ended before the kernel was asked to watch it
        os.kill(os.getpid(), sig)
