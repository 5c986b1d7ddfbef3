"""Shell. What every process of ours does with the operating system: die with its parent, take
signals, read the settings it was given.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

from shared.runtime.parent_death import die_with_parent

PARENT_ENV = "LORAPLEX_PARENT"
"""Set by a process that starts ours: the pid whose end shall be ours too."""


def follow_parent(sig: signal.Signals = signal.SIGTERM) -> None:
    """If our starter asked for it, the kernel sends us `sig` when it ends. Linux only."""
    wanted = os.environ.pop(PARENT_ENV, None)
    if wanted is not None:
        die_with_parent(sig, int(wanted))


def make_private(folder: Path) -> None:
    """The folder is there, and neither it nor what this process makes from now on is readable by
    other users of the machine: adapters may hold what they were trained on. Raises OSError.
    """
    os.umask(0o077)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.stat().st_uid == os.getuid():
        folder.chmod(0o700)


def on_stop_signals(stop: Callable[[str], None]) -> None:
    """SIGTERM and SIGINT call `stop` on the running loop, with the signal's name."""
    loop = asyncio.get_running_loop()
    for sig in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(sig, stop, sig.name)


def visible_gpus() -> list[str]:
    """NVIDIA devices that this process may use, as CUDA_VISIBLE_DEVICES names them: those of that
    variable, else all that the driver shows.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        # CUDA ignores all from the first that is none on
        end = next((n for n, name in enumerate(names) if name in ("", "-1")), len(names))
        return names[:end]
    count = len(list(Path("/dev").glob("nvidia[0-9]*")))
    if not count and shutil.which("nvidia-smi") is not None:
        # containers may hide the device files
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
        count = sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    return [str(n) for n in range(count)]


def count_gpus() -> int:
    return len(visible_gpus())
