"""Shell. Logging: JSON lines with ids for machines, short lines for a terminal; never prompts, never keys."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from typing import Any

import msgspec

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "vllm_process_name"}
_encode = msgspec.json.Encoder(enc_hook=str).encode
FLUSH_S = 0.1


class JSONLines(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "ts": round(record.created, 3),
            "level": record.levelname.lower(),
            "process": self._process,
            "event": record.getMessage(),
            **extras(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return _encode(line).decode()


class ShortLines(logging.Formatter):
    """`12:00:01 w0 worker joined  worker=w1 slots=4`."""

    def __init__(self, process: str) -> None:
        super().__init__(datefmt="%H:%M:%S")
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        facts = " ".join(f"{k}={v}" for k, v in extras(record).items() if v not in (None, ""))
        mark = "" if record.levelno <= logging.INFO else f"{record.levelname}: "
        line = f"{self.formatTime(record, self.datefmt)} {self._process:<8} {mark}{record.getMessage()}" + (f"  {facts}" if facts else "")
        return line + ("\n" + self.formatException(record.exc_info) if record.exc_info else "")


def extras(record: logging.LogRecord) -> dict[str, Any]:
    return {k: v for k, v in vars(record).items() if k not in _STANDARD}


class AccessLog:
    """One line per request, past logging's machinery (45 microseconds of a request): lines leave together, ten times a second.

    Call `flush()` once at the end.
    """

    def __init__(self, process: str, level: str = "info", json_lines: bool | None = None) -> None:
        self._process = process
        self.enabled = level in ("debug", "info")
        self._as_json = not sys.stderr.isatty() if json_lines is None else json_lines
        self._begin = b'"level":"info","process":%b,"event":"request",' % _encode(process)
        self._lines: list[bytes] = []

    def write(self, facts: msgspec.Struct) -> None:
        if not self.enabled:
            return
        if not self._lines:
            asyncio.get_running_loop().call_later(FLUSH_S, self.flush)
        if self._as_json:
            self._lines.append(b'{"ts":%.3f,%b%b' % (time.time(), self._begin, _encode(facts)[1:]))
        else:
            shown = " ".join(f"{k}={v}" for k, v in msgspec.structs.asdict(facts).items() if v not in (None, ""))
            self._lines.append(f"{time.strftime('%H:%M:%S')} {self._process:<8} request  {shown}".encode())

    def flush(self) -> None:
        if self._lines:
            sys.stderr.write(b"\n".join([*self._lines, b""]).decode())
            sys.stderr.flush()
            self._lines.clear()


def set_up(process: str, level: str = "info", json_lines: bool | None = None) -> None:
    """Once per process, to stderr. JSON lines unless stderr is a terminal (or as told)."""
    as_json = not sys.stderr.isatty() if json_lines is None else json_lines
    out = logging.StreamHandler(sys.stderr)
    out.setFormatter(JSONLines(process) if as_json else ShortLines(process))
    root = logging.getLogger("loraplex")
    root.handlers[:] = [out]
    root.setLevel(level.upper())
    root.propagate = False
