"""Shell. One supervised process: starts it, and restarts it whenever it ends."""

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
from gateway.supervisor.restarts import SIGNALLED, ProcessExit, RestartHistory, describe_exit
from shared.errors import LoraplexError
from shared.runtime import children
from shared.runtime.children import Child
from shared.runtime.descendants import out_of_memory_kills

log = logging.getLogger("loraplex.serve")
clock = time.monotonic

SIGNALS = {int(s): s.name for s in signal.Signals}
CANNOT_FORK = 70
"""The exit status that is noted if a process could not even be started."""


class SupervisedProcess:
    """Keeps one gateway or worker process running, one start after the other.

    `model` is the base model of a worker, and None for a gateway process. `on_end` is called after
    each end that nobody asked for. It gets the health of the process that ended, or None if it
    could not be started.
    """

    def __init__(
        self,
        name: str,
        start: Callable[[], Awaitable[Child]],
        liveness: Liveness,
        on_end: Callable[[SupervisedProcess, ProcessHealth | None], None],
        rng: Random,
        model: str | None = None,
    ) -> None:
        self.name, self.model = name, model
        self.child: Child | None = None
        self.health: ProcessHealth | None = None
        self.reason = ""
        self.killed = False  # the last time, by a signal from outside
        self.history = RestartHistory()
        self._start, self._liveness, self._on_end, self._rng = start, liveness, on_end, rng
        self._stopping = asyncio.Event()
        self._down = asyncio.Event()  # the process has ended, and is not restarted

    @property
    def healthy(self) -> bool:
        return self.health is not None and self.health.healthy_since is not None

    async def run(self, child: Child | None = None) -> None:
        """Starts the process and restarts it until `stop` is called. `child` is the process if it
        has been started already.
        """
        try:
            while not self._stopping.is_set():
                end, health = await self._run_once(child)
                if self._stopping.is_set():
                    return
                child, wait_s = None, self._wait_after(end)
                self._on_end(self, health)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await self._stopping.wait()
        finally:
            self._down.set()

    def kill(self, reason: str) -> None:
        """Kills the whole process group with SIGKILL. A restart follows."""
        if self.health is not None and self.child is not None:
            self.health.reason = reason
            children.kill_group(self.child)

    async def stop(self, grace_s: float, kill_s: float) -> None:
        """Ends the process for good: SIGTERM, then SIGKILL after `grace_s`. Returns once it has
        ended.
        """
        self._stopping.set()
        if self.child is not None:
            with contextlib.suppress(TimeoutError):
                await children.end(self.child, grace_s, kill_s)
        await self._down.wait()

    async def _run_once(self, child: Child | None) -> tuple[ProcessExit, ProcessHealth | None]:
        """Runs the process once, from its start to its end."""
        try:
            self.child = child or await self._start()
        except LoraplexError as exc:
            self.reason = exc.message
            return ProcessExit(CANNOT_FORK, 0.0), None
        health = self.health = self._liveness.started(self.name, self.child.pid)
        if self._stopping.is_set():  # `stop` came while it was being started
            children.send_signal(self.child, signal.SIGTERM)
        memory_kills = out_of_memory_kills()
        status = await self.child.wait()
        # what it was working on may be what takes so much
        out_of_memory = out_of_memory_kills() > memory_kills
        # a part of its group that lives on, such as an engine, would keep the GPU
        children.kill_group(self.child)
        self.child = self.health = None
        self._liveness.ended(self.name)
        from_outside = status - SIGNALLED in (signal.SIGKILL, signal.SIGTERM)
        self.killed = from_outside and not health.reason and not out_of_memory
        why = ": the machine or container is out of memory" if out_of_memory else ""
        self.reason = health.reason or describe_exit(status, SIGNALS) + why
        return ProcessExit(status, health.healthy_s(clock()), self.killed), health

    def _wait_after(self, end: ProcessExit) -> float:
        """Logs the end. Returns the seconds to wait before the restart."""
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
