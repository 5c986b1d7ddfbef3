"""Shell. A TCP proxy between workers and a gateway that resets, stalls, delays and swallows what
goes by their control and data connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import struct
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

PIECE_BYTES = 64 * 1024
ARRIVES_S = 0.002
"""What was written last arrives before the connection is reset."""
CONTROL, DATA = "control", "data"
UP, DOWN = "up", "down"  # from the worker to the gateway, and back


class LinkProxy:
    """Workers that join by `control` are told of the proxy's data port instead of the gateway's: it
    stands in the Welcome, and has as many digits.
    """

    def __init__(self, control_port: int, data_port: int) -> None:
        self.ports = {CONTROL: control_port, DATA: data_port}
        self.mine: dict[str, int] = {}
        self.delay_s: dict[tuple[str, str], float] = {}
        self.bytes_per_s: dict[tuple[str, str], float] = {}
        self.stalled: set[tuple[str, str]] = set()
        self.swallow_bytes: dict[tuple[str, str], int] = {}
        self.cut_after_bytes: dict[tuple[str, str], int] = {}
        """A connection is reset once so many more bytes have passed, in the middle of whatever they
        are.
        """
        self.dies_after_bytes: dict[tuple[str, str], int] = {}
        """The next connection carries so many bytes and then nothing more, while it stays open."""
        self.refuses = False
        self._moves = asyncio.Event()
        self._pairs: set[tuple[str, asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._servers: list[asyncio.Server] = []

    @property
    def control(self) -> str:
        return f"tcp://127.0.0.1:{self.mine[CONTROL]}"

    async def open(self) -> None:
        for kind in (CONTROL, DATA):
            self._servers.append(await self._listen(kind))

    def close(self) -> None:
        for server in self._servers:
            server.close()
        for task in self._tasks:
            task.cancel()
        self.reset(CONTROL, DATA)

    def reset(self, *kinds: str) -> int:
        """Resets the open connections, as a firewall does. New connections are let through."""
        hit = [pair for pair in self._pairs if pair[0] in kinds]
        for _, one, other in hit:
            _reset(one)
            _reset(other)
        return len(hit)

    def stall(self, kinds: Iterable[str], ways: Iterable[str] = (UP, DOWN)) -> None:
        """Nothing passes, while the connections stay open and new ones are taken."""
        self.stalled |= {(kind, way) for kind in kinds for way in ways}

    def flow(self) -> None:
        self.stalled.clear()
        self._moves.set()

    async def _listen(self, kind: str) -> asyncio.Server:
        digits = len(str(self.ports[kind]))
        for _ in range(1000):
            server = await asyncio.start_server(
                lambda reader, writer: self._take(kind, reader, writer), "127.0.0.1", 0
            )
            port = server.sockets[0].getsockname()[1]
            if len(str(port)) == digits:
                self.mine[kind] = port
                return server
            server.close()
        raise AssertionError(f"no free port of {digits} digits")

    def _take(self, kind: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._carry(kind, reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _carry(
        self, kind: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if self.refuses:
            _reset(writer)
            return
        far_reader, far = await asyncio.open_connection("127.0.0.1", self.ports[kind])
        pair = (kind, writer, far)
        self._pairs.add(pair)
        try:
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(self._pump(kind, UP, reader, far))
                pumps.create_task(self._pump(kind, DOWN, far_reader, writer))
        except* (OSError, EOFError):
            pass
        finally:
            self._pairs.discard(pair)
            _reset(writer)
            _reset(far)

    async def _pump(
        self, kind: str, way: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """What is read waits for its time in a queue, so that a delay does not slow the flow."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        lives_for = self.dies_after_bytes.pop((kind, way), None)

        async def read() -> None:
            while data := await reader.read(PIECE_BYTES):
                queue.put_nowait((loop.time() + self.delay_s.get((kind, way), 0.0), data))
            queue.put_nowait((0.0, b""))

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(read())
            while True:
                due, data = await queue.get()
                if not data:
                    raise EOFError
                slowly_s = len(data) / self.bytes_per_s.get((kind, way), math.inf)
                await asyncio.sleep(max(0.0, due - loop.time()) + slowly_s)
                while (kind, way) in self.stalled:
                    self._moves.clear()
                    await self._moves.wait()
                swallow = self.swallow_bytes.pop((kind, way), 0)
                if (kind, way) == (CONTROL, DOWN):
                    data = data.replace(
                        b"tcp://127.0.0.1:%d" % self.ports[DATA],
                        b"tcp://127.0.0.1:%d" % self.mine[DATA],
                    )
                if lives_for is not None:
                    data = data[:lives_for]
                    lives_for -= len(data)
                left = self._left(kind, way, len(data))
                writer.write(data[swallow:left])
                await writer.drain()
                if left is not None:
                    await asyncio.sleep(ARRIVES_S)
                    raise EOFError

    def _left(self, kind: str, way: str, size_bytes: int) -> int | None:
        """How many of so many bytes pass before the connection is to be reset. None: all, and it
        stays.
        """
        left = self.cut_after_bytes.get((kind, way))
        if left is None:
            return None
        if left > size_bytes:
            self.cut_after_bytes[kind, way] = left - size_bytes
            return None
        del self.cut_after_bytes[kind, way]
        return left


def _reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    with contextlib.suppress(OSError, AttributeError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@asynccontextmanager
async def link_proxy(control_port: int, data_port: int) -> AsyncIterator[LinkProxy]:
    proxy = LinkProxy(control_port, data_port)
    await proxy.open()
    try:
        yield proxy
    finally:
        proxy.close()
