"""Shell. Processes of a benchmark: started, watched through /proc (CPU, memory), and ended with all
their children.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
STOP_S = 5.0
LOOK_AGAIN_S = 0.05


class NotStarted(Exception):
    """A peer's process ended or did not answer in time; the message holds the end of what it
    wrote.
    """


@dataclass(frozen=True, slots=True)
class ProcessUsage:
    """Of a process and all its descendants, at one moment. `ticked_s` is utime + stime, in steps of
    10 ms, threads that have ended included; `scheduled_s` is to the nanosecond, of `threads` alone;
    `ended_s` is of descendants that have ended and were waited for.
    """

    ticked_s: float
    scheduled_s: float
    ended_s: float
    threads: frozenset[tuple[int, int]]
    rss_bytes: int
    processes: int


def spent_s(before: ProcessUsage, after: ProcessUsage) -> float:
    """CPU seconds between two looks at the same process: to the nanosecond unless a thread has
    ended meanwhile.
    """
    if before.threads <= after.threads:
        return after.scheduled_s - before.scheduled_s + after.ended_s - before.ended_s
    return after.ticked_s - before.ticked_s + after.ended_s - before.ended_s


class Process:
    """A child of ours and what becomes of it. Its output goes to `log`."""

    def __init__(
        self,
        argv: Sequence[str],
        log: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        self.log = log
        with log.open("ab") as out:
            self._child = subprocess.Popen(
                list(argv),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=os.environ | dict(env or {}),
                cwd=cwd,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def running(self) -> bool:
        return self._child.poll() is None

    def usage(self) -> ProcessUsage:
        return usage(self._child.pid)

    def stop(self) -> None:
        """SIGTERM, then SIGKILL for whatever of the family is left. Idempotent."""
        family = tree(self._child.pid)
        with contextlib.suppress(ProcessLookupError):
            self._child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(STOP_S)
        for pid in family:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if _session(pid) is not None:
                    os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(STOP_S)

    def last_words(self) -> str:
        with contextlib.suppress(OSError):
            return self.log.read_text(errors="replace")[-600:].strip()
        return ""


async def until_answers(
    port: int, path: str, process: Process, timeout_s: float, headers: str = ""
) -> None:
    """Until GET `path` is answered with 200. Raises NotStarted."""
    request = (
        f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{headers}Connection: close\r\n\r\n".encode()
    )
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if not process.running:
            raise NotStarted(f"it ended by itself: {process.last_words()}")
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(2.0):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                try:
                    writer.write(request)
                    if b" 200 " in await reader.readline():
                        return
                finally:
                    writer.close()
        await asyncio.sleep(LOOK_AGAIN_S)
    raise NotStarted(f"no answer within {timeout_s:g} s: {process.last_words()}")


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [int(s.getsockname()[1]) for s in sockets]


def tree(root: int) -> list[int]:
    """The process and all that descend from it, as far as they live."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            stat = _stat(int(entry))
            if stat is not None:
                children.setdefault(int(stat[1]), []).append(int(entry))
    found, at = [root], 0
    while at < len(found):
        found += children.get(found[at], [])
        at += 1
    return found


def usage(root: int) -> ProcessUsage:
    """Of the whole family, from /proc/PID/stat and /proc/PID/task/TID/schedstat."""
    ticks = ended = rss = count = scheduled_ns = 0
    threads: set[tuple[int, int]] = set()
    for pid in tree(root):
        stat = _stat(pid)
        if stat is None:
            continue
        ticks += int(stat[11]) + int(stat[12])
        ended += int(stat[13]) + int(stat[14])
        rss += int(stat[21])
        count += 1
        for tid, ns in _scheduled(pid):
            threads.add((pid, tid))
            scheduled_ns += ns
    return ProcessUsage(
        ticks / TICKS_PER_S,
        scheduled_ns / 1e9,
        ended / TICKS_PER_S,
        frozenset(threads),
        rss * PAGE_BYTES,
        count,
    )


def _scheduled(pid: int) -> Iterator[tuple[int, int]]:
    """The threads of a process and the nanoseconds that each has run."""
    with contextlib.suppress(OSError):
        for tid in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError, ValueError):
                yield (
                    int(tid),
                    int(Path(f"/proc/{pid}/task/{tid}/schedstat").read_text().split()[0]),
                )


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the third (state) on; the second, a name, may hold
    anything.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, IndexError):
        return None


def _session(pid: int) -> int | None:
    with contextlib.suppress(OSError):
        return os.getsid(pid)
    return None
