"""Shell. The two ways in which requests for tokens come in.

`fast_path` answers a simple request (see http/parser.py) from the callback that brought its bytes.
It makes no task, no coroutine and no object of aiohttp. `aiohttp_path` is an aiohttp handler for
all others. Among them are requests that must wait before they can be routed: for an alias, or for a
name that the store must be asked for. Both make an Exchange and call its `attempt`.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable
from typing import cast

from aiohttp import web

from gateway.adapters.resolver import ResolvedModel
from gateway.api.body import schema
from gateway.api.body.bounds import Bounds
from gateway.api.body.scan import check_large_body
from gateway.api.exchange import Exchange
from gateway.api.head_facts import HeadFacts, facts_of
from gateway.api.idempotency import OpenKeys, answer_key
from gateway.api.refusals import note_refusal
from gateway.api.services import GenerationServices
from gateway.api.stored_responses import LONGEST_WAIT_S, LOOK_S, ResponseFinder
from gateway.http.body_reader import BoundedRequest
from gateway.http.browser_policy import BrowserPolicy
from gateway.http.connection import PendingAnswer
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
from gateway.telemetry.unexpected_errors import UnexpectedErrors
from shared.api_endpoints import (
    ENDPOINTS,
    RESPONSES_PATH,
    Endpoint,
    ModelIn,
    endpoint_of,
    errors_of,
)
from shared.errors import EngineFailure, LoraplexError, WorkerUnavailable
from shared.lenient_values import is_true


class GenerationAPI:
    """The requests for tokens of one gateway process."""

    def __init__(self, services: GenerationServices, browsers: BrowserPolicy) -> None:
        self._services = services
        self._open_keys = OpenKeys(services.dispatcher.answers, services.loop.time)
        dispatcher = services.dispatcher
        self._stored = ResponseFinder(dispatcher.answers, dispatcher.may_move)
        self._browsers = browsers
        self._unexpected_errors = UnexpectedErrors(services.metrics)

    # ---- the fast path ---------------------------------------------------------------------------

    def fast_path(
        self,
        request: SimpleRequest,
        transport: asyncio.WriteTransport,
        answered: Callable[[bool], None],
    ) -> PendingAnswer | None:
        """See FastPath in http/connection.py. It returns None if the model is not known at once, or
        if a browser asks.
        """
        services, browsers = self._services, self._browsers
        if browsers.checks_host and not browsers.knows_host(request.header("host") or ""):
            return None
        stream = ResponseWriter(
            transport, services.limits.slow_reader_bytes, errors=ENDPOINTS[request.path].errors
        )
        account = exchange = None
        try:
            facts = facts_of(request, services.keys.ring, time.time())
            if facts is None:
                return None
            account = facts.account
            if len(request.body) > services.limits.bounds.max_prompt_bytes:
                return None  # looked at beside the loop
            body = request.body.removeprefix(schema.BYTE_ORDER_MARK)
            exchange = Exchange(services, facts, request, body, stream)
            if exchange.head.previous_response_id and exchange.previous:
                return None  # its worker must be asked for
            target = services.resolver.at_once(exchange.model)
            if target is None:
                return None
            exchange.attempt(target, functools.partial(self._finish, exchange, answered))
        except LoraplexError as exc:
            services.metrics.error(exc.code)
            note_refusal(services, request, account, exchange, exc)
            refuse(stream, exc, exc.request_id)
            services.loop.call_soon(answered, True)
            return REFUSED
        except Exception as exc:  # raised here, it would close the connection without a word
            refuse(stream, self._unexpected_errors.note(exc), request_id_of(request))
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
        """Raises LoraplexError if nothing has been sent to the client yet."""
        services = self._services
        body = (await request.read()).removeprefix(schema.BYTE_ORDER_MARK)
        incoming, stream = AiohttpRequest(request), self._writer(request)
        account = exchange = None
        try:
            aside = cast(BoundedRequest, request).aside
            fields = await read_aside(services, incoming, body, aside)
            account = services.keys.account_of(authorization_of(incoming))
            facts = HeadFacts(account, incoming)
            exchange = Exchange(services, facts, incoming, body, stream, fields=fields)
            return await self._resolved(request, exchange, incoming, body)
        except LoraplexError as exc:
            note_refusal(services, incoming, account, exchange, exc)
            raise

    async def _resolved(
        self, request: web.BaseRequest, exchange: Exchange, incoming: AiohttpRequest, body: bytes
    ) -> web.StreamResponse:
        if exchange.previous:
            stored = self._stored.find(exchange.account, exchange.previous)
            exchange.goes_on_from(await exchange.in_time(stored))
        resolver = self._services.resolver
        target = resolver.at_once(exchange.model)
        if target is None:
            target = await exchange.in_time(
                resolver.resolve(exchange.model, lambda: user_of(exchange, incoming))
            )
        key = answer_key(exchange.account, incoming, body)
        if key is None:
            return await self._answer(request, exchange, target)
        with self._open_keys.hold(key, exchange):
            found = await exchange.in_time(self._open_keys.find(target.base, key))
            exchange.repeat(key, found)
            return await self._answer(request, exchange, target)

    async def kept(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answers that a worker stores: `GET /v1/responses/ID`, `POST /v1/responses/ID/cancel`.
        Their worker is asked as for any other request.

        Raises LoraplexError if nothing has been sent to the client yet.
        """
        services, incoming = self._services, AiohttpRequest(request)
        await request.read()  # nothing in it is of use; what is unread would be the next head
        account = services.keys.account_of(authorization_of(incoming))
        answer_id = incoming.path.removeprefix(RESPONSES_PATH + "/").partition("/")[0]
        path = incoming.path + (f"?{request.query_string}" if request.query_string else "")
        streams = is_true(request.query.get("stream", ""))
        facts = HeadFacts(account, incoming)
        until = services.loop.time() + LONGEST_WAIT_S
        while True:
            kept = await self._stored.find(account, answer_id, path, streams)
            exchange = Exchange(services, facts, incoming, b"", self._writer(request), kept)
            try:
                return await self._answer(request, exchange, ResolvedModel(kept.base))
            except (WorkerUnavailable, EngineFailure):
                # its worker was lost meanwhile; the answer may move, or another one have a copy
                if services.loop.time() > until:
                    raise
            await asyncio.sleep(LOOK_S)

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
        self, request: web.BaseRequest, exchange: Exchange, target: ResolvedModel
    ) -> web.StreamResponse:
        finished, stream = asyncio.Event(), exchange.stream
        exchange.attempt(target, finished.set)
        cast(BoundedRequest, request).let_go()  # the dispatcher counts it from now on
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


