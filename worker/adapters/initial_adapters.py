"""Shell. What a new worker loads before it serves: each gateway names the adapters, and the worker
waits for them in bounded time.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable

from shared.adapters.identity import AdapterRef
from worker.session import GatewaySession

ANSWER_S = 1.0
"""How long the worker waits until each gateway has answered. A gateway that is down never answers.
One that is heard does, however busy it is.
"""


class InitialAdapters:
    """The time between the engine's start and the first request. `active`: that time has
    not ended.
    """

    def __init__(self, slots: int, *, active: bool = True) -> None:
        self.active = active
        self.adapters: dict[AdapterRef, None] = {}
        self._slots = slots
        self._answered: set[GatewaySession] = set()
        self._open: set[int] = set()
        self._news = asyncio.Event()

    def receive(self, session: GatewaySession, adapters: Iterable[AdapterRef]) -> list[AdapterRef]:
        """Takes a gateway's answer. Returns the adapters to load, never more than there
        are slots.
        """
        self._answered.add(session)
        self._news.set()
        new = [a for a in dict.fromkeys(adapters) if a not in self.adapters]
        new = new[: self._slots - len(self.adapters)]
        self.adapters |= dict.fromkeys(new)
        return new

    def begun(self, number: int) -> None:
        """A load has begun."""
        self._open.add(number)

    def settled(self, number: int) -> None:
        """A load has ended, well or not."""
        self._open.discard(number)
        self._news.set()

    async def wait(self, sessions: Callable[[], Iterable[GatewaySession]], most_s: float) -> float:
        """Waits until every gateway has answered and every load has ended, for at most `most_s`.
        For gateways that are silent, ANSWER_S is enough. Returns the seconds that it took.
        """
        begin = time.monotonic()

        def settled() -> bool:
            heard = (session for session in sessions() if not session.silent)
            return not self._open and self._answered.issuperset(heard)

        await self._until(lambda: self._answered.issuperset(sessions()), min(ANSWER_S, most_s))
        await self._until(settled, begin + most_s - time.monotonic())
        return time.monotonic() - begin

    async def _until(self, holds: Callable[[], bool], most_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(most_s):
                while not holds():
                    self._news.clear()
                    with contextlib.suppress(TimeoutError):  # a gateway may fall silent meanwhile
                        await asyncio.wait_for(self._news.wait(), ANSWER_S)
