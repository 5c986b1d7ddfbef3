"""Shell. The supervisor's end of its socket to the gateway processes. Load reports come in, and the
state of the workers goes out, as one JSON line each.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from gateway.supervisor.autoscaling import reports
from gateway.supervisor.autoscaling.reports import LoadReport, ScalingStatus

log = logging.getLogger("loraplex.serve")

SOCKET = "supervisor.sock"
"""In the run folder."""


class ScalingServer:
    """`on_report` is called with every load report. `on_end` is called with the name of a gateway
    process when its last connection has ended.
    """

    def __init__(
        self, run_dir: Path, on_report: Callable[[LoadReport], None], on_end: Callable[[str], None]
    ) -> None:
        self._path = run_dir / SOCKET
        self._on_report = on_report
        self._on_end = on_end
        self._writers: dict[asyncio.StreamWriter, str] = {}

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        server = await asyncio.start_unix_server(
            self._serve, self._path, limit=reports.MAX_LINE_BYTES
        )
        try:
            yield
        finally:
            server.close()
            for writer in list(self._writers):
                writer.close()

    def tell(self, status: ScalingStatus) -> None:
        """Sends the status to all gateway processes. A process that does not read is skipped; the
        next status has everything in it.
        """
        line = reports.encode(status) + b"\n"
        for writer in self._writers:
            if not writer.is_closing() and not writer.transport.get_write_buffer_size():
                writer.write(line)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers[writer] = ""
        try:
            while line := await reader.readline():
                try:
                    report = reports.decode_report(line)
                except reports.DecodeError as exc:
                    log.warning("a gateway's report was dropped", extra={"error": str(exc)})
                    continue
                self._writers[writer] = report.process
                self._on_report(report)
        except (OSError, ValueError) as exc:  # ValueError: a line beyond the limit
            log.warning("a gateway's connection ended", extra={"error": str(exc)})
        finally:
            process = self._writers.pop(writer)
            if process and process not in self._writers.values():
                self._on_end(process)
            writer.close()