async def read_aside(
    services: GenerationServices,
    incoming: IncomingRequest,
    body: bytes,
    aside: Callable[..., Awaitable[schema.BodyFields]] = asyncio.to_thread,
) -> schema.BodyFields | None:
    """The fields of a large body, read in a thread beside the event loop. None: the body is
    small.
    """
    endpoint, bounds = endpoint_of(incoming.path), services.limits.bounds
    if endpoint is None or len(body) <= min(MAX_ON_LOOP_BYTES, bounds.max_prompt_bytes):
        return None
    kind = incoming.header("content-type") or schema.JSON_TYPE
    return await aside(_read_large, endpoint, kind, body, bounds)


def _read_large(
    endpoint: Endpoint, content_type: str, body: bytes, bounds: Bounds
) -> schema.BodyFields:
    if endpoint.model_in is not ModelIn.FORM:
        check_large_body(body, bounds.max_prompt_bytes)
    return schema.read_fields(endpoint, content_type, body, bounds)


class _Refused:
    """The PendingAnswer of a request that was refused at once."""

    def cancel(self) -> None:
        return None


REFUSED = _Refused()


def user_of(exchange: Exchange, incoming: IncomingRequest) -> bytes:
    """The user, by whom the share of an alias is chosen: the body's `user`, else the API key, else
    the session, else a new one for every request.
    """
    user = bytes(exchange.head.user)
    if user not in (b"", b"null", b'""'):
        return b"u" + user
    # a line of a batch has the account of its key, and no header with it
    key = exchange.account.name or caller_of(authorization_of(incoming))
    session = (incoming.header("x-session-id") or "")[:MAX_SESSION]
    if key or session:
        return f"k{key}".encode() if key else b"s" + session.encode(errors="replace")
    return b"%x" % random_id()
