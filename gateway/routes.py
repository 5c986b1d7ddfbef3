"""Shell. The HTTP surface: which handler answers which path, who may ask, and how errors become
answers.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import cast

from aiohttp import web

from gateway.accounts.account import Account
from gateway.adapters.catalog import Catalog
from gateway.admin.operator_api import OperatorAPI
from gateway.admin.parameters import Handler
from gateway.api.generate import GenerationAPI
from gateway.api.models import ModelList, model_card, where
from gateway.api.openapi import docs_page, openapi
from gateway.api.services import GenerationServices, RequestLimits
from gateway.batches.batch_api import BatchAPI
from gateway.dashboard.pages import Pages
from gateway.http.body_reader import BodyLimits, BodyReader, BoundedRequest
from gateway.http.browser_policy import BrowserPolicy
from gateway.http.headers import AiohttpRequest, authorization_of, request_id_of
from gateway.http.json_responses import answer, to_json
from gateway.http.server import ConnectionLimits, Server
from gateway.telemetry.aggregation import ProcessAggregator
from gateway.telemetry.prometheus import OPEN_METRICS, OPEN_METRICS_TYPE, PLAIN_TYPE
from gateway.telemetry.unexpected_errors import UnexpectedErrors
from loraplex import __version__
from shared.api_endpoints import ENDPOINTS, RESPONSES_PATH, errors_of
from shared.errors import LoraplexError, MethodNotAllowed, ModelNotFound, RouteNotFound


class Routes:
    """The routes of one gateway process.

    Args:
        services: those of requests for tokens; the other routes share some of them.
        catalogs: every configured base model; None where it has no adapter store.
        operators: what operators may ask under /admin. They have keys of their own.
        aggregator: the numbers of the other gateway processes, for /metrics.
        browsers: what pages in web browsers may do here.
        batches: files of requests.
    """

    def __init__(
        self,
        services: GenerationServices,
        catalogs: Mapping[str, Catalog | None],
        operators: OperatorAPI,
        aggregator: ProcessAggregator,
        browsers: BrowserPolicy,
        batches: BatchAPI,
    ) -> None:
        self._dispatcher = services.dispatcher
        self._catalogs = catalogs
        self._resolver = services.resolver
        self._metrics = services.metrics
        self._unexpected_errors = UnexpectedErrors(services.metrics)
        self._keys = services.keys
        self._limits = services.limits
        self._browsers = browsers
        self._generation = GenerationAPI(services, browsers)
        self._operators = operators
        self._aggregator = aggregator
        self._batches = batches
        self._pages = Pages(services.keys)
        self._created = int(time.time())
        self._contexts: dict[str, int] = {}
        self._models = ModelList(
            catalogs,
            services.resolver.aliases,
            self._created,
            self._context,
            services.dispatcher.fleet.routable,
        )
        self._routes: dict[tuple[str, str], Handler] = {}
        self._server: Server | None = None

    def configure(self, limits: RequestLimits) -> None:
        """How much a request may be, from now on."""
        self._limits = limits
        if self._server is not None:
            self._server.configure(_body_limits(limits))

    def http_server(self, limits: ConnectionLimits) -> Server:
        """The HTTP server for these routes. A dozen fixed paths need no router, so aiohttp's
        Application is not used. Simple requests take the fast path in front of it.
        """
        self._routes = self._table()
        self._server = Server(
            self._handle,
            fast_path=self._generation.fast_path,
            paths=frozenset(ENDPOINTS),
            intake=BodyReader(_body_limits(self._limits)),
            limits=limits,
        )
        return self._server

    def _table(self) -> dict[tuple[str, str], Handler]:
        """(method, path) -> handler, for every path without an id in it."""
        table: dict[tuple[str, str], Handler] = {
            ("GET", "/v1/models"): self._guarded(self.models),
            ("GET", "/health"): self.health,
            ("GET", "/ready"): self._open(self.ready),
            ("GET", "/metrics"): self._open(self.metrics),
            ("GET", "/version"): self._open(self.version),
            ("GET", "/openapi.json"): self._open(self.openapi),
            ("GET", "/docs"): self._open(self.docs),
        }
        for path in ENDPOINTS:
            table["POST", path] = self._guarded(self._generation.aiohttp_path)
        for route, handler in self._batches.routes().items():
            table[route] = self._guarded(handler)
        for route, handler in self._operators.routes().items():
            table[route] = self._guarded(handler, admin=True)
        for route, handler in self._pages.routes().items():
            table[route] = self._open(handler)
        heads = {("HEAD", path): table["GET", path] for method, path in table if method == "GET"}
        return table | heads

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        origin = request.headers.get("Origin")
        if origin is None or not self._browsers.allows_pages or not _is_api(request.path):
            return await self._find(request)
        if request.method == "OPTIONS":
            return web.Response(status=204, headers=self._browsers.preflight(request.headers.get))
        response = await self._find(request)
        if isinstance(response, web.Response):  # a stream has written them itself
            response.headers.update(self._browsers.cors_headers(origin))
        return response

    async def _find(self, request: web.BaseRequest) -> web.StreamResponse:
        path = request.path
        handler = self._routes.get((request.method, path)) or self._below(request.method, path)
        if handler is None:
            found = self._operators.below(request.method, path)
            handler = self._guarded(found, admin=True) if found is not None else None
        return await (handler or self.nowhere)(request)

    def _below(self, method: str, path: str) -> Handler | None:
        """The handler for a path of the API with an id in it. None: there is no such path."""
        if path.startswith("/v1/models/") and method in ("GET", "HEAD"):
            return self._guarded(self.model)
        if path.startswith(RESPONSES_PATH + "/"):
            _, _, rest = path.removeprefix(RESPONSES_PATH + "/").partition("/")
            if (method, rest) in (("GET", ""), ("POST", "cancel")):
                return self._guarded(self._generation.kept)
        found = self._batches.below(method, path)
        return self._guarded(found) if found is not None else None

    def _allowed(self, path: str) -> list[str]:
        """The methods that this path answers."""
        tried = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
        return [
            method
            for method in tried
            if (method, path) in self._routes
            or self._below(method, path) is not None
            or self._operators.below(method, path) is not None
        ]

    # ---- models ----------------------------------------------------------------------------------

    async def models(self, request: web.BaseRequest) -> web.Response:
        account = self._account_of(request)
        return web.Response(body=await self._models.body(account), content_type="application/json")

    async def model(self, request: web.BaseRequest) -> web.Response:
        model = request.path.removeprefix("/v1/models/")
        self._resolver.check_scope(self._account_of(request), model)
        target = await self._resolver.resolve(model, bytes)
        base, ref = target.base, target.adapter
        parent = base if ref is not None else None
        root = target.alias or (ref.name if ref is not None else None)
        digest = ref.digest if ref is not None and not target.alias else ""
        card = model_card(model, self._created, parent, root, digest, self._context(base))
        card |= where(self._dispatcher.fleet.routable(base), ref)
        return web.Response(body=to_json(card), content_type="application/json")

    def _context(self, base: str) -> int:
        """The context length of the model in tokens, as its workers report it. 0: no worker has
        reported yet.
        """
        for worker in self._dispatcher.fleet.routable(base)[:1]:
            if worker.heartbeat.max_model_len:
                self._contexts[base] = worker.heartbeat.max_model_len
        return self._contexts.get(base, 0)

    def _account_of(self, request: web.BaseRequest) -> Account:
        return self._keys.account_of(authorization_of(AiohttpRequest(request)))

    # ---- operations ------------------------------------------------------------------------------

    async def health(self, request: web.BaseRequest) -> web.Response:
        return web.json_response({"status": "ok"})

    async def ready(self, request: web.BaseRequest) -> web.Response:
        """200 if this gateway can serve: every model that can start has a worker, or may have none
        because a request will start one. At least one model must be so. With `?model=` only that
        one counts.
        """
        dispatcher = self._dispatcher
        serving = {base: len(dispatcher.fleet.routable(base)) for base in self._catalogs}
        why = {base: dispatcher.why_unavailable(base) for base in serving}
        models = {
            base: {
                "ready": bool(n) or (base in dispatcher.from_zero and why[base] is None),
                "workers": n,
                "reason": why[base],
            }
            for base, n in serving.items()
        }
        if (model := request.query.get("model")) is not None:
            if model not in models:
                error = ModelNotFound(f"There is no base model `{model[:200]}` here.")
                return self._answer(error, request)
            ready = bool(models[model]["ready"])
        else:
            able = [m for m in models.values() if m["reason"] is None]
            ready = bool(able) and all(m["ready"] for m in able)
        ready = ready and not dispatcher.draining
        return web.json_response(
            {"ready": ready, "workers": serving, "models": models}, status=200 if ready else 503
        )

    async def metrics(self, request: web.BaseRequest) -> web.Response:
        """The counts of all gateway processes, whichever of them is asked."""
        authorization = authorization_of(AiohttpRequest(request))
        tenants = self._keys.ring.sees_tenants(authorization, time.time())
        accepted = request.headers.get("Accept", "").split(",")
        exemplars = any(one.partition(";")[0].strip() == OPEN_METRICS for one in accepted)
        body = self._metrics.render(
            *await self._aggregator.all(), tenants=tenants, exemplars=exemplars
        )
        kind = OPEN_METRICS_TYPE if exemplars else PLAIN_TYPE
        return web.Response(body=body, headers={"Content-Type": kind})

    async def version(self, request: web.BaseRequest) -> web.Response:
        return web.json_response({"version": __version__})

    async def openapi(self, request: web.BaseRequest) -> web.Response:
        return web.Response(body=to_json(openapi(__version__)), content_type="application/json")

    async def docs(self, request: web.BaseRequest) -> web.Response:
        return web.Response(text=docs_page(openapi(__version__)), content_type="text/html")

    async def nowhere(self, request: web.BaseRequest) -> web.StreamResponse:
        """The answer for a path without a handler: 405 if other methods have one, else 404."""
        path = request.path
        allowed = self._allowed(path)
        if not allowed:
            found = RouteNotFound(f"There is no {path[:200]} here; /docs lists what there is.")
            return self._answer(found, request)
        names = ", ".join(allowed)
        error = MethodNotAllowed(f"{request.method} is not allowed for {path[:200]}, but {names}.")
        refused = self._answer(error, request)
        refused.headers["Allow"] = names
        return refused

    # ---- around every handler --------------------------------------------------------------------

    def _guarded(self, handler: Handler, *, admin: bool = False) -> Handler:
        """The handler behind a check of the key. Errors become answers."""

        async def checked(request: web.BaseRequest) -> web.StreamResponse:
            self._browsers.check(request.method, request.headers.get, admin=admin)
            if admin:
                self._keys.check_admin(authorization_of(AiohttpRequest(request)))
            else:
                cast(BoundedRequest, request).tenant = self._account_of(request).name
            return await handler(request)

        return self._answered(checked)

    def _open(self, handler: Handler) -> Handler:
        """The handler for everybody who knows the gateway by one of its names. A page that has
        bound its own name to 127.0.0.1 does not.
        """

        async def checked(request: web.BaseRequest) -> web.StreamResponse:
            self._browsers.check_host(request.headers.get)
            return await handler(request)

        return self._answered(checked)

    def _answered(self, handler: Handler) -> Handler:
        """The handler with its errors turned into answers."""

        async def answered(request: web.BaseRequest) -> web.StreamResponse:
            try:
                return await handler(request)
            except LoraplexError as exc:
                self._metrics.error(exc.code)
                return self._answer(exc, request)
            except (ConnectionError, web.HTTPException):
                raise
            except Exception as exc:
                # aiohttp's answer would be a bare 500, and its log would quote the request
                return self._answer(self._unexpected_errors.note(exc), request)

        return answered

    @staticmethod
    def _answer(error: LoraplexError, request: web.BaseRequest) -> web.Response:
        request_id = error.request_id or request_id_of(AiohttpRequest(request))
        status, headers, body = answer(error, request_id, errors_of(request.path))
        return web.Response(
            status=status, body=body, content_type="application/json", headers=headers
        )


def _body_limits(limits: RequestLimits) -> BodyLimits:
    return BodyLimits(limits.max_body_bytes, limits.max_unfinished_body_bytes)


_FOR_PAGES = frozenset({*ENDPOINTS, "/version", "/openapi.json"})


def _is_api(path: str) -> bool:
    """Whether pages that may call the API may call this path."""
    return path.startswith("/v1/") or path in _FOR_PAGES
