"""Shell. Logging: JSON lines with ids for machines, short lines for a terminal; never prompts,
never keys.
"""

from __future__ import annotations

import logging
import sys
import traceback
from pathlib import Path
from typing import Any

import msgspec

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {
    "message",
    "asctime",
    "taskName",
    "vllm_process_name",
}
_encode = msgspec.json.Encoder(enc_hook=str).encode
MAX_CALLS = 6
"""Of a traceback, in one line."""


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
        line = (
            f"{self.formatTime(record, self.datefmt)} {self._process:<8} "
            f"{mark}{record.getMessage()}" + (f"  {facts}" if facts else "")
        )
        return line + ("\n" + self.formatException(record.exc_info) if record.exc_info else "")


def place_of(exc: BaseException) -> str:
    """The kind of an error and where it was raised, innermost call first. Its message is left out:
    it may quote what a client sent.
    """
    calls = traceback.extract_tb(exc.__traceback__)[-MAX_CALLS:]
    places = [f"{Path(call.filename).name}:{call.lineno}" for call in reversed(calls)]
    return " < ".join([type(exc).__name__, *places])


def extras(record: logging.LogRecord) -> dict[str, Any]:
    return {k: v for k, v in vars(record).items() if k not in _STANDARD}


def set_up(process: str, level: str = "info", json_lines: bool | None = None) -> None:
    """Once per process, to stderr. JSON lines unless stderr is a terminal (or as told)."""
    as_json = not sys.stderr.isatty() if json_lines is None else json_lines
    out = logging.StreamHandler(sys.stderr)
    out.setFormatter(JSONLines(process) if as_json else ShortLines(process))
    root = logging.getLogger("loraplex")
    root.handlers[:] = [out]
    root.setLevel(level.upper())
    root.propagate = False
