"""Shell. Runs a gateway or worker process whose event loop is measured, and can be held.

    python -m tests.loop_meter FILE gateway|worker ARGUMENTS

FILE gets the longest turn of the loop in milliseconds, whenever it grows. CPU time of the process
is counted, so neighbours on the machine do not matter, and another thread that keeps the
interpreter does. A timer looks every LOOK_S. What has been used between two looks is one long turn,
or several within that time. SIGWINCH starts
the measurement anew. SIGUSR2 holds the loop for as long as HOLD_ENV says, as a request would whose
work is done on it.
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
        self._begin()
        self._look()

    def _begin(self) -> None:
        self._longest_s, self._last = 0.0, time.process_time()
        self._write()

    def _look(self) -> None:
        now = time.process_time()
        if now - self._last > self._longest_s:
            self._longest_s = now - self._last
            self._write()
        self._last = time.process_time()
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
