"""Shell. A child's connection to the `serve` that started it. For a process that nobody supervises,
everything here does nothing.
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
    ExitReason,
    FromSupervisor,
    Hello,
    Pulse,
    decode_from_supervisor,
    line,
)

log = logging.getLogger("loraplex.supervision")

SUPERVISOR_ENV = "LORAPLEX_SUPERVISOR"
"""Set by `serve` for its children: the path of its socket and the child's name, as `PATH NAME`."""
LAST_WORDS_S = 1.0


def environment(path: object, process: str) -> dict[str, str]:
    """The environment variables for a child of this name."""
    return {SUPERVISOR_ENV: f"{path} {process}"}


def _mine() -> tuple[str, str] | None:
    path, _, name = os.environ.get(SUPERVISOR_ENV, "").rpartition(" ")
    return (path, name) if path else None


async def report_to_supervisor(
    state: Callable[[], Pulse],
    on_message: Callable[[FromSupervisor], None] = lambda _: None,
    epoch: int = 0,
    news: asyncio.Event | None = None,
) -> None:
    """Sends a pulse every PULSE_S and whenever `news` is set, until it is cancelled. Passes on what
    `serve` says. Returns if there is no supervisor, or when the supervisor has ended. In the latter
    case the kernel then ends this process.
    """
    mine = _mine()
    if mine is None:
        return
    path, name = mine
    try:
        reader, writer = await asyncio.open_unix_connection(path)
    except OSError as exc:
        log.warning("connection to the supervisor failed", extra={"error": exc.strerror})
        return
    with contextlib.closing(writer):
        writer.write(line(Hello(name, os.getpid(), epoch)))
        wake = asyncio.Event() if news is None else news
        listening = asyncio.create_task(_listen(reader, on_message), name="supervisor's words")
        listening.add_done_callback(lambda _: wake.set())
        try:
            while not listening.done():
                wake.clear()
                writer.write(line(state()))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(PULSE_S):
                        await wake.wait()
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


def report_exit_reason(reason: str) -> None:
    """Tells `serve` why this process is about to end. It needs no event loop, never raises, and
    takes at most a second.
    """
    mine = _mine()
    if mine is None:
        return
    path, name = mine
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as s:
        s.settimeout(LAST_WORDS_S)
        s.connect(path)
        s.sendall(line(Hello(name, os.getpid())) + line(ExitReason(reason[:MAX_REASON])))
