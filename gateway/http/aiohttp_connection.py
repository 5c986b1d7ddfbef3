"""Shell. aiohttp's handler for one connection, and its log: errors have Loraplex's shape, and no
log line quotes a request.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable
from typing import Any

from aiohttp import web, web_protocol
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader

from gateway.http.json_responses import answer
from shared.errors import HeadersTooLarge, InternalError, InvalidRequest, LoraplexError
from shared.runtime.log import place_of

log = logging.getLogger("loraplex.http")

MAX_HEADERS_BYTES = 64 << 10
"""The longest request head, in one line or in many. Proxies that sign users in add 10 to 30 KB."""
TOO_LARGE = f"The request's headers are longer than {MAX_HEADERS_BYTES} bytes."
MAX_HEADER_FIELDS = 1024
"""32 KB of short ones. Each takes a multiple of its length here."""
TOO_MANY = f"The request has more than {MAX_HEADER_FIELDS} headers."
_TOO_MANY_OF_AIOHTTP = "Too many headers"
PARSED_HEAD = 25
"""A head of short lines takes so many times its length once it is parsed."""
MAX_READ_AHEAD = 2
"""Requests that are parsed before it is their turn. What follows them waits as bytes. aiohttp's own
bound is 32, and is no argument of it.
"""
web_protocol.MAX_MSG_QUEUE_SIZE = MAX_READ_AHEAD


class AiohttpTransport:
    """A connection's transport as aiohttp gets it. Closing it is left to the connection."""

    __slots__ = ("_transport", "close", "write")

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        self._transport, self.write, self.close = transport, transport.write, close

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class AiohttpConnection(web.RequestHandler):
    """aiohttp's handler. It answers requests that it cannot read with Loraplex's error object, and
    has `refused` them then: more of them may be on its way. `body` is that of the newest request.
    If that is the `last` one, what follows it is nothing.
    """

    __slots__ = ("body", "last", "refused")

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.refused = self.last = False
        self.body: StreamReader = EMPTY_PAYLOAD

    @property
    def awaits_head(self) -> bool:
        """Whether the next byte is the first of a request's head, or belongs to one."""
        over = self.body.is_eof() and not self.last
        return over and not self._messages and not self._upgraded

    @property
    def answers(self) -> bool:
        """Whether it has got a request and does not wait for another one yet."""
        waits = self._waiter is not None and not self._waiter.done()
        return self._request_count > 0 and not waits

    @property
    def reads_ahead(self) -> bool:
        """Whether it holds more than the request that it answers, and parts of that."""
        next_one = not self._request_in_progress  # the first of them is about to be answered
        return self._upgraded or len(self._messages) > next_one

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Goes on with the bytes behind the request. Where the body came after its head, aiohttp's
        parser still counts it as waiting, stops behind it, and would wait for the next bytes.
        """
        finished = await super().finish_response(request, resp, start_time)
        if self._parser is not None and not self._messages and request.content.is_eof():
            self.data_received(b"")
        return finished

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Raises ConnectionError if an answer has begun already."""
        super().handle_error(request, status, exc, message)  # logs it, and raises
        self.refused = True
        error: LoraplexError
        if isinstance(exc, LineTooLong):
            error = HeadersTooLarge(TOO_LARGE)
        elif isinstance(exc, HttpProcessingError) and _TOO_MANY_OF_AIOHTTP in exc.message:
            error = HeadersTooLarge(TOO_MANY)
        elif isinstance(exc, HttpProcessingError):
            error = InvalidRequest("This is not a request in HTTP/1.1.")
        else:
            error = InternalError("The request failed inside the gateway.")
        code, headers, body = answer(error, uuid.uuid4().hex)
        made = web.Response(
            status=code, body=body, content_type="application/json", headers=headers
        )
        made.force_close()
        return made


class ParserLog(logging.LoggerAdapter[logging.Logger]):
    """The log that aiohttp gets. Its parser quotes malformed requests, and these may hold a key or
    a prompt. Anybody can send such requests. So for them only the kind of error is logged, at level
    debug. Any other exception is a fault of ours and is logged as an error.
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
