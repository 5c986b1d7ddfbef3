"""Shell. Requests for tokens at the HTTP surface: two ways in, one way on.

`fast_path` answers a simple request (see http/parser.py) from the callback that brought its bytes:
no task, no coroutine, nothing of aiohttp's. `aiohttp_path` is an aiohttp handler for all others,
among them those that have to wait before they can be routed: for an alias, or a name that the store
must be asked for. Both make an Exchange and call its `attempt`.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import cast

from aiohttp import web

from gateway.adapters.resolver import Target
from gateway.api import schema
from gateway.api.body_scan import check_large_body
from gateway.api.exchange import Exchange, GenerationServices
from gateway.api.kept import find_kept
from gateway.http.browsers import BrowserPolicy
from gateway.http.headers import (
    MAX_SESSION,
    AiohttpRequest,
    IncomingRequest,
    authorization_of,
    caller_of,
    random_id,
    request_id_of,
)
from gateway.http.parser import MAX_ON_LOOP_BYTES, SimpleRequest
from gateway.http.response import AlreadySent, ResponseWriter, refuse
from gateway.http.server import PendingAnswer
from gateway.telemetry.failures import Failures
from shared.endpoints import RESPONSES_PATH, Endpoint, ModelIn, endpoint_of, errors_of
from shared.errors import LoraplexError


class GenerationAPI:
    """Requests for tokens of one gateway process."""

    def __init__(self, services: GenerationServices, browsers: BrowserPolicy) -> None:
        self._services = services
        self._browsers = browsers
        self._failures = Failures(services.metrics)

    # ---- the fast path ---------------------------------------------------------------------------

    def fast_path(
        self,
        request: SimpleRequest,
        transport: asyncio.WriteTransport,
        answered: Callable[[bool], None],
    ) -> PendingAnswer | None:
        """See FastPath in http/server.py. None: the model that is asked for is not known at once,
        or a browser asks.
        """
        services, browsers, header = self._services, self._browsers, request.header
        if header("origin") is not None or header("sec-fetch-site") is not None:
            return None
        if browsers.checks_host and not browsers.knows_host(header("host") or ""):
            return None
        stream = ResponseWriter(
            transport, services.limits.slow_reader_bytes, errors=errors_of(request.path)
        )
        try:
            account = services.keys.account_of(authorization_of(request))
            if len(request.body) > services.limits.bounds.max_prompt_bytes:
                return None  # looked at beside the loop
            body = request.body.removeprefix(schema.BYTE_ORDER_MARK)
            exchange = Exchange(services, account, request, body, stream)
            target = services.resolver.at_once(exchange.model)
            if target is None:
                return None
            exchange.attempt(target, functools.partial(self._finish, exchange, answered))
        except LoraplexError as exc:
            services.metrics.error(exc.code)
            refuse(stream, exc, exc.request_id or request_id_of(request))
            services.loop.call_soon(answered, True)
            return REFUSED
        except Exception as exc:  # raised here, it would close the connection without a word
            refuse(stream, self._failures.note(exc), request_id_of(request))
            services.loop.call_soon(answered, True)
            return REFUSED
        return exchange

    def _finish(self, exchange: Exchange, answered: Callable[[bool], None]) -> None:
        stream = exchange.stream
        if stream.error is not None:
            if stream.started:
                exchange.end_with_error()
            else:
                self._services.metrics.error(stream.error.code)
                refuse(stream, stream.error, exchange.request_id)
        answered(stream.keep_alive)

    # ---- aiohttp's path --------------------------------------------------------------------------

    async def aiohttp_path(self, request: web.BaseRequest) -> web.StreamResponse:
        """Raises LoraplexError where nothing has been sent to the client."""
        services = self._services
        body = (await request.read()).removeprefix(schema.BYTE_ORDER_MARK)
        asked, stream = AiohttpRequest(request), self._writer(request)
        fields = await self._read_aside(asked, body)
        account = services.keys.account_of(authorization_of(asked))
        exchange = Exchange(services, account, asked, body, stream, fields=fields)
        target = services.resolver.at_once(exchange.model)
        if target is None:
            target = await exchange.in_time(
                services.resolver.resolve(exchange.model, lambda: _user(asked, exchange.head))
            )
        return await self._answer(request, exchange, target)

    async def kept(self, request: web.BaseRequest) -> web.StreamResponse:
        """An answer that a worker keeps: `GET /v1/responses/ID`, `POST /v1/responses/ID/cancel`.
        Its worker is asked, as for any other request.

        Raises LoraplexError where nothing has been sent to the client.
        """
        services, asked = self._services, AiohttpRequest(request)
        await request.read()  # nothing in it is of use; what is unread would be the next head
        account = services.keys.account_of(authorization_of(asked))
        answer_id = asked.path.removeprefix(RESPONSES_PATH + "/").partition("/")[0]
        path = asked.path + (f"?{request.query_string}" if request.query_string else "")
        streams = request.query.get("stream", "").lower() in ("true", "1")
        kept = find_kept(services.dispatcher.fleet, account, answer_id, path, streams)
        exchange = Exchange(services, account, asked, b"", self._writer(request), kept)
        return await self._answer(request, exchange, Target(kept.base))

    def _writer(self, request: web.BaseRequest) -> ResponseWriter:
        if request.transport is None:
            raise ConnectionResetError("the client has left")
        chunked = request.version >= (1, 1)
        return ResponseWriter(
            cast(asyncio.WriteTransport, request.transport),
            self._services.limits.slow_reader_bytes,
            chunked=chunked,
            keep_alive=request.keep_alive and chunked,
            errors=errors_of(request.path),
            extra_lines=self._cors_lines(request.headers.get("Origin")),
        )

    async def _answer(
        self, request: web.BaseRequest, exchange: Exchange, target: Target
    ) -> web.StreamResponse:
        finished, stream = asyncio.Event(), exchange.stream
        exchange.attempt(target, finished.set)
        try:
            await finished.wait()
        except asyncio.CancelledError:
            exchange.cancel()
            raise
        if stream.error is not None:
            if not stream.started:
                stream.error.request_id = exchange.request_id
                raise stream.error
            exchange.end_with_error()
        return AlreadySent(request, stream.status, stream.keep_alive)

    def _cors_lines(self, origin: str | None) -> bytes:
        headers = self._browsers.cors_headers(origin)
        return "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode()

    async def _read_aside(self, asked: AiohttpRequest, body: bytes) -> schema.BodyFields | None:
        """A large body's fields, read beside the loop; None for a small one."""
        endpoint, bounds = endpoint_of(asked.path), self._services.limits.bounds
        if endpoint is None or len(body) <= min(MAX_ON_LOOP_BYTES, bounds.max_prompt_bytes):
            return None
        kind = asked.header("content-type") or schema.JSON_TYPE
        return await asyncio.to_thread(_read_large, endpoint, kind, body, bounds)


def _read_large(
    endpoint: Endpoint, content_type: str, body: bytes, bounds: schema.Bounds
) -> schema.BodyFields:
    if endpoint.model_in is not ModelIn.FORM:
        check_large_body(body, bounds.max_prompt_bytes)
    return schema.read_fields(endpoint, content_type, body, bounds)


class _Refused:
    """The pending answer of a request that has been refused already."""

    def cancel(self) -> None:
        return None


REFUSED = _Refused()


def _user(asked: IncomingRequest, head: schema.BodyFields) -> bytes:
    """Who asks, for the shares of an alias: the body's `user`, else the API key, else the session,
    else somebody new every time.
    """
    user = bytes(head.user)
    if user not in (b"", b"null", b'""'):
        return b"u" + user
    key = caller_of(authorization_of(asked))
    session = (asked.header("x-session-id") or "")[:MAX_SESSION]
    if key or session:
        return f"k{key}".encode() if key else b"s" + session.encode(errors="replace")
    return b"%x" % random_id()
