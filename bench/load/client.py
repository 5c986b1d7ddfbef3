"""Shell. A small HTTP/1.1 client that measures. Each request in flight has a connection, which is
kept alive between requests, and every stream is checked to its end.

It is no HTTP library for a reason. The load generator shares its cores with what it measures, and a
general client costs several times as much per streamed token. Per token this one only finds the
chunk, decodes the few fields that count, and notes the time.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from urllib.parse import urlsplit

from bench.load.measure import Meter
from bench.load.reply import LoadReply

MAX_IDLE_S = 2.0
"""Idle connections are not used again after this, well before any usual server (5 s at the least)
closes them: a request that loses the race with the server's close would count as the server's
error.
"""


class _LoadConnection(asyncio.Protocol):
    """One connection; at most one request on it at a time."""

    def __init__(self) -> None:
        self.idle_since_s = 0.0
        self.closed = False
        self._transport: asyncio.Transport | None = None
        self._reply: LoadReply | None = None
        self._ended: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # a stream connection's transport is a Transport
        self._transport = transport  # type: ignore[assignment]

    def send(self, message: bytes, reply: LoadReply) -> asyncio.Future[None]:
        """Writes the request; the future is set when the answer has ended, however it did."""
        assert self._reply is None and self._transport is not None
        self._reply, self._ended = reply, asyncio.get_running_loop().create_future()
        self._transport.write(message)
        return self._ended

    def data_received(self, data: bytes) -> None:
        reply = self._reply
        if reply is None:
            self.abort()  # bytes that nobody asked for: the connection cannot be trusted any more
            return
        reply.feed(data, time.perf_counter())
        if reply.complete or reply.error is not None:
            self._end(reply)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        if self._reply is not None:
            self._end(self._reply)

    def _end(self, reply: LoadReply) -> None:
        # An error status is known before its body, whose message is wanted; any other error ends
        # the answer at once.
        self._reply = None
        reply.close(time.perf_counter())
        if not reply.keep_alive or reply.error in ("bad_http", "too_large"):
            self.abort()
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)

    def abort(self) -> None:
        self.closed = True
        self._reply = None
        if self._transport is not None:
            self._transport.abort()


class LoadClient:
    """Requests to one server. An async context manager: leaving it drops all connections."""

    def __init__(self, url: str, *, timeout_s: float, api_key: str | None = None) -> None:
        """Raises: ValueError if the URL is not an http or https one."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is no http:// or https:// URL")
        self._host, self._tls = (
            parts.hostname,
            ssl.create_default_context() if parts.scheme == "https" else None,
        )
        self._port = parts.port or (443 if self._tls else 80)
        self._root = parts.path.rstrip("/").removesuffix("/v1")
        self._timeout_s = timeout_s
        self._address: str | None = None
        self._idle: list[_LoadConnection] = []
        authorization = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self._common = (
            f"Host: {parts.netloc.rpartition('@')[2]}\r\nUser-Agent: "
            f"loraplex-bench\r\n{authorization}"
        )

    async def __aenter__(self) -> LoadClient:
        return self

    async def __aexit__(self, *exc: object) -> None:
        for connection in self._idle:
            connection.abort()
        self._idle.clear()

    async def get(self, path: str, *, timeout_s: float = 10.0) -> LoadReply:
        """A plain GET; `body` holds the answer. Raises: OSError if the server cannot be reached or
        does not answer in time.
        """
        reply = LoadReply(stream=False, meter=Meter())
        message = f"GET {self._root}{path} HTTP/1.1\r\n{self._common}\r\n".encode()
        async with asyncio.timeout(min(timeout_s, self._timeout_s)):
            connection = await self._connect()
            try:
                await connection.send(message, reply)
            finally:
                connection.abort()
        return reply

    async def post(self, path: str, body: bytes, *, stream: bool, meter: Meter) -> LoadReply:
        """One measured request; never raises for what the server does, the reply's `error` says
        it.
        """
        reply = LoadReply(stream=stream, meter=meter)
        head = (
            f"POST {self._root}{path} HTTP/1.1\r\n{self._common}Content-Type: "
            f"application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        connection: _LoadConnection | None = None
        try:
            async with asyncio.timeout(self._timeout_s):
                connection = self._reuse() or await self._connect()
                await connection.send(head.encode() + body, reply)
        except TimeoutError:
            reply.fail("timeout", f"no end of the answer within {self._timeout_s:g} s")
        except OSError as error:
            reply.fail("connect_failed", str(error))
        finally:
            if not reply.ended_s:
                reply.ended_s = time.perf_counter()
                if connection is not None:
                    connection.abort()
        if connection is not None and not connection.closed:
            connection.idle_since_s = reply.ended_s
            self._idle.append(connection)
        return reply

    def _reuse(self) -> _LoadConnection | None:
        oldest_s = time.perf_counter() - MAX_IDLE_S
        while self._idle:
            connection = self._idle.pop()
            if not connection.closed and connection.idle_since_s >= oldest_s:
                return connection
            connection.abort()
        return None

    async def _connect(self) -> _LoadConnection:
        loop = asyncio.get_running_loop()
        name = self._host if self._tls else None
        if self._address is not None:
            return (
                await loop.create_connection(
                    _LoadConnection, self._address, self._port, ssl=self._tls, server_hostname=name
                )
            )[1]
        # The first connection finds the address that answers; the others skip the resolver, which
        # would cost a thread each.
        transport, connection = await loop.create_connection(
            _LoadConnection, self._host, self._port, ssl=self._tls, server_hostname=name
        )
        self._address = transport.get_extra_info("peername")[0]
        return connection
