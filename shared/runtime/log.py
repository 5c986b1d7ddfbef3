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
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), 127, 0x85)}
_encode = msgspec.json.Encoder(enc_hook=str).encode
MAX_CALLS = 6
"""Of a traceback, in one line."""
MAX_VALUE_CHARACTERS = 2000
"""Of one field in a line; a client may have had a part in it."""
MAX_LINE_CHARACTERS = 16_000
"""Of a whole line, tracebacks included."""


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
        line = bounded(one_line(line))
        if record.exc_info:
            line += "\n" + bounded(self.formatException(record.exc_info))
        return line


def place_of(exc: BaseException) -> str:
    """The kind of an error and where it was raised, innermost call first. Its message is left out:
    it may quote what a client sent.
    """
    calls = traceback.extract_tb(exc.__traceback__)[-MAX_CALLS:]
    places = [f"{Path(call.filename).name}:{call.lineno}" for call in reversed(calls)]
    return " < ".join([type(exc).__name__, *places])


def on_loop_failure(loop: object, context: dict[str, Any]) -> None:
    """A loop's exception handler. asyncio's own prints the error with what it quotes."""
    exc = context.get("exception")
    at = place_of(exc) if isinstance(exc, BaseException) else ""
    logging.getLogger("loraplex.loop").error("a callback failed", extra={"at": at})


def one_line(text: str) -> str:
    """Without control characters: a name that holds line ends would write lines of its own."""
    return text.translate(_CONTROL)


def bounded(line: str) -> str:
    """No line is longer than MAX_LINE_CHARACTERS, whatever it quotes."""
    return line if len(line) <= MAX_LINE_CHARACTERS else line[:MAX_LINE_CHARACTERS] + " ..."


def extras(record: logging.LogRecord) -> dict[str, Any]:
    return {k: _short(v) for k, v in vars(record).items() if k not in _STANDARD}


def _short(value: Any) -> Any:
    if isinstance(value, str) and len(value) > MAX_VALUE_CHARACTERS:
        return value[:MAX_VALUE_CHARACTERS] + " ..."
    return value


def set_up(process: str, level: str = "info", json_lines: bool | None = None) -> None:
    """Once per process, to stderr. JSON lines unless stderr is a terminal (or as told)."""
    as_json = not sys.stderr.isatty() if json_lines is None else json_lines
    out = logging.StreamHandler(sys.stderr)
    out.setFormatter(JSONLines(process) if as_json else ShortLines(process))
    root = logging.getLogger("loraplex")
    root.handlers[:] = [out]
    root.setLevel(level.upper())
    root.propagate = False
