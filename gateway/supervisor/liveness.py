"""Shell. The supervisor's socket for its child processes. It takes their pulses, finds the ones
that hang, and tells the gateway processes what they must know about workers and models.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from gateway.supervisor.health import ProcessHealth
from shared.supervision.messages import (
    DecodeError,
    ExitReason,
    FromSupervisor,
    Hello,
    Pulse,
    decode_to_supervisor,
    line,
)

log = logging.getLogger("loraplex.serve")
clock = time.monotonic

LOOK_S = 0.25  # between two checks for processes that hang
STOOD_STILL_S = 2.0  # a check this late means that the supervisor or the machine was stopped


class Liveness:
    """The health of every running process, by name. `on_change` is called when a process begins to
    serve, and when a gateway process connects.
    """

    def __init__(self, socket: Path, on_change: Callable[[], None]) -> None:
        self.socket = socket
        self._on_change = on_change
        self._health: dict[str, ProcessHealth] = {}
        self._listeners: dict[str, asyncio.StreamWriter] = {}

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        server = await asyncio.start_unix_server(self._on_connection, self.socket)
        try:
            yield
        finally:
            server.close()
            for writer in self._listeners.values():
                writer.close()

    def started(self, process: str, pid: int) -> ProcessHealth:
        """Notes that the process has been started. Returns its health."""
        health = self._health[process] = ProcessHealth(process, pid, clock())
        return health

    def ended(self, process: str) -> None:
        self._health.pop(process, None)

    def tell(self, message: FromSupervisor) -> None:
        """Sends the message to every gateway process that is connected."""
        for writer in self._listeners.values():
            if not writer.is_closing():
                writer.write(line(message))

    async def watch(self, hang_s: float, on_hang: Callable[[ProcessHealth], None]) -> None:
        """Looks for processes that hang. Calls `on_hang` once for each of them."""
        looked_at, reported = clock(), set[int]()
        while True:
            await asyncio.sleep(LOOK_S)
            now = clock()
            if now - looked_at > STOOD_STILL_S:
                for health in self._health.values():
                    health.last_sign_at = now
            looked_at = now
            for health in self._health.values():
                if health.hangs(hang_s, now) and health.pid not in reported:
                    reported.add(health.pid)
                    on_hang(health)
            reported &= {health.pid for health in self._health.values()}

    async def _on_connection(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        hello: Hello | None = None
        try:
            while data := await reader.readline():
                try:
                    message = decode_to_supervisor(data)
                except DecodeError:
                    log.warning("undecodable line of a child dropped")
                    continue
                if isinstance(message, Hello):
                    hello = message
                elif hello is not None:
                    self._on_news(hello, message, writer)
        except (OSError, ValueError):
            pass  # it has ended; its SupervisedProcess hears of that as well
        finally:
            if hello is not None and self._listeners.get(hello.process) is writer:
                del self._listeners[hello.process]
            writer.close()

    def _on_news(
        self, hello: Hello, message: Pulse | ExitReason, writer: asyncio.StreamWriter
    ) -> None:
        health = self._health.get(hello.process)
        if health is None or health.pid != hello.pid:
            return  # a forked child may connect before the zygote has reported its pid
        if isinstance(message, ExitReason):
            health.reason = message.reason
            return
        news = message.healthy and health.healthy_since is None
        health.epoch = hello.epoch
        health.pulse(message.healthy, message.reason, clock(), message.stage)
        if is_gateway(hello.process) and self._listeners.get(hello.process) is not writer:
            self._listeners[hello.process] = writer
            news = True
        if news:
            self._on_change()


def is_gateway(process: str) -> bool:
    """Whether the name is that of a gateway process (g0, g1 ...) and not of a worker (w0, w1
    ...).
    """
    return process.startswith("g")
