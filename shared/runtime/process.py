"""Shell. What every process of ours does with the operating system: it ends with its parent, takes
signals, and keeps its files private.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

from shared.runtime.parent_death import die_with_parent

PARENT_ENV = "LORAPLEX_PARENT"
"""The pid of the process with which ours shall end. Set by the process that starts ours."""
LARGE_BLOCK_BYTES = 1 << 20
"""Larger than the blocks that requests usually need. Each such block costs the kernel's work for
its pages again.
"""
_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def follow_parent(sig: signal.Signals = signal.SIGTERM) -> None:
    """If our starter asked for it, the kernel sends us `sig` when the starter ends. Linux only."""
    wanted = os.environ.pop(PARENT_ENV, None)
    if wanted is not None:
        die_with_parent(sig, int(wanted))


def make_private(folder: Path) -> None:
    """Makes the folder. Other users of the machine can read neither it nor what this process makes
    from now on, because adapters may reveal what they were trained on. Raises OSError.
    """
    os.umask(0o077)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.stat().st_uid == os.getuid():
        folder.chmod(0o700)


def give_large_blocks_back() -> None:
    """Has the C library return each block of LARGE_BLOCK_BYTES or more to the kernel once it is
    freed. By default glibc keeps blocks of up to 32 MiB as soon as it has freed one of that size,
    and there is always something small behind them. A gateway that had passed on a few large bodies
    held 150 MB more for good. It does nothing where the C library is another one.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)


def on_stop_signals(stop: Callable[[str], None], hurry: Callable[[], None]) -> None:
    """The first SIGTERM or SIGINT calls `stop` on the running loop, with the signal's name. A
    further SIGINT calls `hurry`: somebody presses Ctrl-C again. A further SIGTERM says nothing new.
    A process group and a supervisor may both pass one on.
    """
    told = False

    def on_signal(sig: signal.Signals) -> None:
        nonlocal told
        if not told:
            told = True
            stop(sig.name)
        elif sig is signal.SIGINT:
            hurry()

    loop = asyncio.get_running_loop()
    for sig in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(sig, on_signal, sig)


def on_reload_signal(read_again: Callable[[], None]) -> None:
    """SIGHUP calls `read_again` on the running loop. A terminal that is closed sends it too: then
    it is SIGTERM as before, unless this process was told to ignore that (`nohup`).
    """
    outlives_it = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    had_terminal = _has_terminal() and not outlives_it
    on_terminal = [fd for fd in (0, 1, 2) if os.isatty(fd)]

    def hung_up() -> None:
        if had_terminal and not _has_terminal():
            nowhere = os.open(os.devnull, os.O_RDWR)
            for fd in on_terminal:  # what is still said would raise
                os.dup2(nowhere, fd)
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            read_again()

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, hung_up)


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


_DEVICE = re.compile(r"[0-9]+|(?:GPU|MIG)-[0-9A-Za-z/-]+")
"""How CUDA_VISIBLE_DEVICES names a GPU or a part of one: by number, or by the begin of its id."""


def visible_gpus() -> list[str]:
    """The NVIDIA devices that this process may use, named as in CUDA_VISIBLE_DEVICES. They come
    from that variable if it is set, else from the driver.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        # CUDA ignores every name from the first invalid one on. It shows no device at all where one
        # is named twice; here the second name is left out, so that no two workers share a GPU.
        end = next((n for n, name in enumerate(names) if not _DEVICE.fullmatch(name)), len(names))
        return list(dict.fromkeys(names[:end]))
    count = len(list(Path("/dev").glob("nvidia[0-9]*")))
    if not count and shutil.which("nvidia-smi") is not None:
        # containers may hide the device files
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
        count = sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    return [str(n) for n in range(count)]


def count_gpus() -> int:
    return len(visible_gpus())
