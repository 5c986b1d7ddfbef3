"""Shell. Keeps one process alive: starts it, and starts it again whenever it ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Awaitable, Callable
from random import Random

from gateway.supervisor.health import ProcessHealth
from gateway.supervisor.liveness import Liveness
from gateway.supervisor.restarts import End, RestartHistory, describe_end
from shared.errors import LoraplexError
from shared.runtime import children
from shared.runtime.children import Child

log = logging.getLogger("loraplex.serve")
clock = time.monotonic

SIGNALS = {int(s): s.name for s in signal.Signals}
CANNOT_FORK = 70
"""Stands for the exit status of a process that could not even be started."""


class Keeper:
    """One process, life after life. `model` is that of a worker. `on_end` hears of each end
    that nobody wished for, with the health of that life (None: it could not be started).
    """

    def __init__(
        self,
        name: str,
        start: Callable[[], Awaitable[Child]],
        liveness: Liveness,
        on_end: Callable[[Keeper, ProcessHealth | None], None],
        rng: Random,
        model: str | None = None,
    ) -> None:
        self.name, self.model = name, model
        self.child: Child | None = None
        self.health: ProcessHealth | None = None
        self.reason = ""
        self.history = RestartHistory()
        self._start, self._liveness, self._on_end, self._rng = start, liveness, on_end, rng
        self._stopping = asyncio.Event()
        self._down = asyncio.Event()  # no child, and none to come

    @property
    def healthy(self) -> bool:
        return self.health is not None and self.health.healthy_since is not None

    async def run(self, child: Child | None = None) -> None:
        """Until `stop`. `child`: its first life, if it has begun already."""
        try:
            while not self._stopping.is_set():
                end, health = await self._live(child)
                if self._stopping.is_set():
                    return
                child, wait_s = None, self._after(end)
                self._on_end(self, health)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await self._stopping.wait()
        finally:
            self._down.set()

    def kill(self, reason: str) -> None:
        """The whole process group, at once; a new life follows."""
        if self.health is not None and self.child is not None:
            self.health.reason = reason
            children.kill_group(self.child)

    async def stop(self, grace_s: float, kill_s: float) -> None:
        """SIGTERM, SIGKILL after `grace_s`. No new life follows."""
        self._stopping.set()
        if self.child is not None:
            with contextlib.suppress(TimeoutError):
                await children.end(self.child, grace_s, kill_s)
        await self._down.wait()

    async def _live(self, child: Child | None) -> tuple[End, ProcessHealth | None]:
        """One life, from its start to its end."""
        try:
            self.child = child or await self._start()
        except LoraplexError as exc:
            self.reason = exc.message
            return End(CANNOT_FORK, 0.0), None
        health = self.health = self._liveness.started(self.name, self.child.pid)
        if self._stopping.is_set():  # while it was being started
            children.send_signal(self.child, signal.SIGTERM)
        status = await self.child.wait()
        # an engine that outlived its worker would keep its GPU
        children.kill_group(self.child)
        self.child = self.health = None
        self._liveness.ended(self.name)
        self.reason = health.reason or describe_end(status, SIGNALS)
        return End(status, health.healthy_s(clock())), health

    def _after(self, end: End) -> float:
        """How long to wait for the next life."""
        wait_s = self.history.wait_s(end, self._rng)
        log.warning(
            "process ended, starting it again",
            extra={
                "which": self.name,
                "status": end.status,
                "served_s": round(end.healthy_s, 1),
                "in_s": round(wait_s, 1),
                "reason": self.reason,
            },
        )
        return wait_s
