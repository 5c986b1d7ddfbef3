"""Shell. Work for a tenant in threads beside the event loop. Each tenant has one piece of work done
at a time, so one that asks for a thousand does not make the others wait for a thread.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar
from weakref import WeakValueDictionary

P = ParamSpec("P")
T = TypeVar("T")


class Turns:
    """The turns of all tenants. Who waits for one has an open connection, which bounds them."""

    def __init__(self) -> None:
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def run(self, tenant: str, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Calls in a thread when it is the tenant's turn. A thread goes on when its caller has
        left, so the turn lasts until the call has ended.
        """
        lock = self._locks.get(tenant)
        if lock is None:
            lock = self._locks[tenant] = asyncio.Lock()
        await lock.acquire()
        work = functools.partial(call, *args, **kwargs)
        job = asyncio.get_running_loop().run_in_executor(None, work)
        job.add_done_callback(functools.partial(_ended, lock))
        try:
            return await asyncio.shield(job)
        finally:
            # an exception of it knows this frame, which would know it: the body would stay in
            # memory until garbage is looked for
            del job


def _ended(lock: asyncio.Lock, job: asyncio.Future[T]) -> None:
    lock.release()
    if not job.cancelled():
        job.exception()  # for a caller that has left
