"""Shell. A request for tokens at the HTTP surface, from its body to its last byte, whichever of two
ways it came in.

`fast_path` answers a plain request (see front.py) from the callback that brought it: no task, no
coroutine, nothing of aiohttp's. `aiohttp_path` is an aiohttp handler for all others, among them
those that have to wait before they can be routed (an alias, a name that the store must be asked
for). Both do the same things in the same order: key, head, deadline, version, submit; then the
answer goes to the client by itself, and at its end comes the account.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import cast

from aiohttp import web

from gateway.accounts.keys import Keys
from gateway.adapters.resolver import Resolver, Target
from gateway.adapters.usage import AdapterUsage
from gateway.api import schema
from gateway.dispatch.dispatcher import Dispatcher
from gateway.dispatch.lifecycle import RequestPhase
from gateway.dispatch.request import InFlightRequest
from gateway.http.headers import (
    _TIMEOUT_MS,
    MAX_SESSION,
    TIMEOUT_HEADER,
    AiohttpRequest,
    IncomingRequest,
    RequestDeadline,
    _random,
    _tenant,
    request_id_of,
)
from gateway.http.parser import SimpleRequest
from gateway.http.response import AlreadySent, ResponseWriter, refuse
from gateway.http.server import PendingAnswer
from gateway.telemetry.access_log import AccessLog, AccessRecord
from gateway.telemetry.prometheus import Metrics
from shared.adapters.identity import AdapterRef
from shared.errors import AdapterNotFound, BodyTooLarge, InvalidRequest, LoraplexError

SHOWN_DIGEST = 12  # characters of a version in headers and logs
_PRIORITY = re.compile(r"-?[0-9]{1,9}\Z")


@dataclass(frozen=True, slots=True)
class RequestLimits:
    max_body_bytes: int
    slow_reader_bytes: int
    request_timeout_s: float


class GenerationAPI:
    """Requests for tokens of one gateway process.

    Args:
        usage: is told of every request for an adapter, and how it ended.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        resolver: Resolver,
        metrics: Metrics,
        keys: Keys,
        limits: RequestLimits,
        access: AccessLog,
        usage: AdapterUsage,
    ) -> None:
        self.dispatcher = dispatcher
        self.resolver = resolver
        self.metrics = metrics
        self.keys = keys
        self.limits = limits
        self.access = access
        self.usage = usage
        self.loop = asyncio.get_running_loop()

    # ---- the short way ---------------------------------------------------------------------------

    def fast_path(
        self,
        request: SimpleRequest,
        transport: asyncio.WriteTransport,
        answered: Callable[[bool], None],
    ) -> PendingAnswer | None:
        """See front.Express. None: who asks for what is not known at once."""
        stream = ResponseWriter(transport, self.limits.slow_reader_bytes)
        try:
            self.keys.check(request.header("authorization") or "")
            exchange = Exchange(self, request, request.body, stream)
            target = self.resolver.at_once(exchange.head.model)
            if target is None:
                return None
            call = _FastExchange(exchange, answered)
            try:
                exchange.submit(target)
            except LoraplexError as exc:
                self.resolver.ended(target, 0, exc)
                raise
        except LoraplexError as exc:
            self.metrics.error(exc.code)
            refuse(stream, exc, exc.request_id or request_id_of(request))
            self.loop.call_soon(answered, True)
            return NOTHING_LEFT
        return call

    # ---- the ordinary way ------------------------------------------------------------------------

    async def aiohttp_path(self, request: web.BaseRequest) -> web.StreamResponse:
        """Raises LoraplexError where nothing has been sent to the client."""
        body = await self._body(request)
        if request.transport is None:
            raise ConnectionResetError("the client has left")
        chunked = request.version >= (1, 1)
        transport = cast(asyncio.WriteTransport, request.transport)
        stream = ResponseWriter(
            transport,
            self.limits.slow_reader_bytes,
            chunked=chunked,
            keep_alive=request.keep_alive and chunked,
        )
        asked = AiohttpRequest(request)
        exchange = Exchange(self, asked, body, stream)
        target = self.resolver.at_once(exchange.head.model)
        if target is None:
            target = await self._in_time(
                self.resolver.resolve(exchange.head.model, lambda: _user(asked, exchange.head)),
                exchange.deadline,
            )
        try:
            await self._fly(exchange, target)
            if exchange.outdated:
                await self._fly_again(exchange)
        except LoraplexError as exc:
            self.resolver.ended(target, 0, exc)
            raise
        except asyncio.CancelledError:
            exchange.left()
            raise
        exchange.close()
        if stream.error is not None:
            if not stream.started:
                stream.error.request_id = exchange.request_id
                raise stream.error
            exchange.end_with_error()
        return AlreadySent(request, stream.status, stream.keep_alive)

    async def _fly(self, exchange: Exchange, target: Target) -> None:
        finished = asyncio.Event()
        exchange.stream.on_finish = finished.set
        exchange.submit(target)
        await finished.wait()
        exchange.landed()

    async def _fly_again(self, exchange: Exchange) -> None:
        try:
            target = await self.look_again(exchange)
            await self._fly(exchange, target)
        except LoraplexError as exc:
            exchange.stream.error = exc

    async def look_again(self, exchange: Exchange) -> Target:
        """The store's copy changed between the listing and the worker's fetch: what answers now?"""
        target = await self._in_time(self.resolver.again(exchange.target), exchange.deadline)
        exchange.stream.again()
        return target

    @staticmethod
    async def _in_time(asked: Awaitable[Target], deadline: RequestDeadline) -> Target:
        try:
            async with asyncio.timeout_at(deadline.at):
                return await asked
        except TimeoutError as exc:
            raise deadline.exceeded("looked up") from exc

    async def _body(self, request: web.BaseRequest) -> bytes:
        try:
            content = request.content
            if (
                content.is_eof()
                and (request.content_length or self.limits.max_body_bytes)
                < self.limits.max_body_bytes
            ):
                return content.read_nowait()  # it came with its head: nothing to wait for
            return await request.read()
        except web.HTTPRequestEntityTooLarge as exc:
            raise BodyTooLarge(
                f"The request body is larger than {self.limits.max_body_bytes} bytes."
            ) from exc
        except web.HTTPException as exc:
            raise InvalidRequest(f"The request body could not be read: {exc.reason}") from exc


