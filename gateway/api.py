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

from aiohttp import web

from gateway import openai
from gateway.catalog import Catalog
from gateway.dispatcher import Dispatcher
from gateway.fellows import Fellows
from gateway.flight import Flight
from gateway.metrics import Metrics
from gateway.model_list import ModelList
from gateway.request import Phase
from gateway.routing import Ask
from gateway.stream import ClientStream, Sent
from shared.adapters import AdapterRef, StoredAdapter
from shared.errors import AdapterNotFound, BodyTooLarge, DeadlineExceeded, InvalidApiKey, InvalidRequest, LoraplexError, RouteNotFound
from shared.log import AccessLog

TIMEOUT_HEADER = "x-loraplex-timeout-ms"
_TIMEOUT_MS = re.compile(r"0*[1-9][0-9]{0,8}\Z")
_PRIORITY = re.compile(r"-?[0-9]{1,9}\Z")
EXPLAINED_TOKENS, MAX_EXPLAINED_TOKENS = 128, 10**7  # of the prompt that /admin/explain assumes, and at most takes
MAX_SESSION = 128  # characters of an x-session-id that count
_random = functools.partial(random.getrandbits, 128)  # an id, not a secret; uuid4 would ask the kernel every time
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}\Z")
Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Limits:
    max_body_bytes: int
    slow_reader_bytes: int
    request_timeout_s: float


@dataclass(frozen=True, slots=True)
class Deadline:
    """`at` is on the loop's clock, `after_s` how long that was from the request's arrival."""

    at: float
    after_s: float

    def exceeded(self, phase: str) -> DeadlineExceeded:
        return DeadlineExceeded(f"The request was not finished within {self.after_s:g} s (it was still {phase}).")


