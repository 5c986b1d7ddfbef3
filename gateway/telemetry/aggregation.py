"""Shell. Several gateway processes share one port, so a scrape reaches any one of them. They tell
each other their counts, and each of them shows the sum of all. They also ask each other for what
operators want to see (see gateway/admin/history.py).

Each process saves its counts to a file beside its sockets before it tells them to anybody. So every
count that was ever shown is on disk. After a process has died, the others show its last saved
counts; after its restart, it goes on from them. No counter ever falls: Prometheus would take that
for a restart and count the whole value again. Counts newer than the last save, at most SAVE_S old,
are lost with the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

from gateway.telemetry import counters
from gateway.telemetry.counters import Snapshot

log = logging.getLogger("loraplex.aggregation")

SAVE_S = 1.0  # between two saves
ANSWER_S = 1.0  # another process has this long to answer; Prometheus itself waits 10 s


class ProcessAggregator:
    """One per process: number `index` of `processes`. The sockets and files of all of them lie in
    `run_dir`. `snapshot` returns the current counts of this process.
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
        """The counts that this process had saved before it was restarted. None: there are none."""
        return self._read(self._index)

    @contextlib.asynccontextmanager
    async def open(self, answer_of: Callable[[bytes], bytes]) -> AsyncIterator[None]:
        """While it is open, the other processes can ask this one for its counts and requests.
        `answer_of` returns what this process answers to a question of one line. Empty: nothing.
        """
        if not self._others:
            yield
            return
        path = self._socket(self._index)
        path.unlink(missing_ok=True)
        answer = functools.partial(self._answer, answer_of)
        async with await asyncio.start_unix_server(answer, path):
            yield

    async def run(self) -> None:
        """Saves the counts once a second if they have changed."""
        before: Snapshot | None = None
        while True:
            now = self._snapshot()
            if now != before:
                before = await self.save()
            await asyncio.sleep(SAVE_S)

    async def save(self) -> Snapshot:
        """Saves the current counts and returns them."""
        async with self._saving:  # a newer file must never be replaced by an older one
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
        """(the counts of every process, process -> whether its counts are current)."""
        own = await self.save()
        counts = await asyncio.gather(*(self._counts_of(i) for i in self._others))
        answered = {own.process: True} | {
            f"g{i}": snapshot is not None for i, snapshot in zip(self._others, counts, strict=True)
        }
        kept = [snapshot or self._read(i) for i, snapshot in zip(self._others, counts, strict=True)]
        return [own, *(snapshot for snapshot in kept if snapshot is not None)], dict(
            sorted(answered.items())
        )

    async def ask_others(self, question: bytes) -> Mapping[str, bytes]:
        """Process -> its answer to a question of one line. Empty: it does not answer."""
        told = await asyncio.gather(*(self._ask(i, question) for i in self._others))
        return {f"g{i}": answer for i, answer in zip(self._others, told, strict=True)}

    async def _answer(
        self,
        answer_of: Callable[[bytes], bytes],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        # the asking process has ended, or stands still
        with contextlib.suppress(OSError, TimeoutError, ValueError):
            async with asyncio.timeout(ANSWER_S):
                question = (await reader.readline()).rstrip(b"\n")
                writer.write(
                    answer_of(question) if question else counters.encode(await self.save())
                )
                await writer.drain()
        writer.close()

    async def _counts_of(self, index: int) -> Snapshot | None:
        try:
            return counters.decode(await self._ask(index))
        except counters.DecodeError:
            return None

    async def _ask(self, index: int, question: bytes = b"") -> bytes:
        """The answer of another process. Empty: there is none. Without a question it is asked for
        its counts.
        """
        try:
            async with asyncio.timeout(ANSWER_S):
                reader, writer = await asyncio.open_unix_connection(self._socket(index))
                with contextlib.closing(writer):
                    writer.write(question + b"\n")
                    return await reader.read()
        except (OSError, TimeoutError):
            return b""

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
