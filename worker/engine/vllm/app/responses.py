"""Shell. Answers that clients may ask for again (`/v1/responses`): vLLM keeps them for ever, here
they are few and for a while.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import msgspec

MAX_KEPT = 1024
KEPT_S = 3600.0
MAX_KEPT_BYTES = 64 << 20
"""Of each table, by the length of what a value prints as."""


class ExpiringTable(OrderedDict[str, Any]):
    """A dict of bounded number, age and size: what was put in first goes first."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._put: dict[str, tuple[float, int]] = {}
        self._bytes = 0

    def __setitem__(self, key: str, value: Any) -> None:
        self._forget(key)
        size = len(repr(value))
        super().__setitem__(key, value)
        self.move_to_end(key)
        self._put[key] = (self._clock(), size)
        self._bytes += size
        while self and (len(self) > MAX_KEPT or self._bytes > MAX_KEPT_BYTES or self._late()):
            del self[next(iter(self))]

    def __delitem__(self, key: str) -> None:
        super().__delitem__(key)
        self._forget(key)

    def __getitem__(self, key: str) -> Any:
        while self and self._late():
            del self[next(iter(self))]
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        try:
            return self[key]
        except KeyError:
            return default

    def _late(self) -> bool:
        return self._put[next(iter(self))][0] + KEPT_S < self._clock()

    def _forget(self, key: str) -> None:
        found = self._put.pop(key, None)
        if found is not None:
            self._bytes -= found[1]


class KeptResponses:
    """vLLM's serving object of responses, with bounded tables in the place of its own."""

    def __init__(self, serving: Any) -> None:
        self._serving = serving
        serving.enable_store = True
        serving.response_store = ExpiringTable()
        serving.msg_store = ExpiringTable()
        serving.event_store = ExpiringTable()

    async def finished(self, answer_id: str) -> None:
        """Once nothing more is generated for an answer that goes on in the background."""
        task = self._serving.background_tasks.get(answer_id)
        if task is not None:
            await asyncio.wait([task])

    def cancel(self, answer_id: str) -> None:
        task = self._serving.background_tasks.get(answer_id)
        if task is not None:
            task.cancel()


def with_id(body: bytes, answer_id: str) -> bytes:
    """The request with the id that its answer gets, whatever its client has written there."""
    try:
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return body  # vLLM says what is wrong with it
    return msgspec.json.encode({**fields, "request_id": answer_id})
