"""Shell. Runs a gateway or worker process whose event loop is measured, and can be held.

    python -m tests.loop_meter FILE gateway|worker ARGUMENTS

FILE gets the longest turn of the loop in milliseconds, whenever it grows. A timer looks every
LOOK_S. What has passed between two looks is one long turn, or several within that time.

Neighbours on the machine do not matter, and another thread that keeps the interpreter does. So two
things are measured, and the less counts: the CPU time of the process, and the time that has passed
without that in which the loop's thread was ready and had no core. The first alone would count
threads that work beside the loop while it waits for a core; the second alone, a thread that keeps
the interpreter and waits for a core itself.

SIGWINCH starts the measurement anew. SIGUSR2 holds the loop for as long as HOLD_ENV says, as a
request would whose work is done on it.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import signal
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import uvloop

LOOK_S = 0.001
HOLD_ENV = "LORAPLEX_TEST_HOLD_S"


class LoopMeter:
    def __init__(self, file: Path) -> None:
        self._file, self._loop = file, asyncio.get_running_loop()
        self._loop.add_signal_handler(signal.SIGWINCH, self._begin)
        hold_s = float(os.environ.get(HOLD_ENV, "0"))
        self._loop.add_signal_handler(signal.SIGUSR2, time.sleep, hold_s)
        # Linux: nanoseconds that this thread has run, and waited for a core
        self._schedule = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
        self._begin()
        self._look()

    def _begin(self) -> None:
        self._longest_s, self._last = 0.0, self._times()
        self._write()

    def _times(self) -> tuple[float, float]:
        """Seconds that the process has used, and that have passed without waits for a core."""
        waited_ns = int(os.pread(self._schedule, 100, 0).split()[1])
        return time.process_time(), time.monotonic() - waited_ns / 1e9

    def _look(self) -> None:
        now = self._times()
        turn_s = min(after - before for after, before in zip(now, self._last, strict=True))
        if turn_s > self._longest_s:
            self._longest_s = turn_s
            self._write()
        self._last = self._times()
        self._loop.call_later(LOOK_S, self._look)

    def _write(self) -> None:
        unread = self._file.with_suffix(".new")
        unread.write_text(f"{self._longest_s * 1e3:.1f}")
        unread.rename(self._file)


def main(argv: list[str]) -> None:
    file, package, *rest = argv
    run = uvloop.run

    async def measured(coroutine: Coroutine[Any, Any, Any]) -> Any:
        LoopMeter(Path(file))
        return await coroutine

    uvloop.run = lambda coroutine: run(measured(coroutine))  # type: ignore[assignment]
    sys.exit(importlib.import_module(f"{package}.__main__").main(rest))


if __name__ == "__main__":
    main(sys.argv[1:])
