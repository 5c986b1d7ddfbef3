"""Shell. A gateway process's end of the socket to its supervisor. It reports the load several times
a second, or at once after `nudge`, and takes the supervisor's status.

A gateway without a supervisor (`loraplex gateway`) has no such socket, and nothing here happens.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from gateway.supervisor.autoscaling import reports
from gateway.supervisor.autoscaling.reports import LoadReport, ModelLoad, ModelStatus
from gateway.supervisor.autoscaling.scaling_server import SOCKET

log = logging.getLogger("loraplex.gateway")

REPORT_S = 0.25
"""The time between two reports. Ray takes 6 s; here the supervisor knows the load sooner.
"""
RETRY_S = 0.5


class ScalingClient:
    """`snapshot` returns the load of every base model in this process. `on_status` is called with
    every status of the supervisor.
    """

    def __init__(
        self,
        run_dir: Path,
        process: str,
        snapshot: Callable[[], dict[str, ModelLoad]],
        on_status: Callable[[Mapping[str, ModelStatus]], None],
    ) -> None:
        self._path = run_dir / SOCKET
        self._process = process
        self._snapshot = snapshot
        self._on_status = on_status
        self._news = asyncio.Event()
        self.last_report_at: float | None = None
        """When the last status came, on the monotonic clock."""

    @property
    def has_supervisor(self) -> bool:
        return self._path.exists()

    def nudge(self) -> None:
        """Sends the next report at once: something has happened that cannot wait."""
        self._news.set()

    async def run(self) -> None:
        if not self.has_supervisor:
            return
        while True:
            with contextlib.suppress(OSError, ValueError):
                reader, writer = await asyncio.open_unix_connection(
                    str(self._path), limit=reports.MAX_LINE_BYTES
                )
                with contextlib.closing(writer):
                    await self._talk(reader, writer)
            await asyncio.sleep(RETRY_S)

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Until the connection ends."""
        listening = asyncio.create_task(self._listen(reader), name="scaling status")
        try:
            while not listening.done():
                self._news.clear()
                report = LoadReport(self._process, self._snapshot())
                writer.write(reports.encode(report) + b"\n")
                await writer.drain()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(REPORT_S):
                        await self._news.wait()
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        while line := await reader.readline():
            try:
                status = reports.decode_status(line)
            except reports.DecodeError as exc:
                log.warning("the supervisor's status was dropped", extra={"error": str(exc)})
                continue
            self.last_report_at = time.monotonic()
            self._on_status(status.models)
