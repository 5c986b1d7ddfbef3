"""Shell. The HTTP surface: aiohttp parses and routes, the dispatcher serves; bytes in, bytes out."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import math
import random
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from aiohttp import web

from gateway import openai
from gateway.admin import Admin
from gateway.admin_scope import MAX_SESSION
from gateway.alias_api import AliasAPI
from gateway.catalog import Catalog
from gateway.dispatcher import Dispatcher
from gateway.fellows import Fellows
from gateway.flight import Flight
from gateway.keys import Keys
from gateway.metrics import Metrics
from gateway.model_list import ModelList
from gateway.request import Phase
from gateway.resolver import Resolver, Target
from gateway.stream import ClientStream, Sent
from gateway.usage import Usage
from shared.adapters import AdapterRef
from shared.errors import AdapterNotFound, BodyTooLarge, DeadlineExceeded, InvalidRequest, LoraplexError, RouteNotFound
from shared.log import AccessLog

REQUEST_ID = "x-request-id"
TIMEOUT_HEADER = "x-loraplex-timeout-ms"
_TIMEOUT_MS = re.compile(r"0*[1-9][0-9]{0,8}\Z")
_PRIORITY = re.compile(r"-?[0-9]{1,9}\Z")
SHOWN_DIGEST = 12  # characters of a version in headers and logs
_random = functools.partial(random.getrandbits, 128)  # an id, not a secret; uuid4 would ask the kernel every time
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}\Z")
Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Limits:
    max_body_bytes: int
    slow_reader_bytes: int
    request_timeout_s: float


class Deadline(msgspec.Struct, frozen=True, gc=False):
    """`at` is on the loop's clock, `after_s` how long that was from the request's arrival."""

    at: float
    after_s: float

    def exceeded(self, phase: str) -> DeadlineExceeded:
        return DeadlineExceeded(f"The request was not finished within {self.after_s:g} s (it was still {phase}).")


class API:
    """The routes of one gateway process.

    Args:
        catalogs: every configured base model; None where it has no adapter store.
        usage: is told of every request for an adapter, and how it ended.
        admin: what operators may ask, with keys of their own.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        catalogs: Mapping[str, Catalog | None],
        resolver: Resolver,
        metrics: Metrics,
        keys: Keys,
        limits: Limits,
        access: AccessLog,
        usage: Usage,
        admin: Admin,
        aliases: AliasAPI,
        fellows: Fellows,
    ) -> None:
        self._dispatcher = dispatcher
        self._catalogs = catalogs
        self._resolver = resolver
        self._metrics = metrics
        self._keys = keys
        self._limits = limits
        self._access = access
        self._usage = usage
        self._admin = admin
        self._aliases = aliases
        self._fellows = fellows
        self._created = int(time.time())
        self._models = ModelList(catalogs, resolver.aliases, self._created)
        self._routes: dict[tuple[str, str], Handler] = {}

    def server(self, **settings: Any) -> web.Server:
        """aiohttp without its Application: a dozen fixed paths need no router, and it costs a sixth of what a request costs."""
        self._routes = {("POST", path): self._guarded(self.generate) for path in openai.GENERATE_PATHS}
        self._routes |= {
            ("GET", "/v1/models"): self._guarded(self.models),
            ("GET", "/health"): self.health,
            ("GET", "/ready"): self.ready,
            ("GET", "/metrics"): self.metrics,
        }
        operators = self._admin.routes() | self._aliases.routes()
        self._routes |= {route: self._guarded(handler, admin=True) for route, handler in operators.items()}
        self._routes |= {("HEAD", path): handler for (method, path), handler in self._routes.items() if method == "GET"}
        most = self._limits.max_body_bytes
        loop = asyncio.get_running_loop()
        return web.Server(
            self._handle,
            request_factory=lambda message, payload, protocol, writer, task: web.BaseRequest(
                message, payload, protocol, writer, task, loop, client_max_size=most
            ),
            **settings,
        )

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        path = request.path
        handler = self._routes.get((request.method, path))
        if handler is None and request.method in ("GET", "HEAD") and path.startswith("/v1/models/"):
            handler = self._guarded(self.model)
        if handler is None:
            found = self._admin.below(request.method, path) or self._aliases.below(request.method, path)
            handler = self._guarded(found, admin=True) if found is not None else None
        return await (handler or self.nowhere)(request)

    # ---- generation -----------------------------------------------------------------------------------------------------------------

    async def generate(self, request: web.BaseRequest) -> web.StreamResponse:
        body = await self._body(request)
        head = openai.parse_head(body)
        deadline = self._deadline(request)
        target = self._resolver.at_once(head.model)
        if target is None:
            target = await self._in_time(self._resolver.resolve(head.model, lambda: _user(request, head)), deadline)
        stream = ClientStream(request, self._limits.slow_reader_bytes)
        try:
            flight = self._flight(request, target, _request_id(request), head, body, stream)
            await self._fly(flight, stream, deadline)
        except LoraplexError as exc:
            self._resolver.ended(target, 0, exc)
            raise
        if isinstance(stream.error, AdapterNotFound) and target.adapter is not None and not stream.answered:
            target, flight = await self._fly_again(request, flight, target, head, stream, deadline)
        self._resolver.ended(target, stream.status, stream.error)
        self._log(flight, head.model, stream)
        if stream.error is not None and not stream.started:
            stream.error.request_id = flight.request_id
            raise stream.error
        if stream.error is not None:
            self._metrics.error(stream.error.code)
            if not stream.answered:
                stream.end_with(stream.error)
        return Sent(request, stream.status, stream.keep_alive)

    async def _fly_again(
        self, request: web.BaseRequest, before: Flight, target: Target, head: openai.RequestHead, stream: ClientStream, deadline: Deadline
    ) -> tuple[Target, Flight]:
        """The store's copy changed between the listing and the worker's fetch: looks again, once."""
        try:
            target = await self._in_time(self._resolver.again(target), deadline)
            stream.again()
            flight = self._flight(request, target, before.request_id, head, before.body, stream)
            await self._fly(flight, stream, deadline)
        except LoraplexError as exc:
            stream.error = exc
            return target, before
        return target, flight

    def _flight(
        self, request: web.BaseRequest, target: Target, request_id: str, head: openai.RequestHead, body: bytes, stream: ClientStream
    ) -> Flight:
        ref = target.adapter
        self._resolver.use(target)
        flight = Flight(
            target.base,
            ref,
            target.stored,
            request.path,
            request_id,
            body,
            stream,
            output_tokens=head.max_completion_tokens or head.max_tokens or 0,
            tenant=_tenant(request),
            session=request.headers.get("x-session-id", "")[:MAX_SESSION],
            prefix=openai.prefix_hash(ref.digest if ref is not None else "", body),
            priority=_priority(request, head),
            streams=bool(head.stream),
            model=head.model if target.alias or target.by_digest else "",
            elsewhere=target.elsewhere,
        )
        stream.describe(lambda: self._head_lines(flight))
        return flight

    async def _fly(self, flight: Flight, stream: ClientStream, deadline: Deadline) -> None:
        """Submits the request and waits for its end; cancels it if the client leaves or its time is over."""
        ref = flight.adapter
        if ref is not None:
            self._usage.used(ref, time.time())
        self._dispatcher.submit(flight)
        late = asyncio.get_running_loop().call_at(deadline.at, self._too_late, flight, deadline)
        try:
            await stream.finished
        finally:
            late.cancel()
            self._dispatcher.cancel(flight)
        if ref is not None and stream.error is not None:
            self._usage.failed(ref, stream.error)
        elif ref is not None:
            self._usage.worked(ref)

    def _too_late(self, flight: Flight, deadline: Deadline) -> None:
        self._dispatcher.give_up(flight, deadline.exceeded(flight.life.phase.value))

    def _deadline(self, request: web.BaseRequest) -> Deadline:
        """Of the whole request: the client's own, but never beyond the server's. Raises InvalidRequest."""
        after_s = self._limits.request_timeout_s
        given = request.headers.get(TIMEOUT_HEADER)
        if given is not None:
            if not _TIMEOUT_MS.match(given):
                raise InvalidRequest(
                    f"The header {TIMEOUT_HEADER} must be a whole number of milliseconds, at least 1.", param=TIMEOUT_HEADER
                )
            after_s = min(after_s, int(given) / 1e3)
        return Deadline(asyncio.get_running_loop().time() + after_s, after_s)

    @staticmethod
    async def _in_time(asked: Awaitable[Target], deadline: Deadline) -> Target:
        try:
            async with asyncio.timeout_at(deadline.at):
                return await asked
        except TimeoutError as exc:
            raise deadline.exceeded("looked up") from exc

    async def _body(self, request: web.BaseRequest) -> bytes:
        try:
            content = request.content
            if content.is_eof() and (request.content_length or self._limits.max_body_bytes) < self._limits.max_body_bytes:
                return content.read_nowait()  # it came with its head: nothing to wait for
            return await request.read()
        except web.HTTPRequestEntityTooLarge as exc:
            raise BodyTooLarge(f"The request body is larger than {self._limits.max_body_bytes} bytes.") from exc
        except web.HTTPException as exc:
            raise InvalidRequest(f"The request body could not be read: {exc.reason}") from exc

    def _log(self, flight: Flight, model: str, stream: ClientStream) -> None:
        done = flight.done
        self._access.write(
            {
                "request": flight.request_id,
                "model": model,
                "adapter": flight.adapter.name if flight.adapter else None,
                "digest": flight.adapter.digest[:SHOWN_DIGEST] if flight.adapter else None,
                "status": stream.status or (openai.status_of(stream.error) if stream.error else 499),
                "outcome": flight.life.phase.value,
                "worker": flight.choice.worker.id if flight.choice else None,
                "reason": flight.choice.reason.value if flight.choice else None,
                "tier": flight.choice.tier.name.lower() if flight.choice and flight.adapter else None,
                "queue_ms": _ms(flight.t_start, flight.t_sent),
                "ttft_ms": _ms(flight.t_start, flight.t_head),
                "load_ms": round(done.load_s * 1e3, 1) if done else None,
                "total_ms": _ms(flight.t_start, flight.t_end),
                "prompt_tokens": done.prompt_tokens if done else None,
                "output_tokens": done.output_tokens if done else None,
                "error": stream.error.code if stream.error else None,
            }
        )

    # ---- models ---------------------------------------------------------------------------------------------------------------------

    async def models(self, request: web.BaseRequest) -> web.Response:
        return web.Response(body=await self._models.body(), content_type="application/json")

    async def model(self, request: web.BaseRequest) -> web.Response:
        model = request.path.removeprefix("/v1/models/")
        target = await self._resolver.resolve(model, bytes)
        if target.adapter is None:
            card = openai.model_card(model, self._created)
        elif target.alias:
            card = openai.model_card(model, self._created, parent=target.base, root=target.alias)
        else:
            ref = target.adapter
            card = openai.model_card(model, self._created, parent=ref.base, root=ref.name, digest=ref.digest)
        return web.Response(body=openai.to_json(card), content_type="application/json")

    # ---- operations -----------------------------------------------------------------------------------------------------------------

    async def health(self, request: web.BaseRequest) -> web.Response:
        return web.json_response({"status": "ok"})

    async def ready(self, request: web.BaseRequest) -> web.Response:
        """200 once every configured base model has a worker that serves."""
        serving = {base: len(self._dispatcher.fleet.routable(base)) for base in self._catalogs}
        ready = all(serving.values()) and not self._dispatcher.draining
        return web.json_response({"ready": ready, "workers": serving}, status=200 if ready else 503)

    async def metrics(self, request: web.BaseRequest) -> web.Response:
        """Of all gateway processes, whichever is asked."""
        body = self._metrics.render(*await self._fellows.all())
        return web.Response(body=body, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def nowhere(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.path in {path for _, path in self._routes}:
            error: LoraplexError = InvalidRequest(f"{request.method} is not allowed for {request.path}.")
            headers = {REQUEST_ID: _request_id(request)}
            return web.Response(status=405, body=openai.error_body(error), content_type="application/json", headers=headers)
        error = RouteNotFound(f"There is no {request.path[:200]} here; see {', '.join(openai.GENERATE_PATHS)} and /v1/models.")
        return self._answer(error, _request_id(request))

    # ---- around every handler ---------------------------------------------------------------------------------------------------------

    def _guarded(self, handler: Handler, *, admin: bool = False) -> Handler:
        """Checks the key and turns errors into answers."""
        check = self._keys.check_admin if admin else self._keys.check

        async def guarded(request: web.BaseRequest) -> web.StreamResponse:
            try:
                check(request.headers.get("Authorization", ""))
                return await handler(request)
            except LoraplexError as exc:
                self._metrics.error(exc.code)
                return self._answer(exc, exc.request_id or _request_id(request))

        return guarded

    def _head_lines(self, flight: Flight) -> bytes:
        choice = flight.choice
        if choice is None or flight.life.phase is Phase.QUEUED:  # a comment commits the head
            return b"x-request-id: %b\r\nx-loraplex-policy: %b\r\n" % (flight.request_id.encode(), self._dispatcher.policy.encode())
        adapter = flight.adapter
        tier = f"x-loraplex-adapter: {_version(adapter)}\r\nx-loraplex-adapter-tier: {choice.tier.name.lower()}\r\n" if adapter else ""
        return (
            f"x-request-id: {flight.request_id}\r\nx-loraplex-policy: {self._dispatcher.policy}\r\nx-loraplex-worker: {choice.worker.id}\r\n"
            f"x-loraplex-queue-ms: {(flight.t_sent - flight.t_start) * 1e3:.1f}\r\n{tier}"
        ).encode()

    @staticmethod
    def _answer(error: LoraplexError, request_id: str) -> web.Response:
        status = openai.status_of(error)
        headers = {REQUEST_ID: request_id}
        if status in (429, 503):
            headers["Retry-After"] = str(math.ceil(openai.RETRY_AFTER_S if error.retry_after_s is None else error.retry_after_s))
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return web.Response(status=status, body=openai.error_body(error), content_type="application/json", headers=headers)


def _request_id(request: web.BaseRequest) -> str:
    """The client's own id if it is harmless in headers and logs, else a new one."""
    given = request.headers.get("X-Request-Id", "")
    return given if _REQUEST_ID.match(given) else f"{_random():032x}"


def _tenant(request: web.BaseRequest) -> str:
    """What tells API keys apart in queues: the first bytes of the digest of what the client authorises itself with, whether checked or not."""
    given = request.headers.get("Authorization", "")
    return hashlib.sha256(given.encode()).hexdigest()[:16] if given else ""


def _user(request: web.BaseRequest, head: openai.RequestHead) -> bytes:
    """Who asks, for the shares of an alias: the body's `user`, else the API key, else the session, else nobody twice."""
    user = bytes(head.user)
    if user not in (b"", b"null", b'""'):
        return b"u" + user
    key, session = _tenant(request), request.headers.get("x-session-id", "")[:MAX_SESSION]
    if key or session:
        return f"k{key}".encode() if key else b"s" + session.encode(errors="replace")
    return b"%x" % _random()


def _version(adapter: AdapterRef) -> str:
    return f"{adapter.name}@{adapter.digest[:SHOWN_DIGEST]}"


def _priority(request: web.BaseRequest, head: openai.RequestHead) -> int:
    """The header's, else the body's; lower goes first. Raises InvalidRequest."""
    given = request.headers.get("x-loraplex-priority")
    if given is None:
        return head.priority or 0
    if not _PRIORITY.match(given):
        raise InvalidRequest("The header x-loraplex-priority must be a whole number; lower goes first.", param="x-loraplex-priority")
    return int(given)


def _ms(start: float, end: float) -> float | None:
    return round((end - start) * 1e3, 1) if end else None
