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
import logging
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from gateway.http.intake import MIN_BYTES_PER_S, BodyIntake
from gateway.http.parser import (
    MAX_ON_LOOP_BYTES,
    UNSUPPORTED,
    IncompleteRequest,
    RequestHead,
    SimpleRequest,
    parse,
)
from shared.runtime.log import place_of

log = logging.getLogger("loraplex.http")

MAX_GATHERED_BYTES = 64 << 10
"""Of a request that is gathered here before anybody has looked at its key. Longer ones, unless they
come in one piece, are read by aiohttp, which pauses the client until somebody asks for the body.
"""
MAX_HEADERS_BYTES = 64 << 10
"""Of a request's head that aiohttp reads: eight times what it takes in a line."""
SWEEP_S = 1.0
"""Between two looks at all connections."""
LINGER_S = 5.0
"""For the rest of a body that was refused: a client that still sends would not read the answer."""
TOO_SLOW = b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """`header_timeout_s`: from a request's first byte to the end of its head, and between two
    pieces of a small body; `idle_timeout_s`: between two requests.
    """

    idle_timeout_s: float
    header_timeout_s: float = 10.0
    max_connections: int = 8192
    max_per_client: int = 8192


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
    """aiohttp's server with a Connection before each of its own.

    Args:
        fast_path: for POST requests to `paths`.
        most_bytes: longer requests are aiohttp's, which knows how to refuse them.
    """

    def __init__(
        self,
        handler: Any,
        *,
        fast_path: FastPath,
        paths: frozenset[str],
        intake: BodyIntake,
        limits: ConnectionLimits,
        **settings: Any,
    ) -> None:
        super().__init__(
            handler,
            request_factory=self._to_request,
            keepalive_timeout=limits.idle_timeout_s,
            # inflated by whoever asks for the body, not by whoever sends it
            auto_decompress=False,
            lingering_time=LINGER_S,
            logger=_ParserLog(),
            access_log=None,
            # Without it aiohttp lets a handler run on after its client has left, and the engine
            # would go on generating.
            handler_cancellation=True,
            **settings,
        )
        self.fast_path, self.paths = fast_path, paths
        self.most_bytes = min(intake.limits.max_bytes, MAX_ON_LOOP_BYTES)
        self.limits = limits
        self._read_request = intake.request_factory(asyncio.get_running_loop())
        self.closing = False
        self.leaving = False
        """The process drains: what is asked on an open connection is still answered, with
        `Connection: close`.
        """
        # oldest first
        self.open_connections: dict[Connection, None] = {}
        self._of_client: Counter[str] = Counter()
        self._sweeping = False

    def __call__(self) -> Connection:  # type: ignore[override]  # aiohttp's sites and loops ask for a protocol, no more
        return Connection(self)

    def aiohttp_path(self) -> web.RequestHandler:
        """aiohttp's own protocol for a connection."""
        return super().__call__()

    def _to_request(self, message: Any, *more: Any) -> web.BaseRequest:
        if self.leaving:  # the answer then says `Connection: close`
            message = message._replace(should_close=True)
        request: web.BaseRequest = self._read_request(message, *more)
        return request

    def enter(self, connection: Connection) -> bool:
        """A connection has come. False: there is no room for it. Where all places are taken, one
        that waits makes room: of the client with the most connections the oldest.
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

    def leave(self, connection: Connection) -> None:
        """Idempotent."""
        if connection not in self.open_connections:
            return
        del self.open_connections[connection]
        self._of_client[connection.client] -= 1
        if not self._of_client[connection.client]:
            del self._of_client[connection.client]

    def _sweep(self) -> None:
        """One timer for all connections; each lasts up to a second longer than it may."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        for connection in [*self.open_connections]:
            connection.close_if_late(now)
        self._sweeping = bool(self.open_connections)
        if self._sweeping:
            every_s = min(SWEEP_S, self.limits.header_timeout_s / 4, self.limits.idle_timeout_s / 4)
            loop.call_at(now + every_s, self._sweep)

    def drain(self) -> None:
        """From now on each answer is the last one of its connection."""
        self.leaving = True

    def quiet(self, for_s: float) -> bool:
        """No connection is at a request, or has been within the last `for_s`. Its client, if it is
        about to send the next one, will have sent it by then.
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


class _ParserLog(logging.LoggerAdapter[logging.Logger]):
    """aiohttp's log. What a malformed request makes its parser say quotes the request, which may
    hold a key or a prompt, and anybody can send one: such a line names the kind of error alone, and
    is there when debugging. Anything else is a fault of ours.
    """

    def __init__(self) -> None:
        super().__init__(log, {})

    def debug(self, msg: object, *args: object, **kwargs: Any) -> None:
        return None

    def exception(self, msg: object, *args: object, **kwargs: Any) -> None:
        exc = kwargs.get("exc_info")
        if isinstance(exc, HttpProcessingError):
            log.debug("malformed request", extra={"kind": type(exc).__name__})
        elif isinstance(exc, BaseException):
            log.error("a connection failed", extra={"at": place_of(exc)})


class Connection(asyncio.Protocol):
    """One connection. `_aiohttp` is aiohttp's side of it, once it was needed."""

    __slots__ = (
        "_aiohttp",
        "_aiohttp_for_good",
        "_close_at",
        "_give_up_at",
        "_head_bytes",
        "_http_server",
        "_last_head",
        "_loop",
        "_needed",
        "_pending",
        "_rested_at",
        "_transport",
        "_unread",
        "client",
    )

    def __init__(self, http_server: Server) -> None:
        self._http_server = http_server
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._pending: PendingAnswer | None = None
        self._aiohttp: web.RequestHandler | None = None
        self._aiohttp_for_good = False  # aiohttp's for good: nobody knows where its parser stands
        self._last_head: RequestHead | None = None  # of the last request
        self._unread = (
            bytearray()
        )  # the beginning of a request, or what came while one was answered
        self._needed = 0
        self._head_bytes = 0  # of a head that aiohttp has not seen the end of
        self._close_at = self._give_up_at = math.inf
        self._rested_at = self._loop.time()
        self.client = ""

    # ---- asyncio's side --------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("peername")
        self.client = peer[0] if isinstance(peer, tuple) else ""
        if not self._http_server.enter(self):
            self._transport.abort()
            return
        self._close_at = self._loop.time() + self._http_server.limits.header_timeout_s

    def data_received(self, data: bytes) -> None:
        inner = self._aiohttp
        if inner is not None:
            if self._aiohttp_for_good or not _is_idle(inner):
                self._aiohttp_for_good = True
                self._feed(inner, data)
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
                self._expect_more()
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
        self._http_server.leave(self)
        self._transport = None
        if self._pending is not None:
            self._pending.cancel()
            self._pending = None
        if self._aiohttp is not None:
            self._aiohttp.connection_lost(exc)
            self._aiohttp = None

    # ---- requests --------------------------------------------------------------------------------

    def _parse(self, data: bytes) -> None:
        """All that the connection has brought since its last request."""
        http_server, first, self._needed = self._http_server, not self._needed, 0
        found = parse(data, http_server.most_bytes, self._last_head)
        if type(found) is SimpleRequest:
            self._last_head = found.head
            short = found.method == "POST" and not http_server.leaving
            if short and found.path in http_server.paths:
                assert self._transport is not None
                self._pending = http_server.fast_path(found, self._transport, self._answered)
                if self._pending is not None:
                    return
            self._hand_over(data, for_good=False)
        elif found is UNSUPPORTED:
            self._hand_over(data, for_good=True)
        elif type(found) is IncompleteRequest and found.needed > MAX_GATHERED_BYTES:
            self._hand_over(data, for_good=False)
        else:
            assert type(found) is IncompleteRequest
            if first:  # it has so long from its first byte on
                longest_s = MAX_GATHERED_BYTES / MIN_BYTES_PER_S if found.needed else 0.0
                header_s = http_server.limits.header_timeout_s
                self._give_up_at = self._loop.time() + header_s + longest_s
            self._unread += data
            self._needed = found.needed or len(data) + 1
            self._expect_more()

    def _answered(self, keep_alive: bool) -> None:
        self._pending = None
        transport = self._transport
        if transport is None:
            return
        self._restart_timer()
        if not keep_alive or self._http_server.closing:
            transport.close()
            return
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
        self._head_bytes = 0
        self._feed(inner, data, waits=True)

    def _feed(self, inner: web.RequestHandler, data: bytes, waits: bool = False) -> None:
        """`waits`: it has no request yet. It has no bound for a head in time or in all, so that
        bound is here.
        """
        waits = waits or bool(self._head_bytes) or _is_idle(inner)
        inner.data_received(data)
        if not waits:
            return
        if getattr(inner, "_messages", True):
            self._head_bytes, self._close_at = 0, math.inf
            return
        if not self._head_bytes:
            self._close_at = self._loop.time() + self._http_server.limits.header_timeout_s
        self._head_bytes += len(data)
        if self._head_bytes > MAX_HEADERS_BYTES:
            self.abort()

    def _retire(self, inner: web.RequestHandler) -> None:
        """It has answered all that it was given; to it the connection is over."""
        self._aiohttp = None
        inner.transport = None  # it would close it
        inner.connection_lost(None)
        self._restart_timer()

    # ---- the connection's end --------------------------------------------------------------------

    @property
    def waits(self) -> bool:
        """For a request, or for the rest of one."""
        return self._pending is None and (self._aiohttp is None or _is_idle(self._aiohttp))

    def _restart_timer(self) -> None:
        self._rested_at = self._loop.time()
        self._close_at = self._loop.time() + self._http_server.limits.idle_timeout_s

    def _expect_more(self) -> None:
        """The next piece of a request must come soon, and the whole of it in time."""
        soon = self._loop.time() + self._http_server.limits.header_timeout_s
        self._close_at = min(soon, self._give_up_at)

    def close_if_late(self, now: float) -> None:
        """It has rested, or been at one request, for too long. While aiohttp has a request of it,
        there are other bounds.
        """
        transport = self._transport
        if transport is None or self._pending is not None:
            return
        if self._close_at == math.inf and transport.is_closing():
            self._restart_timer()  # closed by aiohttp; what it has written may still be on its way
        if now < self._close_at:
            return
        if transport.get_write_buffer_size():
            transport.abort()  # it does not read, so it would never close
            return
        if self._unread or self._head_bytes:
            transport.write(TOO_SLOW)
        transport.close()

    def close_if_idle(self) -> None:
        if self._pending is None and self._aiohttp is None and self._transport is not None:
            self._transport.close()

    def quiet_since(self, when: float) -> bool:
        idle = self._pending is None and not self._unread
        if self._aiohttp is not None:
            idle = idle and _is_idle(self._aiohttp)
        return idle and self._rested_at <= when

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()


def _is_idle(handler: web.RequestHandler) -> bool:
    """Waits for its next request. aiohttp has no public word for it; without this one a connection
    stays with it, which costs time only.
    """
    waiter = getattr(handler, "_waiter", None)
    return waiter is not None and not waiter.done()
