"""Shell. The gateway processes behind one port tell each other what they have counted, so that a
scrape of any shows the sum of all.

Each keeps its numbers in a file beside its sockets, and writes it anew before it tells them to
anybody. So whatever was shown is on file: a process that dies is shown with its last numbers, one
that is started again goes on from them, and no counter ever falls (to Prometheus a counter that
falls has begun anew, and its whole value would count once more). What a process counted after its
last file, at most SAVE_S, dies with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from gateway.telemetry import counters
from gateway.telemetry.counters import Snapshot

log = logging.getLogger("loraplex.aggregation")

SAVE_S = 1.0
ANSWER_S = 1.0  # for another process to tell its numbers; Prometheus waits 10 s for all of it


class ProcessAggregator:
    """This process, number `index` of `processes`; their sockets and files lie in `run_dir`.
    `snapshot` tells what this one has counted.
    """

    def __init__(
        self, run_dir: Path, index: int, processes: int, snapshot: Callable[[], Snapshot]
    ) -> None:
        self._run_dir = run_dir
        self._index = index
        self._others = [i for i in range(processes) if i != index]
        self._snapshot = snapshot
        self._saving = asyncio.Lock()

    def earlier(self) -> Snapshot | None:
        """What an earlier life of this process had counted."""
        return self._read(self._index)

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Answers the others until it is left."""
        if not self._others:
            yield
            return
        path = self._socket(self._index)
        path.unlink(missing_ok=True)
        async with await asyncio.start_unix_server(self._tell, path):
            yield

    async def run(self) -> None:
        """Keeps the file at most SAVE_S old."""
        before: Snapshot | None = None
        while True:
            now = self._snapshot()
            if now != before:
                before = await self.save()
            await asyncio.sleep(SAVE_S)

    async def save(self) -> Snapshot:
        """What is on file now."""
        async with self._saving:  # a later file must never be replaced by an earlier one
            snapshot = self._snapshot()
            try:
                await asyncio.to_thread(self._write, counters.encode(snapshot))
            except OSError as exc:
                log.warning(
                    "metrics not saved: a restart would begin them anew",
                    extra={"error": exc.strerror},
                )
            return snapshot

    async def all(self) -> tuple[list[Snapshot], dict[str, bool]]:
        """Every process's numbers, and of each whether it told them itself just now."""
        own = await self.save()
        told = await asyncio.gather(*(self._ask(i) for i in self._others))
        answered = {own.process: True} | {
            f"g{i}": snapshot is not None for i, snapshot in zip(self._others, told, strict=True)
        }
        kept = [snapshot or self._read(i) for i, snapshot in zip(self._others, told, strict=True)]
        return [own, *(snapshot for snapshot in kept if snapshot is not None)], dict(
            sorted(answered.items())
        )

    async def _tell(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):  # the one that asked has left
            writer.write(counters.encode(await self.save()))
            await writer.drain()
        writer.close()

    async def _ask(self, index: int) -> Snapshot | None:
        try:
            async with asyncio.timeout(ANSWER_S):
                reader, writer = await asyncio.open_unix_connection(self._socket(index))
                with contextlib.closing(writer):
                    return counters.decode(await reader.read())
        except (OSError, TimeoutError, *counters.DecodeError):
            return None

    def _read(self, index: int) -> Snapshot | None:
        try:
            return counters.decode(self._file(index).read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, *counters.DecodeError) as exc:
            log.warning(
                "metrics file not read", extra={"file": self._file(index).name, "error": str(exc)}
            )
            return None

    def _write(self, data: bytes) -> None:
        aside = self._file(self._index).with_suffix(".aside")
        aside.write_bytes(data)
        aside.rename(self._file(self._index))

    def _file(self, index: int) -> Path:
        return self._run_dir / f"g{index}.counted"

    def _socket(self, index: int) -> Path:
        return self._run_dir / f"g{index}.counts"
