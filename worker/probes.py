"""Shell. A small HTTP port for whoever starts workers. It tells whether this worker lives and
serves. `python3 -m worker.probes PORT` drains the worker of the same host and waits for its end.

    /live      200 while this process answers
    /started   200 once the engine has started
    /ready     200 while the worker takes requests
    /drain     asks the worker to drain, and answers with its process id; from loopback alone
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import select
import sys
from collections.abc import AsyncIterator, Callable
from typing import NamedTuple

from shared.errors import ConfigError

HEAD_S = 5.0
"""Longest time for a request to come in. A probe of Kubernetes gives up after one second by
default.
"""
MAX_HEAD_BYTES = 8192
BAD_HEAD = (asyncio.IncompleteReadError, asyncio.LimitOverrunError)
LOOPBACK = "127.0.0.1"


class ProbedState(NamedTuple):
    """What a probe is told. `reason` says why the worker is not ready."""

    started: bool
    ready: bool
    reason: str = ""


@contextlib.asynccontextmanager
async def open_probes(
    port: int | None, state: Callable[[], ProbedState], drain: Callable[[], None]
) -> AsyncIterator[int]:
    """Answers probes while inside. Yields the port; 0 if none is wanted. Raises ConfigError if the
    port is taken.
    """
    if port is None:
        yield 0
        return

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, TimeoutError, *BAD_HEAD):
            async with asyncio.timeout(HEAD_S):
                head = await reader.readuntil(b"\r\n\r\n")
            local = writer.get_extra_info("peername")[0] == LOOPBACK
            status, text = _answer(_path(head), local, state, drain)
            body = f"{text}\n".encode()
            writer.write(
                f"HTTP/1.1 {status}\r\nContent-Type: text/plain; charset=utf-8\r\n"
                f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
                + body
            )
            await writer.drain()
        writer.close()

    try:
        server = await asyncio.start_server(answer, "0.0.0.0", port, limit=MAX_HEAD_BYTES)
    except OSError as exc:
        raise ConfigError(f"--probe-port {port}: cannot listen on it: {exc.strerror}") from exc
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


def _path(head: bytes) -> str:
    """The path of a GET; "" for any other request."""
    words = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ")
    return words[1].partition("?")[0] if len(words) == 3 and words[0] == "GET" else ""


def _answer(
    path: str,
    local: bool,
    state: Callable[[], ProbedState],
    drain: Callable[[], None],
) -> tuple[str, str]:
    now = state()
    good = {"/live": True, "/started": now.started, "/ready": now.ready}.get(path)
    if good is not None:
        return ("200 OK", "ok") if good else ("503 Service Unavailable", now.reason or "not yet")
    if path == "/drain" and local:
        drain()
        return "200 OK", str(os.getpid())
    return "404 Not Found", "expected GET /live, /started or /ready"


def main(argv: list[str]) -> int:
    """Drains the worker and waits for its end. It sets no bound: whoever stops the worker has one
    (terminationGracePeriodSeconds).
    """
    connection = http.client.HTTPConnection(LOOPBACK, int(argv[0]))
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        connection.request("GET", "/drain")
        answer = connection.getresponse()
        if answer.status != http.HTTPStatus.OK:
            return 1
        _until_it_ends(int(answer.read()))
    return 0  # or it had ended already, which is what was asked for


def _until_it_ends(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError), open(os.pidfd_open(pid)) as process:
        select.select([process], [], [])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
