"""Shell. A client's connection. Simple requests are answered without aiohttp's request machinery;
all other requests go to aiohttp.

For each request aiohttp makes a task, a request, a payload and a writer, and wakes its own task to
read them. This is more than a third of what a request costs at the gateway. A request that
`parser.parse` takes as a whole needs none of them: `FastPath` answers it from the callback that
brought its bytes. For all other bytes and for other paths the connection makes an aiohttp
`RequestHandler`, which serves them as in any aiohttp server.

Rules of this module:

- Requests of one connection are answered one at a time and in order. While one is answered, later
  bytes wait; after the first piece the connection is not read.
- A client that leaves cancels its request.
- A connection that is idle, or does not finish its request, is closed after `keepalive_s`.
- A shutdown lets the running request end.
- A connection goes back from aiohttp to the fast path only if `parser.parse` took all requests
  since then as wholes. Otherwise some of their bytes could still lie in aiohttp's parser.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol, cast

from aiohttp import web

from gateway.http.parser import UNSUPPORTED, IncompleteRequest, RequestHead, SimpleRequest, parse

MAX_FAST_PATH_BYTES = 1 << 20
"""The largest request that is gathered here. Longer ones are read by aiohttp, which counts their
bytes and pauses the client.
"""

SWEEP_SHARE = 0.25
"""Time between two looks at all connections, as a share of the time that a connection may be idle.
"""


class PendingAnswer(Protocol):
    """The answer to a request, while it is being written."""

    def cancel(self) -> None:
        """The client has left. From now on nothing is written, and `answered` is not called."""
        ...


class FastPath(Protocol):
    """Answers a simple request on the transport. It calls `answered(keep_alive)` after the last
    byte was written, and never before it returns.

    It returns None if it has done nothing; aiohttp then answers the request.
    """

    def __call__(
        self,
        request: SimpleRequest,
        transport: asyncio.WriteTransport,
        answered: Callable[[bool], None],
    ) -> PendingAnswer | None: ...


class Server(web.Server):
    """aiohttp's server with a `Connection` in front of each of aiohttp's handlers.

    Args:
        fast_path: answers POST requests to `paths`.
        most_bytes: longer requests go to aiohttp, which knows how to refuse them.
    """

    def __init__(
        self,
        handler: Any,
        *,
        fast_path: FastPath,
        paths: frozenset[str],
        most_bytes: int,
        keepalive_timeout: float,
        **settings: Any,
    ) -> None:
        super().__init__(handler, keepalive_timeout=keepalive_timeout, **settings)
        self.fast_path, self.paths = fast_path, paths
        self.most_bytes = min(most_bytes, MAX_FAST_PATH_BYTES)
        self.keepalive_s = keepalive_timeout
        self.closing = False
        self.open_connections: set[Connection] = set()
        self._sweeping = False

    def __call__(self) -> Connection:  # type: ignore[override]  # aiohttp's sites and loops ask for a protocol, no more
        return Connection(self)

    def aiohttp_path(self) -> web.RequestHandler:
        """A new handler of aiohttp, for one connection."""
        return super().__call__()

    def enter(self, connection: Connection) -> None:
        """A client has connected."""
        self.open_connections.add(connection)
        if not self._sweeping:
            self._sweep()

    def _sweep(self) -> None:
        """Closes connections that are late. One timer serves all of them, so a connection may last
        a quarter longer than `keepalive_s`.
        """
        loop = asyncio.get_running_loop()
        now = loop.time()
        for connection in [*self.open_connections]:
            connection.close_if_late(now)
        self._sweeping = bool(self.open_connections)
        if self._sweeping:
            loop.call_at(now + self.keepalive_s * SWEEP_SHARE, self._sweep)

    def pre_shutdown(self) -> None:
        self.closing = True
        for connection in [*self.open_connections]:
            connection.close_if_idle()
        super().pre_shutdown()

    async def shutdown(self, timeout: float | None = None) -> None:
        await super().shutdown(timeout)
        for connection in [*self.open_connections]:
            connection.abort()


class Connection(asyncio.Protocol):
    """One client connection. `_aiohttp` is aiohttp's handler for it, once one was needed."""

    __slots__ = (
        "_aiohttp",
        "_aiohttp_for_good",
        "_close_at",
        "_http_server",
        "_last_head",
        "_loop",
        "_needed",
        "_pending",
        "_transport",
        "_unread",
    )

    def __init__(self, http_server: Server) -> None:
        self._http_server = http_server
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._pending: PendingAnswer | None = None
        self._aiohttp: web.RequestHandler | None = None
        # True: aiohttp keeps the connection, because the state of its parser is unknown
        self._aiohttp_for_good = False
        self._last_head: RequestHead | None = None
        # the beginning of a request, or bytes that came while a request was answered
        self._unread = bytearray()
        self._needed = 0
        self._close_at = 0.0

    # ---- asyncio's side --------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._restart_timer()
        self._http_server.enter(self)

    def data_received(self, data: bytes) -> None:
        inner = self._aiohttp
        if inner is not None:
            if self._aiohttp_for_good or not _is_idle(inner):
                self._aiohttp_for_good = True
                inner.data_received(data)
                return
            self._retire(inner)
        if self._pending is not None:
            self._unread += data
            assert self._transport is not None
            self._transport.pause_reading()
            return
        if self._unread:
            self._unread += data
            if len(self._unread) < self._needed:
                return
            data = bytes(self._unread)
            self._unread.clear()
        self._parse(data)

    def pause_writing(self) -> None:
        if self._aiohttp is not None:
            self._aiohttp.pause_writing()

    def resume_writing(self) -> None:
        if self._aiohttp is not None:
            self._aiohttp.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._http_server.open_connections.discard(self)
        self._transport = None
        if self._pending is not None:
            self._pending.cancel()
            self._pending = None
        if self._aiohttp is not None:
            self._aiohttp.connection_lost(exc)
            self._aiohttp = None

    # ---- requests --------------------------------------------------------------------------------

    def _parse(self, data: bytes) -> None:
        """Handles all bytes that the connection has brought since its last request."""
        http_server, first, self._needed = self._http_server, not self._needed, 0
        found = parse(data, http_server.most_bytes, self._last_head)
        if type(found) is SimpleRequest:
            self._last_head = found.head
            if found.method == "POST" and found.path in http_server.paths:
                assert self._transport is not None
                self._pending = http_server.fast_path(found, self._transport, self._answered)
                if self._pending is not None:
                    return
            self._hand_over(data, for_good=False)
        elif found is UNSUPPORTED:
            self._hand_over(data, for_good=True)
        else:
            assert type(found) is IncompleteRequest
            if first:
                self._restart_timer()  # the time for a request counts from its first byte
            self._unread += data
            self._needed = found.needed or len(data) + 1

    def _answered(self, keep_alive: bool) -> None:
        self._pending = None
        transport = self._transport
        if transport is None:
            return
        if not keep_alive or self._http_server.closing:
            transport.close()
            return
        self._restart_timer()
        if self._unread:
            data = bytes(self._unread)
            self._unread.clear()
            transport.resume_reading()
            self._parse(data)

    def _hand_over(self, data: bytes, *, for_good: bool) -> None:
        self._aiohttp_for_good = for_good
        inner = self._aiohttp = self._http_server.aiohttp_path()
        assert self._transport is not None
        inner.connection_made(self._transport)
        inner.data_received(data)

    def _retire(self, inner: web.RequestHandler) -> None:
        """aiohttp's handler has answered all its requests. For the handler, the connection ends
        here.
        """
        self._aiohttp = None
        inner.transport = None  # it would close it
        inner.connection_lost(None)
        self._restart_timer()

    # ---- the connection's end --------------------------------------------------------------------

    def _restart_timer(self) -> None:
        self._close_at = self._loop.time() + self._http_server.keepalive_s

    def close_if_late(self, now: float) -> None:
        """Closes the connection if it was idle, or busy with reading one request, for too long.
        aiohttp has its own timer for the connections that it serves.
        """
        if now >= self._close_at:
            self.close_if_idle()

    def close_if_idle(self) -> None:
        if self._pending is None and self._aiohttp is None and self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()


def _is_idle(handler: web.RequestHandler) -> bool:
    """Whether aiohttp's handler waits for its next request. aiohttp has no public attribute for
    this. If the private one disappears, connections stay with aiohttp, which costs time only.
    """
    waiter = getattr(handler, "_waiter", None)
    return waiter is not None and not waiter.done()