class Exchange:
    """One request for tokens under way: what was asked, what answers, and where the answer goes.

    Raises InvalidRequest for a body or a header that cannot be.
    """

    __slots__ = (
        "_asked",
        "_body",
        "_generation",
        "_late",
        "deadline",
        "head",
        "inflight",
        "request_id",
        "stream",
        "target",
    )

    def __init__(
        self, generation: GenerationAPI, asked: IncomingRequest, body: bytes, stream: ResponseWriter
    ) -> None:
        self._generation, self._asked, self._body, self.stream = generation, asked, body, stream
        self.head = schema.parse_body_fields(body)
        self.request_id = request_id_of(asked)
        self.deadline = self._deadline()
        self.target: Target
        self.inflight: InFlightRequest
        self._late: asyncio.TimerHandle | None = None

    @property
    def outdated(self) -> bool:
        """No worker could get the version that was resolved, and the client has seen nothing
        yet.
        """
        return (
            isinstance(self.stream.error, AdapterNotFound)
            and self.target.adapter is not None
            and not self.stream.answered
        )

    def submit(self, target: Target) -> None:
        """Raises Overloaded, RateLimited or WorkerUnavailable, and then it is over."""
        g, asked, head = self._generation, self._asked, self.head
        ref = target.adapter
        self.target = target
        header = asked.header
        inflight = self.inflight = InFlightRequest(
            target.base,
            ref,
            target.stored,
            asked.path,
            self.request_id,
            self._body,
            self.stream,
            output_tokens=head.max_completion_tokens or head.max_tokens or 0,
            tenant=_tenant(header("authorization") or ""),
            session=(header("x-session-id") or "")[:MAX_SESSION],
            prefix=schema.prefix_hash(ref.digest if ref is not None else "", self._body),
            priority=_priority(header("x-loraplex-priority"), head),
            streams=bool(head.stream),
            model=head.model if target.alias or target.by_digest else "",
            elsewhere=target.elsewhere,
        )
        g.resolver.use(target)
        self.stream.describe(self._head_lines)
        if ref is not None:
            g.usage.used(ref, time.time())
        g.dispatcher.submit(inflight)
        self._late = g.loop.call_at(self.deadline.at, self._too_late)

    def landed(self) -> None:
        """The stream has finished."""
        self._leave()
        usage, ref, error = self._generation.usage, self.inflight.adapter, self.stream.error
        if ref is not None and error is not None:
            usage.failed(ref, error)
        elif ref is not None:
            usage.worked(ref)

    def left(self) -> None:
        """The client has."""
        self._leave()
        self._log()

    def close(self) -> None:
        """All that there was to try has been tried: the account of it."""
        self._generation.resolver.ended(self.target, self.stream.status, self.stream.error)
        self._log()

    def end_with_error(self) -> None:
        """For a client that has seen the status already; one that has not can still get another."""
        stream = self.stream
        assert stream.error is not None
        self._generation.metrics.error(stream.error.code)
        if not stream.answered:
            stream.end_with(stream.error)

    # ---- inside ----------------------------------------------------------------------------------

    def _leave(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
        self._generation.dispatcher.cancel(self.inflight)

    def _too_late(self) -> None:
        self._generation.dispatcher.give_up(
            self.inflight, self.deadline.exceeded(self.inflight.life.phase.value)
        )

    def _deadline(self) -> RequestDeadline:
        """Of the whole request: the client's own, but never beyond the server's."""
        after_s = self._generation.limits.request_timeout_s
        given = self._asked.header(TIMEOUT_HEADER)
        if given is not None:
            if not _TIMEOUT_MS.match(given):
                raise InvalidRequest(
                    f"The header {TIMEOUT_HEADER} must be a whole number of "
                    "milliseconds, at least 1.",
                    param=TIMEOUT_HEADER,
                )
            after_s = min(after_s, int(given) / 1e3)
        return RequestDeadline(self._generation.loop.time() + after_s, after_s)

    def _head_lines(self) -> bytes:
        inflight, policy = self.inflight, self._generation.dispatcher.policy
        choice, adapter = inflight.choice, inflight.adapter
        # a comment commits the head
        if choice is None or inflight.life.phase is RequestPhase.QUEUED:
            return (
                f"x-request-id: {inflight.request_id}\r\nx-loraplex-policy: {policy}\r\n".encode()
            )
        tier = (
            f"x-loraplex-adapter: {_version(adapter)}\r\nx-loraplex-adapter-tier: "
            f"{choice.tier.name.lower()}\r\n"
            if adapter
            else ""
        )
        return (
            f"x-request-id: {inflight.request_id}\r\nx-loraplex-policy: "
            f"{policy}\r\nx-loraplex-worker: {choice.worker.id}\r\n"
            f"x-loraplex-queue-ms: {(inflight.t_sent - inflight.t_start) * 1e3:.1f}\r\n{tier}"
        ).encode()

    def _log(self) -> None:
        if not self._generation.access.enabled:
            return
        inflight, stream = self.inflight, self.stream
        done, choice, adapter, start = (
            inflight.done,
            inflight.choice,
            inflight.adapter,
            inflight.t_start,
        )
        self._generation.access.write(
            AccessRecord(
                inflight.request_id,
                self.head.model,
                adapter.name if adapter else None,
                adapter.digest[:SHOWN_DIGEST] if adapter else None,
                stream.status or (stream.error.status if stream.error else 499),
                inflight.life.phase._value_,
                choice.worker.id if choice else None,
                choice.reason._value_ if choice else None,
                choice.tier.name.lower() if choice and adapter else None,
                _ms(start, inflight.t_sent),
                _ms(start, inflight.t_head),
                round(done.load_s * 1e3, 1) if done else None,
                _ms(start, inflight.t_end),
                done.prompt_tokens if done else None,
                done.output_tokens if done else None,
                stream.error.code if stream.error else None,
            )
        )


class _FastExchange:
    """An exchange on the short way: its end is a callback."""

    __slots__ = ("_answered", "_exchange", "_gone", "_task")

    def __init__(self, exchange: Exchange, answered: Callable[[bool], None]) -> None:
        self._exchange, self._answered = exchange, answered
        self._gone = False
        self._task: asyncio.Task[None] | None = None
        exchange.stream.on_finish = self._on_finish

    def cancel(self) -> None:
        self._gone = True
        if self._task is not None:
            self._task.cancel()
        self._exchange.left()

    def _on_finish(self) -> None:
        # The dispatcher has yet to close its books on this flight, and the next request of the
        # connection may be waiting.
        self._exchange._generation.loop.call_soon(self._landed)

    def _landed(self) -> None:
        if self._gone:
            return
        exchange = self._exchange
        exchange.landed()
        if exchange.outdated and self._task is None:
            self._task = exchange._generation.loop.create_task(
                self._look_again(), name="look again"
            )
        else:
            self._close()

    async def _look_again(self) -> None:
        exchange = self._exchange
        try:
            target = await exchange._generation.look_again(exchange)
            exchange.stream.on_finish = self._on_finish  # a stream tells it once
            exchange.submit(target)
        except LoraplexError as exc:
            exchange.stream.error = exc
            self._close()

    def _close(self) -> None:
        exchange, stream = self._exchange, self._exchange.stream
        exchange.close()
        if stream.error is not None:
            if stream.started:
                exchange.end_with_error()
            else:
                exchange._generation.metrics.error(stream.error.code)
                refuse(stream, stream.error, exchange.request_id)
        self._answered(stream.keep_alive)


class _NothingLeft:
    """The call of a request that has been refused."""

    def cancel(self) -> None:
        return None


NOTHING_LEFT = _NothingLeft()


def _user(asked: IncomingRequest, head: schema.BodyFields) -> bytes:
    """Who asks, for the shares of an alias: the body's `user`, else the API key, else the session,
    else nobody twice.
    """
    user = bytes(head.user)
    if user not in (b"", b"null", b'""'):
        return b"u" + user
    key, session = (
        _tenant(asked.header("authorization") or ""),
        (asked.header("x-session-id") or "")[:MAX_SESSION],
    )
    if key or session:
        return f"k{key}".encode() if key else b"s" + session.encode(errors="replace")
    return b"%x" % _random()


def _version(adapter: AdapterRef) -> str:
    return f"{adapter.name}@{adapter.digest[:SHOWN_DIGEST]}"


def _priority(given: str | None, head: schema.BodyFields) -> int:
    """The header's, else the body's; lower goes first. Raises InvalidRequest."""
    if given is None:
        return head.priority or 0
    if not _PRIORITY.match(given):
        raise InvalidRequest(
            "The header x-loraplex-priority must be a whole number; lower goes first.",
            param="x-loraplex-priority",
        )
    return int(given)


def _ms(start: float, end: float) -> float | None:
    return round((end - start) * 1e3, 1) if end else None
