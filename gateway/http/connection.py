"""Shell. One client connection. Simple requests are answered directly; all others go to aiohttp.

For every request aiohttp makes a task, a request object, a payload and a writer, and wakes its own
task. That is more than a third of the cost of a request here. A request that `parser.parse`
recognises as simple needs none of it: `FastPath` answers it from the callback that brought its
bytes. All other requests, and all paths that generate no tokens, go to an aiohttp `RequestHandler`
that the connection makes for itself.

Rules of this module:

- Requests are answered one at a time, in order. Bytes that arrive meanwhile wait. After the second
  piece, reading pauses. No request is begun while its client does not read the answers so far.
- If the client leaves, its request is cancelled.
- An idle connection is closed after `idle_timeout_s`. A request that does not arrive completely in
  time is closed, too.
- A shutdown lets the current request finish.
- After its last answer a connection is closed for writing first, and for reading by its client.
- A connection returns from aiohttp to the fast path only if aiohttp got nothing but simple
  requests. Otherwise its parser might still hold a part of the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import math
import uuid
from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Protocol, cast

from aiohttp import web
from aiohttp.helpers import rfc822_formatted_time

from gateway.http.aiohttp_connection import (
    MAX_HEADERS_BYTES,
    PARSED_HEAD,
    TOO_LARGE,
    AiohttpConnection,
    AiohttpTransport,
)
from gateway.http.body_reader import MIN_BYTES_PER_S, TOO_MANY_BODIES
from gateway.http.json_responses import answer
from gateway.http.parser import (
    UNSUPPORTED,
    IncompleteRequest,
    RequestHead,
    SimpleRequest,
    parse,
)
from shared.errors import BodyTimeout, HeadersTooLarge, LoraplexError, Overloaded

if TYPE_CHECKING:
    from gateway.http.server import Server

MAX_GATHERED_BYTES = 64 << 10
"""The longest request that is gathered here before its key was checked. A longer one that comes in
several pieces is read by aiohttp, which pauses the client until a handler asks for the body.
"""
LINGER_S = 5.0
"""How long a connection stays open after its last answer, for its client to close it."""
IPV6_NETWORK_BYTES = 8
"""As much as one customer of a provider gets."""
HEAD_END = b"\r\n\r\n"
TOO_SLOW = "The request did not come to its end in time."


class PendingAnswer(Protocol):
    """A request that is being answered."""

    def cancel(self) -> None:
        """The client has left. Nothing is written any more, and `answered` is not called."""
        ...


class FastPath(Protocol):
    """Answers a simple request on the transport.

    It calls `answered(keep_alive)` once the last byte is written, and never before it has returned.
    If it returns None, it has done nothing, and aiohttp gets the request.
    """

    def __call__(
        self,
        request: SimpleRequest,
        transport: asyncio.WriteTransport,
        answered: Callable[[bool], None],
    ) -> PendingAnswer | None: ...


def refusal(error: LoraplexError) -> bytes:
    """The bytes of a whole answer with this error. It is the last one of its connection."""
    status, headers, body = answer(error, uuid.uuid4().hex)
    headers |= {
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Date": rfc822_formatted_time(),
        "Connection": "close",
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n{lines}\r\n".encode() + body


def client_of(transport: asyncio.BaseTransport) -> str:
    """Who is at the other end: an IPv4 address, or the network of an IPv6 address, in which one
    client has as many addresses as it likes. Empty: it is not known.
    """
    peer = transport.get_extra_info("peername")
    if not isinstance(peer, tuple) or ":" not in peer[0]:
        return peer[0] if isinstance(peer, tuple) else ""
    address = ipaddress.IPv6Address(peer[0])
    mapped = address.ipv4_mapped
    return str(mapped) if mapped is not None else address.packed[:IPV6_NETWORK_BYTES].hex()


class Connection(asyncio.Protocol):
    """One connection. `_aiohttp` is aiohttp's handler for it, from the first request that needs
    one.
    """

    __slots__ = (
        "_aiohttp",
        "_aiohttp_for_good",
        "_close_at",
        "_full",
        "_give_up_at",
        "_head_bytes",
        "_held",
        "_http_server",
        "_last_head",
        "_lingers",
        "_loop",
        "_needed",
        "_pending",
        "_rested_at",
        "_stuck_at",
        "_tail",
        "_transport",
        "_unread",
        "_unsent",
        "client",
    )

    def __init__(self, http_server: Server) -> None:
        self._http_server = http_server
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._pending: PendingAnswer | None = None
        self._aiohttp: AiohttpConnection | None = None
        # aiohttp keeps the connection: its parser may hold a part of the next request
        self._aiohttp_for_good = False
        self._last_head: RequestHead | None = None  # of the last request
        # the beginning of a request, or bytes that came while one was being answered
        self._unread = bytearray()
        self._needed = 0
        self._held = 0  # bytes of it that count as an unfinished body
        self._head_bytes = 0  # of a head that aiohttp has not got completely
        self._tail = b""  # the last bytes of that head
        self._lingers = False  # it has sent all it sends; further bytes are thrown away
        self._close_at = self._give_up_at = math.inf
        self._full = False  # the client has not taken the answers so far
        self._unsent = 0  # bytes of them that waited here at the last look
        self._stuck_at = math.inf  # when it is closed if it takes none of them
        self._rested_at = self._loop.time()
        self.client = ""

    # ---- asyncio's side --------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.client = client_of(transport)
        if not self._http_server.enter(self):
            self._transport.abort()
            return
        self._close_at = self._loop.time() + self._http_server.limits.header_timeout_s

    def data_received(self, data: bytes) -> None:
        inner = self._aiohttp
        if self._lingers:
            return
        if inner is not None:
            if self._aiohttp_for_good or not _is_idle(inner):
                self._aiohttp_for_good = True
                self._feed(inner, data)
                return
            self._retire(inner)
        if self._pending is not None or self._full:
            if self._unread:
                assert self._transport is not None
                self._transport.pause_reading()
            self._unread += data
            if not self._hold(len(self._unread)) and self._transport is not None:
                self._transport.abort()
            return
        if self._unread:
            self._unread += data
            if len(self._unread) < self._needed:
                self._expect_more()
                return
            data = bytes(self._unread)
            self._unread.clear()
            self._hold(0)
        self._parse(data)

    def pause_writing(self) -> None:
        self._full = True
        if self._aiohttp is not None:
            self._aiohttp.pause_writing()

    def resume_writing(self) -> None:
        self._full = False
        if self._aiohttp is not None:
            self._aiohttp.resume_writing()
        elif self._pending is None:
            self._next()

    def connection_lost(self, exc: Exception | None) -> None:
        self._http_server.leave(self)
        self._hold(0)
        self._transport = None
        if self._pending is not None:
            self._pending.cancel()
            self._pending = None
        if self._aiohttp is not None:
            self._aiohttp.connection_lost(exc)
            self._aiohttp = None

    # ---- requests --------------------------------------------------------------------------------

    def _parse(self, data: bytes) -> None:
        """Handles `data`: everything that has arrived since the last request."""
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
            if first:  # the time for the whole request begins with its first byte
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
            self._end()
            return
        if self._unread and not self._full:
            self._next()

    def _next(self) -> None:
        """Goes on with what has come meanwhile."""
        if self._unread and self._transport is not None:
            data = bytes(self._unread)
            self._unread.clear()
            self._hold(0)
            self._transport.resume_reading()
            self._parse(data)

    def _hand_over(self, data: bytes, *, for_good: bool) -> None:
        self._aiohttp_for_good = for_good
        inner = self._aiohttp = self._http_server.aiohttp_path()
        assert self._transport is not None
        inner.connection_made(cast(Any, AiohttpTransport(self._transport, self._end)))
        self._head_bytes, self._tail = 0, b""
        self._feed(inner, data)

    def _feed(self, inner: AiohttpConnection, data: bytes) -> None:
        """Gives the data to aiohttp. It bounds neither the time nor the total size of a head, so
        both are bounded here. A head may come while the request before it is still being answered.
        """
        waits = inner.awaits_head
        if waits and self._head_end(data) > MAX_HEADERS_BYTES:
            self._refuse(inner, HeadersTooLarge(TOO_LARGE))
            return
        held = self._held if inner.reads_ahead else self._head_bytes
        inner.data_received(data)
        if not self._hold(held + len(data) if inner.reads_ahead else 0):
            self.abort()
            return
        if not waits:
            return
        if getattr(inner, "_messages", True):
            self._head_bytes, self._tail, self._close_at = 0, b"", math.inf
            return
        if not inner.answers and (not self._head_bytes or self._close_at == math.inf):
            self._close_at = self._loop.time() + self._http_server.limits.header_timeout_s
        self._head_bytes += len(data)
        self._tail = (self._tail + data[-len(HEAD_END) :])[-len(HEAD_END) + 1 :]
        if not self._hold(self._head_bytes * PARSED_HEAD):  # its lines are parsed as they come
            self._refuse(inner, Overloaded(TOO_MANY_BODIES, retry_after_s=1.0))

    def _head_end(self, data: bytes) -> int:
        """How long the head is with these bytes, up to its end if they hold it."""
        found = (self._tail + data).find(HEAD_END)
        return self._head_bytes + (len(data) if found < 0 else found)

    def _refuse(self, inner: AiohttpConnection, error: LoraplexError) -> None:
        assert self._transport is not None
        if inner.answers:
            self.abort()  # the refusal would stand in the middle of the answer
            return
        self._transport.write(refusal(error))
        self._retire(inner)
        self._end(refused=True)

    def _retire(self, inner: AiohttpConnection) -> None:
        """Takes the connection back from aiohttp, which has answered everything it was given."""
        self._aiohttp = None
        self._hold(0)
        inner.transport = None  # or aiohttp would close it
        inner.connection_lost(None)
        self._restart_timer()

    # ---- the connection's end --------------------------------------------------------------------

    def _end(self, *, refused: bool = False) -> None:
        """Sends no more after what has been written. The connection stays open until its client
        closes it, LINGER_S at most. If it closed while the client was still sending, the client's
        kernel would throw the answer away (RFC 9112, section 9.6). TLS cannot close one side, so a
        client of HTTP/1.0 would wait for the end: there it stays open after a refusal only.
        """
        transport = self._transport
        if transport is None or transport.is_closing() or self._lingers:
            return
        refused = refused or (self._aiohttp is not None and self._aiohttp.refused)
        if not transport.can_write_eof() and not refused:
            transport.close()
            return
        self._lingers, self._head_bytes = True, 0
        self._unread.clear()
        self._hold(0)
        self._rested_at = self._loop.time()
        self._close_at = self._rested_at + LINGER_S
        transport.resume_reading()
        if transport.can_write_eof():
            with contextlib.suppress(OSError):  # its client has reset it: it is lost soon
                transport.write_eof()

    @property
    def waits(self) -> bool:
        """Whether it waits for a request, for the rest of one, or for its client to close it."""
        idle = self._lingers or self._aiohttp is None or _is_idle(self._aiohttp)
        return self._pending is None and idle

    def _restart_timer(self) -> None:
        now = self._rested_at = self._loop.time()
        self._close_at = now + self._http_server.limits.idle_timeout_s

    def _expect_more(self) -> None:
        """Sets the deadline for the next piece of a request, and for the whole of it. Closes the
        connection if too much of unfinished requests is held already.
        """
        soon = self._loop.time() + self._http_server.limits.header_timeout_s
        self._close_at = min(soon, self._give_up_at)
        if not self._hold(len(self._unread)) and self._transport is not None:
            self._transport.write(refusal(Overloaded(TOO_MANY_BODIES, retry_after_s=1.0)))
            self._end(refused=True)

    def _hold(self, size_bytes: int) -> bool:
        """So much of a request waits here for its rest, or for its turn. False: of all connections
        together it is too much. No key has been looked at, so each client has its share.
        """
        bodies = self._http_server.bodies
        client = f"from {self.client}" if self.client else ""
        bodies.held.add(client, size_bytes - self._held)
        self._held = size_bytes
        return not size_bytes or not bodies.held.beyond(client, bodies.limits.max_unfinished_bytes)

    def close_if_late(self, now: float) -> None:
        """Closes the connection if it was idle, or has been receiving one request, for too long.
        While aiohttp works on a request, other bounds apply.
        """
        transport = self._transport
        inner = self._aiohttp
        if self._held and inner is not None and not (self._head_bytes or inner.reads_ahead):
            self._hold(0)  # it has got to it
        if transport is None or self._pending is not None or self._is_read(transport, now):
            return
        if self._close_at == math.inf and transport.is_closing():
            self._restart_timer()  # aiohttp has closed it, but its bytes may still be on their way
        if now < self._close_at:
            return
        if transport.get_write_buffer_size():
            transport.abort()  # the client does not read, so a close would never complete
            return
        if self._unread or self._head_bytes:
            transport.write(refusal(BodyTimeout(TOO_SLOW)))
            self._end(refused=True)
        else:
            transport.close()

    def _is_read(self, transport: asyncio.Transport, now: float) -> bool:
        """Whether a whole answer waits for its client to read on. A client that reads nothing of it
        for `idle_timeout_s` is cut off.
        """
        waits = self._lingers or self._aiohttp is None or _waits_for_reader(self._aiohttp)
        unsent = transport.get_write_buffer_size() if waits else 0
        if unsent < self._unsent or not unsent or self._stuck_at == math.inf:
            idle_s = self._http_server.limits.idle_timeout_s
            self._stuck_at = now + idle_s if unsent else math.inf
        elif now >= self._stuck_at:
            transport.abort()
        self._unsent = unsent
        return unsent > 0

    def close_if_idle(self) -> None:
        if self._pending is None and self._aiohttp is None and self._transport is not None:
            self._transport.close()

    def quiet_since(self, when: float) -> bool:
        """Whether no request was under way at any time since `when`."""
        idle = self._pending is None and not self._unread
        if self._aiohttp is not None and not self._lingers:
            idle = idle and _is_idle(self._aiohttp)
        return idle and self._rested_at <= when

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()


def _is_idle(handler: web.RequestHandler) -> bool:
    """Whether aiohttp's handler waits for its next request. aiohttp has no public name for this. If
    the private name disappears, connections stay with aiohttp, which costs only time.
    """
    waiter = getattr(handler, "_waiter", None)
    return waiter is not None and not waiter.done()


def _waits_for_reader(handler: web.RequestHandler) -> bool:
    """Whether aiohttp's handler has written its answer and waits for the client to take it. aiohttp
    has no public name for this either.
    """
    return getattr(handler, "_drain_waiter", None) is not None
