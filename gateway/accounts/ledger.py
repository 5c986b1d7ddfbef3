"""Shell. The usage ledger: how much each key used of each model. Twice a second it is appended to
SQLite files in state_dir, one file per month. All gateway processes of a machine write to the same
files. Each has a thread that writes and one that answers queries.

A process that is killed loses at most the last FLUSH_S. While a file cannot be written, the counts
are kept in memory and the write is tried again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sqlite3
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

log = logging.getLogger("loraplex.usage")

FLUSH_S = 0.5
CACHE_KIB = 128
BUSY_S = 5.0
"""The longest wait for another process's commit. A commit takes milliseconds."""
MAX_PENDING = 100_000
"""The most sums that may wait for the disk. Beyond that, new ones are kept without the adapter's
name.
"""
MAX_ROWS = 10_000
"""The most rows of one answer."""
COLUMNS = ("key", "base", "adapter")
PERIODS = {"hour": 3600, "day": 86_400}
OTHER = "_other"
_TABLE = """
PRAGMA journal_mode=WAL;
CREATE TABLE IF NOT EXISTS usage (
    at REAL NOT NULL, key TEXT NOT NULL, base TEXT NOT NULL, adapter TEXT NOT NULL,
    requests INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS usage_at ON usage (at);
"""


@dataclass(slots=True)
class UsageSum:
    """The sums of one key, base model and adapter."""

    requests: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0


@dataclass(slots=True)
class _File:
    """The file of the current month."""

    month: str = ""
    connection: sqlite3.Connection | None = None


