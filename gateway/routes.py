"""Shell. The HTTP surface: which path is answered by whom, who may ask, and how errors become
answers.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping

from aiohttp import web

from gateway.accounts.account import Account
from gateway.adapters.catalog import Catalog
from gateway.admin.adapters import AdapterAdmin
from gateway.admin.aliases import AliasAdmin
from gateway.admin.autoscale import ScalingAdmin
from gateway.admin.live import LiveAdmin
from gateway.admin.requests import RequestAdmin
from gateway.admin.usage import UsageAdmin
from gateway.admin.workers import WorkerAdmin
from gateway.api.exchange import GenerationServices
from gateway.api.generate import GenerationAPI
from gateway.api.models import ModelList, model_card, where
from gateway.api.openapi import docs_page, openapi
from gateway.dashboard.pages import Pages
from gateway.http.bodies import answer, to_json
from gateway.http.browsers import BrowserPolicy
from gateway.http.headers import AiohttpRequest, authorization_of, request_id_of
from gateway.http.intake import BodyIntake, BodyLimits
from gateway.http.server import ConnectionLimits, Server
from gateway.telemetry.aggregation import ProcessAggregator
from gateway.telemetry.failures import Failures
from loraplex import __version__
from shared.endpoints import ENDPOINTS, RESPONSES_PATH, errors_of
from shared.errors import LoraplexError, MethodNotAllowed, ModelNotFound, RouteNotFound

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class Routes:
    """The routes of one gateway process.

    Args:
        services: those of requests for tokens; the other routes share some of them.
        catalogs: every configured base model; None where it has no adapter store.
        admin: what operators may ask, with keys of their own.
    """

    def __init__(
        self,
        services: GenerationServices,
        catalogs: Mapping[str, Catalog | None],
        admin: AdapterAdmin,
        aliases: AliasAdmin,
        aggregator: ProcessAggregator,
        scaling: ScalingAdmin,
        usage: UsageAdmin,
        workers: WorkerAdmin,
        browsers: BrowserPolicy,
        requests: RequestAdmin,
        live: LiveAdmin,
    ) -> None:
        self._dispatcher = services.dispatcher
        self._catalogs = catalogs
        self._resolver = services.resolver
        self._metrics = services.metrics
        self._failures = Failures(services.metrics)
        self._keys = services.keys
        self._limits = services.limits
        self._browsers = browsers
        self._generation = GenerationAPI(services, browsers)
        self._admin = admin
        self._aliases = aliases
        self._aggregator = aggregator
        self._scaling = scaling
        self._usage = usage
        self._workers = workers
        self._requests = requests
        self._live = live
        self._pages = Pages(services.keys)
        self._created = int(time.time())
        self._contexts: dict[str, int] = {}
        self._models = ModelList(catalogs, services.resolver.aliases, self._created, self._context)
        self._routes: dict[tuple[str, str], Handler] = {}

    def http_server(self, limits: ConnectionLimits) -> Server:
        """aiohttp without its Application (a dozen fixed paths need no router), behind the fast
        path for simple requests.
        """
        self._routes = {
            ("POST", path): self._guarded(self._generation.aiohttp_path) for path in ENDPOINTS
        }
        self._routes |= {
            ("GET", "/v1/models"): self._guarded(self.models),
            ("GET", "/health"): self.health,
            ("GET", "/ready"): self.ready,
            ("GET", "/metrics"): self.metrics,
            ("GET", "/version"): self.version,
            ("GET", "/openapi.json"): self.openapi,
            ("GET", "/docs"): self.docs,
        }
        operators = {
            **self._admin.routes(),
            **self._aliases.routes(),
            **self._scaling.routes(),
            **self._usage.routes(),
            **self._workers.routes(),
            **self._requests.routes(),
            **self._live.routes(),
        }
        self._routes |= {
            route: self._guarded(handler, admin=True) for route, handler in operators.items()
        }
        self._routes |= {
            route: self._answered(handler) for route, handler in self._pages.routes().items()
        }
        self._routes |= {
            ("HEAD", path): handler
            for (method, path), handler in self._routes.items()
            if method == "GET"
        }
        bodies = BodyLimits(self._limits.max_body_bytes, self._limits.max_unfinished_body_bytes)
        return Server(
            self._handle,
            fast_path=self._generation.fast_path,
            paths=frozenset(ENDPOINTS),
            intake=BodyIntake(bodies),
            limits=limits,
        )

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        origin = request.headers.get("Origin")
        if origin is None or not self._browsers.allows_pages or not request.path.startswith("/v1/"):
            return await self._find(request)
        if request.method == "OPTIONS":
            return web.Response(status=204, headers=self._browsers.preflight(request.headers.get))
        response = await self._find(request)
        if isinstance(response, web.Response):  # a stream has written them itself
            response.headers.update(self._browsers.cors_headers(origin))
        return response

    async def _find(self, request: web.BaseRequest) -> web.StreamResponse:
        path = _canonical(request.path)
        handler = self._routes.get((request.method, path)) or self._below(request.method, path)
        if handler is None:
            rooms = (self._admin, self._aliases, self._workers, self._requests)
            found = next((f for room in rooms if (f := room.below(request.method, path))), None)
            handler = self._guarded(found, admin=True) if found is not None else None
        return await (handler or self.nowhere)(request)

    def _below(self, method: str, path: str) -> Handler | None:
        """What has an id in its path."""
        if path.startswith("/v1/models/") and method in ("GET", "HEAD"):
            return self._guarded(self.model)
        if path.startswith(RESPONSES_PATH + "/"):
            _, _, rest = path.removeprefix(RESPONSES_PATH + "/").partition("/")
            if (method, rest) in (("GET", ""), ("POST", "cancel")):
                return self._guarded(self._generation.kept)
        return None

    def _allowed(self, path: str) -> list[str]:
        """The methods that the path has."""
        tried = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
        return [
            method
            for method in tried
            if (method, path) in self._routes
            or self._below(method, path) is not None
            or self._admin.below(method, path) is not None
            or self._aliases.below(method, path) is not None
        ]

    # ---- models ----------------------------------------------------------------------------------

    async def models(self, request: web.BaseRequest) -> web.Response:
        account = self._account_of(request)
        return web.Response(body=await self._models.body(account), content_type="application/json")

    async def model(self, request: web.BaseRequest) -> web.Response:
        model = _canonical(request.path).removeprefix("/v1/models/")
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
        """The model's context in tokens, as its workers have told; 0: none has yet."""
        for worker in self._dispatcher.fleet.routable(base)[:1]:
            if worker.beat.max_model_len:
                self._contexts[base] = worker.beat.max_model_len
        return self._contexts.get(base, 0)

    def _account_of(self, request: web.BaseRequest) -> Account:
        return self._keys.account_of(authorization_of(AiohttpRequest(request)))

    # ---- operations ------------------------------------------------------------------------------

    async def health(self, request: web.BaseRequest) -> web.Response:
        return web.json_response({"status": "ok"})

    async def ready(self, request: web.BaseRequest) -> web.Response:
        """200 once every model that can start has a worker that serves, or may have none because a
        request will start one; and at least one model is so. With `?model=`: whether this one is.
        """
        dispatcher = self._dispatcher
        serving = {base: len(dispatcher.fleet.routable(base)) for base in self._catalogs}
        asleep = {
            base
            for base, status in dispatcher.scaling.items()
            if status.scales and not status.min_replicas
        }
        why = {base: dispatcher.why_unavailable(base) for base in serving}
        models = {
            base: {
                "ready": bool(n) or (base in asleep and why[base] is None),
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
        """Of all gateway processes, whichever is asked."""
        ring = self._keys.ring
        tenants = not ring.apart or ring.is_admin(request.headers.get("Authorization", ""))
        body = self._metrics.render(*await self._aggregator.all(), tenants=tenants)
        return web.Response(
            body=body, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        )

    async def version(self, request: web.BaseRequest) -> web.Response:
        return web.json_response({"version": __version__})

    async def openapi(self, request: web.BaseRequest) -> web.Response:
        return web.Response(body=to_json(openapi(__version__)), content_type="application/json")

    async def docs(self, request: web.BaseRequest) -> web.Response:
        return web.Response(text=docs_page(openapi(__version__)), content_type="text/html")

    async def nowhere(self, request: web.BaseRequest) -> web.StreamResponse:
        path = _canonical(request.path)
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
        """Checks the key and turns errors into answers."""
        check = self._keys.check_admin if admin else self._keys.account_of

        async def checked(request: web.BaseRequest) -> web.StreamResponse:
            self._browsers.check(request.method, request.headers.get, admin=admin)
            check(authorization_of(AiohttpRequest(request)))
            return await handler(request)

        return self._answered(checked)

    def _answered(self, handler: Handler) -> Handler:
        """Turns errors into answers."""

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
                return self._answer(self._failures.note(exc), request)

        return answered

    @staticmethod
    def _answer(error: LoraplexError, request: web.BaseRequest) -> web.Response:
        request_id = error.request_id or request_id_of(AiohttpRequest(request))
        status, headers, body = answer(error, request_id, errors_of(request.path))
        return web.Response(
            status=status, body=body, content_type="application/json", headers=headers
        )


def _canonical(path: str) -> str:
    """A slash at its end says nothing."""
    return path.rstrip("/") or "/"
