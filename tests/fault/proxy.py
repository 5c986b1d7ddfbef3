"""Shell. A TCP proxy in front of an HTTP server. It does to chosen requests what networks and
stores do on bad days.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

PIECE_BYTES = 16 * 1024


@dataclass(frozen=True)
class Request:
    """One request. `path` is unquoted and without its query. `range` is the Range header or "".
    `number` counts the requests for this path from 0.
    """

    method: str
    path: str
    range: str
    number: int
    query: str = ""


@dataclass(frozen=True)
class Fault:
    """What happens to one request. `latency_s`: time before the answer begins. `status`: sent
    instead of the server's answer. `cut_after`: the connection breaks after so many bytes of the
    body. `bytes_per_s`: the highest rate. `stuck`: no answer comes, and the connection stays open.
    """

    latency_s: float = 0.0
    status: int = 0
    cut_after: int | None = None
    bytes_per_s: float = 0.0
    stuck: bool = False


Rule = Callable[[Request], Fault | None]


@dataclass
class FaultProxy:
    """The proxy. `rule` may be replaced at any time. `seen` are the requests in order of
    arrival.
    """

    upstream: str
    rule: Rule = lambda _: None
    seen: list[Request] = field(default_factory=list)
    url: str = ""
    most_at_once: int = 0
    _open: int = 0
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def files(self) -> list[Request]:
        """The requests for files' bytes: not for listings, nor for metadata (GCS's `alt=json`)."""
        wanted = (".json", ".safetensors")
        return [
            r
            for r in self.seen
            if r.method == "GET" and r.path.endswith(wanted) and "alt=json" not in r.query
        ]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, one request: the answer ends it."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._open += 1
        self.most_at_once = max(self.most_at_once, self._open)
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            request = self._parsed(head)
            self.seen.append(request)
            await self._answer(request, head, writer, self.rule(request) or Fault())
        except (OSError, asyncio.IncompleteReadError):
            pass  # either side left
        finally:
            self._open -= 1
            self._tasks.discard(task)
            writer.close()

    async def _answer(
        self, request: Request, head: bytes, writer: asyncio.StreamWriter, fault: Fault
    ) -> None:
        if fault.stuck:
            await asyncio.Event().wait()
        await asyncio.sleep(fault.latency_s)
        if fault.status:
            writer.write(
                f"HTTP/1.1 {fault.status} No\r\nContent-Length: 0\r\nConnection: "
                "close\r\n\r\n".encode()
            )
            await writer.drain()
            return
        parts = urlsplit(self.upstream)
        source, sink = await asyncio.open_connection(parts.hostname, parts.port)
        try:
            lines = [
                line
                for line in head.split(b"\r\n")
                if line and not line.lower().startswith((b"connection:", b"expect:"))
            ]
            sink.write(b"\r\n".join([*lines, b"Connection: close", b"", b""]))
            await self._pour(source, writer, fault)
        finally:
            sink.close()

    @staticmethod
    async def _pour(
        source: asyncio.StreamReader, writer: asyncio.StreamWriter, fault: Fault
    ) -> None:
        writer.write(await source.readuntil(b"\r\n\r\n"))
        left = fault.cut_after
        while piece := await source.read(PIECE_BYTES if left is None else min(PIECE_BYTES, left)):
            writer.write(piece)
            await writer.drain()
            if fault.bytes_per_s:
                await asyncio.sleep(len(piece) / fault.bytes_per_s)
            if left is not None:
                left -= len(piece)
                if left <= 0:
                    return

    def _parsed(self, head: bytes) -> Request:
        first, *lines = head.decode("latin-1").split("\r\n")
        method, target, _ = first.split(" ", 2)
        path = unquote(urlsplit(target).path)
        wanted = next(
            (line.partition(":")[2].strip() for line in lines if line.lower().startswith("range:")),
            "",
        )
        number = sum(1 for r in self.seen if r.path == path and r.method == method)
        return Request(method, path, wanted, number, urlsplit(target).query)

    def drop_all(self) -> None:
        for task in list(self._tasks):
            task.cancel()


@asynccontextmanager
async def fault_proxy(upstream: str) -> AsyncIterator[FaultProxy]:
    """A proxy in front of `upstream` (http://host:port), on a free port of loopback."""
    proxy = FaultProxy(upstream)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()[:2]
    proxy.url = f"http://{host}:{port}"
    try:
        yield proxy
    finally:
        server.close()
        proxy.drop_all()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2):
                await server.wait_closed()
