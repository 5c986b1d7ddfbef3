"""Shell. What the media of all requests hold of the worker's memory together. Those for which there
is no room wait until earlier ones have left.
"""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeAlias

Resolved: TypeAlias = tuple[Any, Any]


class MediaBudget:
    """At most `most` is held at once. Who comes first gets it first."""

    def __init__(self, most: int) -> None:
        self._free = most
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, amount: int) -> None:
        """Waits for it. `amount` is at most what the budget has."""
        if not self._waiting and amount <= self._free:
            self._free -= amount
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((amount, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                with contextlib.suppress(ValueError):  # it may have been passed over already
                    self._waiting.remove((amount, turn))
                self._next()
            else:
                self.give_back(amount)  # it had its turn in the same moment
            raise

    def give_back(self, amount: int) -> None:
        self._free += amount
        self._next()

    def _next(self) -> None:
        while self._waiting and self._waiting[0][0] <= self._free:
            amount, turn = self._waiting.popleft()
            if not turn.done():
                self._free -= amount
                turn.set_result(None)


class HeldMedia:
    """What one request has taken, until the last of its media has been forgotten."""

    def __init__(self, budget: MediaBudget, amount: int) -> None:
        self._budget, self._amount = budget, amount
        self._loop = asyncio.get_running_loop()
        self._left = 0

    def until_forgotten(self, media: Sequence[object], amount: int) -> None:
        """`amount`: what they take after all, which may be less."""
        if amount < self._amount:
            self._budget.give_back(self._amount - amount)
            self._amount = amount
        self._left = len(media)
        if not media:
            self.give_back()
        for one in media:
            weakref.finalize(one, self._forgotten).atexit = False

    def _forgotten(self) -> None:
        """In any thread: media are forgotten where they are used last."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._one_less)

    def _one_less(self) -> None:
        self._left -= 1
        if not self._left:
            self.give_back()

    def give_back(self) -> None:
        self._budget.give_back(self._amount)


async def hold(
    budget: MediaBudget,
    amount: int,
    resolve: Callable[[], Awaitable[Resolved]],
    what_of: Callable[[Any], tuple[Sequence[object], int]],
) -> Resolved:
    """What `resolve` returns, vLLM's (media, names), once there is room for `amount`. `what_of` the
    media says which objects are held, and how much they take.
    """
    await budget.take(amount)
    held = HeldMedia(budget, amount)
    try:
        media, names = await resolve()
    except BaseException:
        held.give_back()
        raise
    held.until_forgotten(*what_of(media))
    return media, names
