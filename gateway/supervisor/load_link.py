"""Shell. A gateway process's end of the socket to its supervisor: tells its load a few times a
second, and at once when asked to; hears what the supervisor does about it.

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
from gateway.supervisor.load_server import SOCKET

log = logging.getLogger("loraplex.gateway")

REPORT_S = 0.25
"""Between two reports: more often than Ray's 6 s, so that a status is never older than this."""
RETRY_S = 0.5


class LoadLink:
    """`snapshot` is this process's load of every base model; `on_status` hears of each status."""

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
        self.heard_at: float | None = None
        """When the last status came, on the monotonic clock."""

    def nudge(self) -> None:
        """Something has happened that cannot wait for the next report."""
        self._news.set()

    async def run(self) -> None:
        if not self._path.exists():
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
            self.heard_at = time.monotonic()
            self._on_status(status.models)