@dataclass(slots=True)
class Ledger:
    """`folder` None: nothing is recorded. Files older than `months` are deleted."""

    folder: Path | None = None
    months: int = 13
    _pending: dict[tuple[str, str, str], UsageSum] = field(default_factory=dict)
    _file: _File = field(default_factory=_File)
    _writer: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="usage")
    )
    _reader: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="usage-reader")
    )
    """A query of a busy day takes seconds. What is used meanwhile must not wait for it."""
    _failing: bool = False

    def note(
        self,
        of: tuple[str, str, str],
        prompt_tokens: int,
        output_tokens: int,
        *,
        requests: int = 1,
    ) -> None:
        """`of` are the key, the base model and the adapter (empty: none).

        Counts one request that has ended, or, with `requests` 0, a part of one that has not. The
        last part of a request is negative where the parts before were too much.
        """
        if self.folder is None:
            return
        found = self._pending.get(of)
        if found is None:
            if len(self._pending) >= MAX_PENDING:
                of = (*of[:2], OTHER)
            found = self._pending.setdefault(of, UsageSum())
        found.requests += requests
        found.prompt_tokens += prompt_tokens
        found.output_tokens += output_tokens

    async def run(self, gather: Callable[[], None]) -> None:
        """`gather` is called before each flush, to note what open requests have used."""
        while True:
            await asyncio.sleep(FLUSH_S)
            if self.folder is not None:
                gather()
            await self.flush()

    async def flush(self) -> None:
        if not self._pending:
            return
        taken, self._pending = self._pending, {}
        loop = asyncio.get_running_loop()
        try:
            await asyncio.shield(loop.run_in_executor(self._writer, self._write, taken))
        except (sqlite3.Error, OSError) as exc:
            self._put_back(taken)
            if not self._failing:
                log.error("usage not written, will be tried again", extra={"why": str(exc)})
            self._failing = True
        else:
            self._failing = False

    async def close(self) -> None:
        await self.flush()
        self._writer.shutdown(wait=True)
        self._reader.shutdown(wait=True, cancel_futures=True)
        if self._file.connection is not None:
            self._file.connection.close()

    async def query(
        self, since: float, until: float, by: Sequence[str]
    ) -> list[dict[str, str | int]]:
        """Sums from `since` up to, but without, `until` (seconds of the Unix epoch). `by` may hold
        any of COLUMNS and one of PERIODS. The rows with the most output tokens come first.
        """
        await self.flush()
        return await asyncio.get_running_loop().run_in_executor(
            self._reader, self._read, since, until, tuple(by)
        )

    # ---- in the threads: _read in the reader's, all else in the writer's ------------------------

    def _write(self, taken: dict[tuple[str, str, str], UsageSum]) -> None:
        now = time.time()
        connection = self._open(time.strftime("%Y-%m", time.gmtime(now)))
        rows = [
            (now, *of, one.requests, one.prompt_tokens, one.output_tokens)
            for of, one in taken.items()
        ]
        with connection:
            connection.executemany("INSERT INTO usage VALUES (?, ?, ?, ?, ?, ?, ?)", rows)

    def _open(self, month: str) -> sqlite3.Connection:
        file = self._file
        if file.connection is not None and file.month == month:
            return file.connection
        assert self.folder is not None
        if file.connection is not None:
            file.connection.close()
            file.connection = None
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        current = self.folder / f"usage-{month}.sqlite"
        earlier = [path for path in self._files() if path != current]
        for old in earlier[: max(0, len(earlier) - self.months + 1)]:
            for left in self.folder.glob(f"{old.name}*"):
                left.unlink(missing_ok=True)
        if not current.exists():
            _create(current)
        connection = _connect(current)
        # A commit outlives this process at once; only a machine that fails loses some of them.
        connection.execute("PRAGMA synchronous=NORMAL")
        # Rows are appended. SQLite would keep 2 MB of pages that nobody reads again.
        connection.execute(f"PRAGMA cache_size=-{CACHE_KIB}")
        connection.executescript(_TABLE)  # a file of before may lack it
        self._file = _File(month, connection)
        return connection

    def _read(self, since: float, until: float, by: tuple[str, ...]) -> list[dict[str, str | int]]:
        what = [_period(b) if b in PERIODS else b for b in by]
        sums_of = [f"SUM({column})" for column in ("requests", "prompt_tokens", "output_tokens")]
        query = f"SELECT {', '.join(what + sums_of)} FROM usage WHERE at >= ? AND at < ?"
        if by:
            query += f" GROUP BY {', '.join(by)}"
        sums: dict[tuple[str | int, ...], UsageSum] = {}
        for path in self._files():
            with contextlib.closing(_connect(path)) as connection:
                for row in connection.execute(query, (since, until)):
                    if row[-1] is None:
                        continue  # there is nothing to sum
                    found = sums.setdefault(row[:-3], UsageSum())
                    found.requests += row[-3]
                    found.prompt_tokens += row[-2]
                    found.output_tokens += row[-1]
        largest = sorted(sums.items(), key=lambda item: -item[1].output_tokens)[:MAX_ROWS]
        return [
            dict(zip(by, of, strict=True))
            | {
                "requests": one.requests,
                "prompt_tokens": one.prompt_tokens,
                "output_tokens": one.output_tokens,
            }
            for of, one in largest
        ]

    def _files(self) -> list[Path]:
        """The files of all months, the oldest first."""
        return sorted(self.folder.glob("usage-????-??.sqlite")) if self.folder is not None else []

    def _put_back(self, taken: dict[tuple[str, str, str], UsageSum]) -> None:
        for of, one in taken.items():
            found = self._pending.setdefault(of, UsageSum())
            found.requests += one.requests
            found.prompt_tokens += one.prompt_tokens
            found.output_tokens += one.output_tokens


def _create(path: Path) -> None:
    """Makes the file as a whole, so that no other process finds it without its table. Of several
    that do so at once, one wins.
    """
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    draft.touch(mode=0o600)
    try:
        with contextlib.closing(_connect(draft)) as connection:
            connection.executescript(_TABLE)
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        draft.unlink()


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=BUSY_S, check_same_thread=False)


def _period(name: str) -> str:
    """The SQL expression for the beginning of the hour or day."""
    return f"CAST(at / {PERIODS[name]} AS INTEGER) * {PERIODS[name]} AS {name}"
