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
from contextvars import ContextVar

LATEST_S = 300.0
"""However many large values are made meanwhile."""

_of_request: ContextVar[list[contextlib.ExitStack]] = ContextVar("of_request")
"""What ends with the request. Empty once it has ended, for tasks that outlive it."""
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


@contextlib.contextmanager
def request() -> Iterator[None]:
    """All that is done for one request, to the end of whatever it has begun."""
    with contextlib.ExitStack() as values:
        open_values = [values]
        token = _of_request.set(open_values)
        try:
            yield
        finally:
            _of_request.reset(token)
            open_values.clear()


def keep_large_value() -> None:
    """The request's large value is in memory until the request ends: it is made, waits for the
    others of its answer, and is written.
    """
    for values in _of_request.get([]):
        values.enter_context(large_value())


async def collect_for_ever(every_s: float) -> None:
    last = time.monotonic()
    while True:
        await asyncio.sleep(every_s)
        if not _large_values or time.monotonic() - last >= LATEST_S:
            gc.collect()
            last = time.monotonic()
