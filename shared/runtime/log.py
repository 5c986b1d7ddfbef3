"""Shell. Logging: JSON lines with ids for machines, short lines for a terminal. Prompts and keys
are never logged.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections import deque
from pathlib import Path
from typing import Any

import msgspec

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {
    "message",
    "asctime",
    "taskName",
    "vllm_process_name",
}
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), 127, 0x85)}
_encode = msgspec.json.Encoder(enc_hook=str).encode
MAX_CALLS = 6
"""Calls of a traceback that one line shows."""
MAX_VALUE_CHARACTERS = 2000
"""Length of one field in a line. A client may have written a part of it."""
MAX_LINE_CHARACTERS = 16_000
"""Length of a whole line, with its traceback."""


RECENT_LINES = 1000
"""Kept by each process, so that a running one can be asked for them."""
_recent: deque[str] = deque(maxlen=RECENT_LINES)


class RecentLines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _recent.append(self.format(record))


def recent_lines() -> list[str]:
    """The last log lines of this process, oldest first, as JSON. Access log lines are not among
    them.
    """
    return list(_recent)


class JSONLines(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "ts": round(record.created, 3),
            "level": record.levelname.lower(),
            "process": self._process,
            "event": _short(record.getMessage()),
            **extras(record),
        }
        if record.exc_info:
            line["exception"] = bounded(self.formatException(record.exc_info))
        return _encode(line).decode()


class ShortLines(logging.Formatter):
    """Formats lines like `12:00:01 w0 worker joined  worker=w1 slots=4`."""

    def __init__(self, process: str) -> None:
        super().__init__(datefmt="%H:%M:%S")
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        facts = " ".join(f"{k}={v}" for k, v in extras(record).items() if v not in (None, ""))
        mark = "" if record.levelno <= logging.INFO else f"{record.levelname}: "
        line = (
            f"{self.formatTime(record, self.datefmt)} {self._process:<8} "
            f"{mark}{record.getMessage()}" + (f"  {facts}" if facts else "")
        )
        line = bounded(one_line(line))
        if record.exc_info:
            line += "\n" + bounded(self.formatException(record.exc_info))
        return line


def place_of(exc: BaseException) -> str:
    """The kind of an error and where it was raised, innermost call first. The message is left out,
    because it may quote what a client sent.
    """
    calls = traceback.extract_tb(exc.__traceback__)[-MAX_CALLS:]
    places = [f"{Path(call.filename).name}:{call.lineno}" for call in reversed(calls)]
    return " < ".join([type(exc).__name__, *places])


def on_loop_failure(loop: object, context: dict[str, Any]) -> None:
    """The event loop's exception handler. asyncio's own would print the error with what it
    quotes.
    """
    exc = context.get("exception")
    at = place_of(exc) if isinstance(exc, BaseException) else ""
    logging.getLogger("loraplex.loop").error("a callback failed", extra={"at": at})


def one_line(text: str) -> str:
    """The text without control characters. A name that contains line ends could otherwise forge
    lines.
    """
    return text.translate(_CONTROL)


def bounded(line: str) -> str:
    """The line, cut to MAX_LINE_CHARACTERS."""
    return line if len(line) <= MAX_LINE_CHARACTERS else line[:MAX_LINE_CHARACTERS] + " ..."


def extras(record: logging.LogRecord) -> dict[str, Any]:
    return {k: _short(v) for k, v in vars(record).items() if k not in _STANDARD}


def _short(value: Any) -> Any:
    if isinstance(value, str) and len(value) > MAX_VALUE_CHARACTERS:
        return value[:MAX_VALUE_CHARACTERS] + " ..."
    return value


def set_up(process: str, level: str = "info", json_lines: bool | None = None) -> None:
    """Sets up logging to stderr, once per process. The lines are JSON unless stderr is a terminal;
    `json_lines` overrides that.
    """
    as_json = not sys.stderr.isatty() if json_lines is None else json_lines
    out = logging.StreamHandler(sys.stderr)
    out.setFormatter(JSONLines(process) if as_json else ShortLines(process))
    kept = RecentLines()
    kept.setFormatter(JSONLines(process))
    root = logging.getLogger("loraplex")
    root.handlers[:] = [out, kept]
    root.setLevel(level.upper())
    root.propagate = False
