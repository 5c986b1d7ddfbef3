"""Shell. The access log: one line for each request that has ended."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time

import msgspec

from shared.runtime.log import _encode, one_line

FLUSH_S = 0.1
"""Lines are collected for this long and then written in one call."""


class AccessLog:
    """Writes lines to stderr: JSON for machines, short text for a terminal.

    It does not use Python's logging, which takes 45 microseconds per line. Call `flush()` once at
    the end, or the last lines are lost.
    """

    def __init__(self, process: str, level: str = "info", json_lines: bool | None = None) -> None:
        self.process = process
        self.set_level(level)
        self._as_json = not sys.stderr.isatty() if json_lines is None else json_lines
        self._begin = b'"level":"info","process":%b,"event":"request",' % _encode(process)
        self._lines: list[bytes] = []

    def set_level(self, level: str) -> None:
        self.enabled = level in ("debug", "info")

    def write(self, facts: msgspec.Struct) -> None:
        """`facts` are the fields of the line. Only level info and debug write access lines."""
        if not self.enabled:
            return
        if not self._lines:
            asyncio.get_running_loop().call_later(FLUSH_S, self.flush)
        if self._as_json:
            self._lines.append(b'{"ts":%.3f,%b%b' % (time.time(), self._begin, _encode(facts)[1:]))
        else:
            shown = " ".join(
                f"{k}={v}" for k, v in msgspec.structs.asdict(facts).items() if v not in (None, "")
            )
            line = f"{time.strftime('%H:%M:%S')} {self.process:<8} request  {shown}"
            self._lines.append(one_line(line).encode(errors="replace"))

    def flush(self) -> None:
        """Lines that cannot be written now, on a full disk, say, are lost."""
        if self._lines:
            lines, self._lines = self._lines, []
            with contextlib.suppress(OSError):
                sys.stderr.write(b"\n".join([*lines, b""]).decode())
                sys.stderr.flush()
