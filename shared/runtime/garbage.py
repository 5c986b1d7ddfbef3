"""Shell. When a process looks for garbage that only cycles hold.

Python does that when enough objects have been made, in the midst of whatever runs, and looks at all
objects that have lived for a while. A million of them hold the event loop for 0.3 s. So old objects
are looked at now and then instead, and not while a large value has millions of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time
from collections.abc import Iterator

LATEST_S = 300.0
"""However many large values are made meanwhile."""

_lock = threading.Lock()
_large_values = 0


def freeze(*thresholds: int) -> None:
    """What exists now is for good, and is never looked at again: modules, above all. Other objects
    are looked at by `gc.set_threshold`'s `thresholds`.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*thresholds)


@contextlib.contextmanager
def large_value() -> Iterator[None]:
    """While one is made, in any thread, old objects are not looked at."""
    global _large_values  # one collector has the whole process
    with _lock:
        _large_values += 1
    try:
        yield
    finally:
        with _lock:
            _large_values -= 1


async def collect_for_ever(every_s: float) -> None:
    last = time.monotonic()
    while True:
        await asyncio.sleep(every_s)
        if not _large_values or time.monotonic() - last >= LATEST_S:
            gc.collect()
            last = time.monotonic()
