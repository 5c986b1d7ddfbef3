"""Shell. The HTTP server: the table of open connections, its bounds, and their timers."""

from __future__ import annotations

import asyncio
import ssl
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from aiohttp import HttpVersion11, web
from aiohttp.web_protocol import ERROR

from gateway.http.aiohttp_connection import (
    MAX_HEADER_FIELDS,
    MAX_HEADERS_BYTES,
    AiohttpConnection,
    ParserLog,
)
from gateway.http.body_reader import BodyLimits, BodyReader, BoundedRequest
from gateway.http.connection import LINGER_S, Connection, FastPath
from gateway.http.handshake import Handshake
from gateway.http.parser import MAX_ON_LOOP_BYTES

SWEEP_S = 1.0
"""The time between two checks of all connections."""
OpenConnection: TypeAlias = Connection | Handshake


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """`header_timeout_s` bounds the time from a request's first byte to the end of its head, and
    between two pieces of a small body. `idle_timeout_s` bounds the time between two requests.
    """

    idle_timeout_s: float
    header_timeout_s: float = 10.0
    max_connections: int = 8192
    max_per_client: int = 8192


class Server(web.Server):
    """aiohttp's server, with a Connection in front of each of aiohttp's own handlers.

    `fast_path` answers simple POST requests to `paths`. Requests that exceed the body limit go to
    aiohttp, which refuses them properly.
    """

    def __init__(
        self,
        handler: Any,
        *,
        fast_path: FastPath,
        paths: frozenset[str],
        intake: BodyReader,
        limits: ConnectionLimits,
        **settings: Any,
    ) -> None:
        super().__init__(
            _letting_go(handler),
            request_factory=self._to_request,
            keepalive_timeout=limits.idle_timeout_s,
            # BodyReader inflates a body, and only when a handler asks for it
            auto_decompress=False,
            lingering_time=LINGER_S,
            logger=ParserLog(),
            access_log=None,
            max_line_size=MAX_HEADERS_BYTES,
            max_field_size=MAX_HEADERS_BYTES,
            max_headers=MAX_HEADER_FIELDS,
            # Without it aiohttp lets a handler run on after its client has left, and the engine
            # would go on generating.
            handler_cancellation=True,
            **settings,
        )
        self.fast_path, self.paths = fast_path, paths
        self.bodies = intake
        self.configure(intake.limits)
        self.limits = limits
        self._read_request = intake.request_factory(asyncio.get_running_loop())
        self.closing = False
        self.leaving = False
        """The process drains. Requests on open connections are still answered, with
        `Connection: close`.
        """
        # the oldest first
        self.open_connections: dict[OpenConnection, None] = {}
        self._of_client: Counter[str] = Counter()
        self._sweeping = False

    def configure(self, bodies: BodyLimits) -> None:
        """Takes changed body limits."""
        self.bodies.limits = bodies
        self.most_bytes = min(bodies.max_bytes, MAX_ON_LOOP_BYTES)

    # aiohttp's sites and loops ask for a protocol, no more
    def __call__(self) -> Connection:  # type: ignore[override]
        return Connection(self)

    def aiohttp_path(self) -> AiohttpConnection:
        """A new aiohttp handler for one connection."""
        return AiohttpConnection(self, loop=self._loop, **self._kwargs)

    def _to_request(self, message: Any, payload: Any, protocol: Any, *more: Any) -> web.BaseRequest:
        protocol.body, protocol.last = payload, message.should_close
        if message is ERROR:  # an unreadable request is answered in HTTP/1.1
            message = message._replace(version=HttpVersion11)
        if self.leaving:  # the answer then says `Connection: close`
            message = message._replace(should_close=True)
        request: web.BaseRequest = self._read_request(message, payload, protocol, *more)
        return request

    def over_tls(self, context: ssl.SSLContext) -> Callable[[], asyncio.Protocol]:
        """A factory of connections that begin with a TLS handshake."""
        return lambda: Handshake(self, context, self.limits.header_timeout_s)

    def enter(self, connection: OpenConnection) -> bool:
        """Adds a new connection. Returns False if there is no room for it. If all places are taken,
        a waiting connection is closed to make room: the oldest of the client with the most
        connections.
        """
        limits = self.limits
        if self._of_client[connection.client] >= limits.max_per_client:
            return False
        if len(self.open_connections) >= limits.max_connections:
            waiting = [c for c in self.open_connections if c.waits]
            if not waiting:
                return False
            max(waiting, key=lambda c: self._of_client[c.client]).abort()
        self.open_connections[connection] = None
        self._of_client[connection.client] += 1
        if not self._sweeping:
            self._sweep()
        return True

    def leave(self, connection: OpenConnection) -> None:
        """Removes the connection. Calling it again has no further effect."""
        if connection not in self.open_connections:
            return
        del self.open_connections[connection]
        self._of_client[connection.client] -= 1
        if not self._of_client[connection.client]:
            del self._of_client[connection.client]

    def _sweep(self) -> None:
        """Checks all connections with one timer. So each may live up to a second longer than its
        limit.
        """
        loop = asyncio.get_running_loop()
        now = loop.time()
        for connection in [*self.open_connections]:
            connection.close_if_late(now)
        self._sweeping = bool(self.open_connections)
        if self._sweeping:
            every_s = min(SWEEP_S, self.limits.header_timeout_s / 4, self.limits.idle_timeout_s / 4)
            loop.call_at(now + every_s, self._sweep)

    def drain(self) -> None:
        """From now on, each answer is the last one of its connection."""
        self.leaving = True

    def quiet(self, for_s: float) -> bool:
        """Whether no connection has had a request under way within the last `for_s` seconds. A
        client that was about to send its next request has then sent it.
        """
        since = asyncio.get_running_loop().time() - for_s
        return all(connection.quiet_since(since) for connection in self.open_connections)

    def pre_shutdown(self) -> None:
        self.closing = True
        for connection in [*self.open_connections]:
            connection.close_if_idle()
        super().pre_shutdown()

    async def shutdown(self, timeout: float | None = None) -> None:
        await super().shutdown(timeout)
        for connection in [*self.open_connections]:
            connection.abort()


def _letting_go(handler: Any) -> Any:
    """The handler, after which the body of its request no longer counts."""

    async def handle(request: BoundedRequest) -> web.StreamResponse:
        try:
            response: web.StreamResponse = await handler(request)
            return response
        finally:
            request.let_go()

    return handle