class API:
    """The routes of one gateway process.

    Args:
        catalogs: every configured base model; None where it has no adapter store.
        api_keys: SHA-256 digests of the accepted keys; empty means no key is asked for.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        catalogs: Mapping[str, Catalog | None],
        metrics: Metrics,
        api_keys: frozenset[bytes],
        limits: Limits,
        access: AccessLog,
        fellows: Fellows,
    ) -> None:
        self._dispatcher = dispatcher
        self._catalogs = catalogs
        self._metrics = metrics
        self._api_keys = api_keys
        self._limits = limits
        self._access = access
        self._fellows = fellows
        self._created = int(time.time())
        self._models = ModelList(catalogs, self._created)
        self._routes: dict[tuple[str, str], Handler] = {}

    def server(self, **settings: Any) -> web.Server:
        """aiohttp without its Application: a dozen fixed paths need no router, and it costs a sixth of what a request costs."""
        self._routes = {("POST", path): self._guarded(self.generate) for path in openai.GENERATE_PATHS}
        self._routes |= {
            ("GET", "/v1/models"): self._guarded(self.models),
            ("GET", "/health"): self.health,
            ("GET", "/ready"): self.ready,
            ("GET", "/metrics"): self.metrics,
            ("GET", "/admin/explain"): self._guarded(self.explain),
        }
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
        return await (handler or self.nowhere)(request)

    # ---- generation -----------------------------------------------------------------------------------------------------------------

    async def generate(self, request: web.BaseRequest) -> web.StreamResponse:
        body = await self._body(request)
        head = openai.parse_head(body)
        base, adapter = openai.split_model(head.model, self._catalogs)
        deadline = self._deadline(request)
        stored = await self._find(base, adapter, deadline) if adapter is not None else None
        stream = ClientStream(request, self._limits.slow_reader_bytes)
        flight = self._flight(request, base, stored, _request_id(request), head, body, stream)
        await self._fly(flight, stream, deadline)
        if isinstance(stream.error, AdapterNotFound) and stored is not None and not stream.answered:
            flight = await self._fly_again(request, flight, stored, head, stream, deadline)
        self._log(flight, head.model, stream)
        if stream.error is not None and not stream.started:
            raise stream.error
        if stream.error is not None:
            self._metrics.error(stream.error.code)
            if not stream.answered:
                stream.end_with(stream.error)
        return Sent(request, stream.status, stream.keep_alive)

    async def _fly_again(
        self,
        request: web.BaseRequest,
        before: Flight,
        stored: StoredAdapter,
        head: openai.RequestHead,
        stream: ClientStream,
        deadline: Deadline,
    ) -> Flight:
        """The store's copy changed between the listing and the worker's fetch: looks again, once."""
        catalog = self._catalogs[before.base]
        assert catalog is not None
        try:
            stored = await self._in_time(catalog.look_again(stored.name), deadline)
            stream.again()
            flight = self._flight(request, before.base, stored, before.request_id, head, before.body, stream)
            await self._fly(flight, stream, deadline)
        except LoraplexError as exc:
            stream.error = exc
            return before
        return flight

    def _flight(
        self,
        request: web.BaseRequest,
        base: str,
        stored: StoredAdapter | None,
        request_id: str,
        head: openai.RequestHead,
        body: bytes,
        stream: ClientStream,
    ) -> Flight:
        ref = AdapterRef(base, stored.name, stored.digest) if stored is not None else None
        flight = Flight(
            base,
            ref,
            stored,
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
        )
        stream.describe(lambda: self._head_lines(flight))
        return flight

    async def _fly(self, flight: Flight, stream: ClientStream, deadline: Deadline) -> None:
        """Submits the request and waits for its end; cancels it if the client leaves or its time is over."""
        self._dispatcher.submit(flight)
        late = asyncio.get_running_loop().call_at(deadline.at, self._too_late, flight, deadline)
        try:
            await stream.finished
        finally:
            late.cancel()
            self._dispatcher.cancel(flight)

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

    async def _find(self, base: str, adapter: str, deadline: Deadline | None = None) -> StoredAdapter:
        catalog = self._catalogs[base]
        if catalog is None:
            raise AdapterNotFound(f"The model `{base}` is served without adapters.", param="model")
        known = catalog.known.get(adapter)
        if known is not None or deadline is None:
            return known or await catalog.find(adapter)
        return await self._in_time(catalog.find(adapter), deadline)

    @staticmethod
    async def _in_time(asked: Awaitable[StoredAdapter], deadline: Deadline) -> StoredAdapter:
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
        base, adapter = openai.split_model(model, self._catalogs)
        if adapter is not None:
            await self._find(base, adapter)
            card = openai.model_card(model, self._created, parent=base, root=adapter)
        else:
            card = openai.model_card(model, self._created)
        return web.Response(body=openai.to_json(card), content_type="application/json")

    async def explain(self, request: web.BaseRequest) -> web.Response:
        """What each worker would cost a request for `?model=` now, best first: every term in milliseconds."""
        base, adapter = openai.split_model(request.query.get("model", ""), self._catalogs)
        stored = await self._find(base, adapter) if adapter is not None else None
        ref = AdapterRef(base, stored.name, stored.digest) if stored is not None else None
        tokens = request.query.get("prompt_tokens", "")
        ask = Ask(
            base,
            ref,
            stored.size_bytes if stored is not None else 0,
            min(int(tokens), MAX_EXPLAINED_TOKENS) if tokens.isdecimal() else EXPLAINED_TOKENS,
            session=request.headers.get("x-session-id", "")[:MAX_SESSION],
            arrived=self._dispatcher.clock(),
        )
        found = [openai.candidate(c) for c in self._dispatcher.explain(ask)]
        body = {
            "model": request.query["model"],
            "policy": self._dispatcher.policy,
            "queued": self._dispatcher.queued(base),
            "workers": found,
        }
        return web.Response(body=openai.to_json(body), content_type="application/json")

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
            return web.Response(status=405, body=openai.error_body(error), content_type="application/json")
        return self._answer(RouteNotFound(f"There is no {request.path[:200]} here; see {', '.join(openai.GENERATE_PATHS)} and /v1/models."))

    # ---- around every handler ---------------------------------------------------------------------------------------------------------

    def _guarded(self, handler: Handler) -> Handler:
        """Checks the key and turns errors into answers."""

        async def guarded(request: web.BaseRequest) -> web.StreamResponse:
            try:
                self._check_key(request)
                return await handler(request)
            except LoraplexError as exc:
                self._metrics.error(exc.code)
                return self._answer(exc)

        return guarded

    def _check_key(self, request: web.BaseRequest) -> None:
        if not self._api_keys:
            return
        kind, _, key = request.headers.get("Authorization", "").partition(" ")
        # Digests are compared, so the time taken says nothing about a key's characters.
        if kind.lower() != "bearer" or hashlib.sha256(key.strip().encode()).digest() not in self._api_keys:
            raise InvalidApiKey("Missing or wrong API key; send `Authorization: Bearer KEY`.")

    def _head_lines(self, flight: Flight) -> bytes:
        choice = flight.choice
        if choice is None or flight.life.phase is Phase.QUEUED:  # a comment commits the head
            return b"x-request-id: %b\r\nx-loraplex-policy: %b\r\n" % (flight.request_id.encode(), self._dispatcher.policy.encode())
        tier = f"x-loraplex-adapter-tier: {choice.tier.name.lower()}\r\n" if flight.adapter is not None else ""
        return (
            f"x-request-id: {flight.request_id}\r\nx-loraplex-policy: {self._dispatcher.policy}\r\nx-loraplex-worker: {choice.worker.id}\r\n"
            f"x-loraplex-queue-ms: {(flight.t_sent - flight.t_start) * 1e3:.1f}\r\n{tier}"
        ).encode()

    @staticmethod
    def _answer(error: LoraplexError) -> web.Response:
        status = openai.status_of(error)
        headers = {}
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
