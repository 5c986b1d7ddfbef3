"""Shell. A client's connection: plain requests are answered past aiohttp's request machinery,
everything else is handed to aiohttp.

aiohttp makes a task, a request, a payload and a writer for every request and wakes its own task to
read them: more than a third of what a request costs here. A request that `plain.recognise` takes
whole needs none of them: `FastPath` answers it from the callback that brought its bytes. What it
does not take, and every path but those for tokens, goes to an aiohttp `RequestHandler` that this
connection then makes for itself; it serves them as ever.

Rules kept here: one request at a time, in order (bytes that come while one is answered wait, unread
beyond the first piece); a client that leaves cancels its request; an idle connection is closed
after `keepalive_s`, one that does not finish its request likewise; a shutdown lets the request
under way end. A connection goes back from aiohttp to the short way only after requests that were
recognised too, so that nothing of them can still lie in aiohttp's parser.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol, cast

from aiohttp import web

from gateway.http.parser import UNSUPPORTED, IncompleteRequest, RequestStart, SimpleRequest, parse

MAX_EXPRESS_BYTES = 1 << 20
"""Of a request that is gathered here; longer ones are read by aiohttp, which pauses the client and
counts.
"""

SWEEP_SHARE = 0.25
"""Of the time that a connection may rest, between two looks at all of them."""


class PendingAnswer(Protocol):
    """A request that is being answered."""

    def cancel(self) -> None:
        """The client has left. Nothing is written from now on, and `answered` is not called."""
        ...


class FastPath(Protocol):
    """Answers a plain request on the transport and calls `answered(keep_alive)` once the last byte
    is written, never before it returns.

    None: it has done nothing, and the request is aiohttp's.
    """

    def __call__(
        self,
        request: SimpleRequest,
        transport: asyncio.WriteTransport,
        answered: Callable[[bool], None],
    ) -> PendingAnswer | None: ...


class Server(web.Server):
    """aiohttp's server with a Front before each connection.

    Args:
        express: for POST requests to `paths`.
        most_bytes: longer requests are aiohttp's, which knows how to refuse them.
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
        self.most_bytes = min(most_bytes, MAX_EXPRESS_BYTES)
        self.keepalive_s = keepalive_timeout
        self.closing = False
        self.open_connections: set[Connection] = set()
        self._sweeping = False

    def __call__(self) -> Connection:  # type: ignore[override]  # aiohttp's sites and loops ask for a protocol, no more
        return Connection(self)

    def aiohttp_path(self) -> web.RequestHandler:
        """aiohttp's own protocol for a connection."""
        return super().__call__()

    def enter(self, front: Connection) -> None:
        """A connection has come."""
        self.open_connections.add(front)
        if not self._sweeping:
            self._sweep()

    def _sweep(self) -> None:
        """One timer for all open_connections; each lasts up to a quarter longer than it may."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        for front in [*self.open_connections]:
            front.close_if_late(now)
        self._sweeping = bool(self.open_connections)
        if self._sweeping:
            loop.call_at(now + self.keepalive_s * SWEEP_SHARE, self._sweep)

    def pre_shutdown(self) -> None:
        self.closing = True
        for front in [*self.open_connections]:
            front.close_if_idle()
        super().pre_shutdown()

    async def shutdown(self, timeout: float | None = None) -> None:
        await super().shutdown(timeout)
        for front in [*self.open_connections]:
            front.abort()


class Connection(asyncio.Protocol):
    """One connection. `_inner` is aiohttp's side of it, once it was needed."""

    __slots__ = (
        "_call",
        "_close_at",
        "_head",
        "_held",
        "_http_server",
        "_inner",
        "_loop",
        "_needed",
        "_stays",
        "_transport",
    )

    def __init__(self, http_server: Server) -> None:
        self._http_server = http_server
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._call: PendingAnswer | None = None
        self._inner: web.RequestHandler | None = None
        self._stays = False  # aiohttp's for good: nobody knows where its parser stands
        self._head: RequestStart | None = None  # of the last request
        self._held = bytearray()  # the beginning of a request, or what came while one was answered
        self._needed = 0
        self._close_at = 0.0

    # ---- asyncio's side --------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._rest()
        self._http_server.enter(self)

    def data_received(self, data: bytes) -> None:
        inner = self._inner
        if inner is not None:
            if self._stays or not _is_idle(inner):
                self._stays = True
                inner.data_received(data)
                return
            self._retire(inner)
        if self._call is not None:
            self._held += data
            assert self._transport is not None
            self._transport.pause_reading()
            return
        if self._held:
            self._held += data
            if len(self._held) < self._needed:
                return
            data = bytes(self._held)
            self._held.clear()
        self._take(data)

    def pause_writing(self) -> None:
        if self._inner is not None:
            self._inner.pause_writing()

    def resume_writing(self) -> None:
        if self._inner is not None:
            self._inner.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._http_server.open_connections.discard(self)
        self._transport = None
        if self._call is not None:
            self._call.cancel()
            self._call = None
        if self._inner is not None:
            self._inner.connection_lost(exc)
            self._inner = None

    # ---- requests --------------------------------------------------------------------------------

    def _take(self, data: bytes) -> None:
        """All that the connection has brought since its last request."""
        http_server, first, self._needed = self._http_server, not self._needed, 0
        found = parse(data, http_server.most_bytes, self._head)
        if type(found) is SimpleRequest:
            self._head = found.head
            if found.method == "POST" and found.path in http_server.paths:
                assert self._transport is not None
                self._call = http_server.fast_path(found, self._transport, self._answered)
                if self._call is not None:
                    return
            self._hand_over(data, stays=False)
        elif found is UNSUPPORTED:
            self._hand_over(data, stays=True)
        else:
            assert type(found) is IncompleteRequest
            if first:
                self._rest()  # it has so long from its first byte on
            self._held += data
            self._needed = found.needed or len(data) + 1

    def _answered(self, keep_alive: bool) -> None:
        self._call = None
        transport = self._transport
        if transport is None:
            return
        if not keep_alive or self._http_server.closing:
            transport.close()
            return
        self._rest()
        if self._held:
            data = bytes(self._held)
            self._held.clear()
            transport.resume_reading()
            self._take(data)

    def _hand_over(self, data: bytes, *, stays: bool) -> None:
        self._stays = stays
        inner = self._inner = self._http_server.aiohttp_path()
        assert self._transport is not None
        inner.connection_made(self._transport)
        inner.data_received(data)

    def _retire(self, inner: web.RequestHandler) -> None:
        """It has answered all that it was given; to it the connection is over."""
        self._inner = None
        inner.transport = None  # it would close it
        inner.connection_lost(None)
        self._rest()

    # ---- the connection's end --------------------------------------------------------------------

    def _rest(self) -> None:
        self._close_at = self._loop.time() + self._http_server.keepalive_s

    def close_if_late(self, now: float) -> None:
        """It has rested, or been at one request, for too long. While aiohttp has it, it has a timer
        of its own.
        """
        if now >= self._close_at:
            self.close_if_idle()

    def close_if_idle(self) -> None:
        if self._call is None and self._inner is None and self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()


def _is_idle(handler: web.RequestHandler) -> bool:
    """Waits for its next request. aiohttp has no public word for it; without this one a connection
    stays with it, which costs time only.
    """
    waiter = getattr(handler, "_waiter", None)
    return waiter is not None and not waiter.done()
