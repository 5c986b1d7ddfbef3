"""Shell. A child's line to the `serve` that started it. A process that nobody supervises has none,
and everything here does nothing then.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable

from shared.supervision.messages import (
    MAX_REASON,
    PULSE_S,
    DecodeError,
    FromSupervisor,
    Hello,
    LastWords,
    Pulse,
    decode_from_supervisor,
    line,
)

log = logging.getLogger("loraplex.supervision")

SUPERVISOR_ENV = "LORAPLEX_SUPERVISOR"
"""Set by `serve` for its children: the path of its socket and the child's name, `PATH NAME`."""
LAST_WORDS_S = 1.0


def environment(path: object, process: str) -> dict[str, str]:
    """What a child of this name is started with."""
    return {SUPERVISOR_ENV: f"{path} {process}"}


def _mine() -> tuple[str, str] | None:
    path, _, name = os.environ.get(SUPERVISOR_ENV, "").rpartition(" ")
    return (path, name) if path else None


async def report_to_supervisor(
    state: Callable[[], Pulse],
    on_message: Callable[[FromSupervisor], None] = lambda _: None,
    epoch: int = 0,
) -> None:
    """Sends a pulse every PULSE_S until it is cancelled, and hands over what `serve` says. Returns
    where there is no supervisor, or when it has ended: this process then ends by the kernel's hand.
    """
    mine = _mine()
    if mine is None:
        return
    path, name = mine
    try:
        reader, writer = await asyncio.open_unix_connection(path)
    except OSError as exc:
        log.warning("no line to the supervisor", extra={"error": exc.strerror})
        return
    with contextlib.closing(writer):
        writer.write(line(Hello(name, os.getpid(), epoch)))
        listening = asyncio.create_task(_listen(reader, on_message), name="supervisor's words")
        try:
            while not listening.done():
                writer.write(line(state()))
                await asyncio.wait([listening], timeout=PULSE_S)
        finally:
            listening.cancel()


async def _listen(
    reader: asyncio.StreamReader, on_message: Callable[[FromSupervisor], None]
) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.readline():
            try:
                message = decode_from_supervisor(data)
            except DecodeError:
                log.warning("undecodable line of the supervisor dropped")
                continue
            on_message(message)


def say_last_words(reason: str) -> None:
    """Tells `serve` why this process is about to end. Needs no event loop; never raises, and takes
    at most a second.
    """
    mine = _mine()
    if mine is None:
        return
    path, name = mine
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as s:
        s.settimeout(LAST_WORDS_S)
        s.connect(path)
        s.sendall(line(Hello(name, os.getpid())) + line(LastWords(reason[:MAX_REASON])))
