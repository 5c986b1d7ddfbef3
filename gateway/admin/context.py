"""Shell. What the handlers of /admin share: the catalogs and the fleet of this gateway process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from aiohttp import web

from gateway.adapters.catalog import Catalog
from gateway.admin.parameters import choice, listed
from gateway.dispatch.dispatcher import Dispatcher
from gateway.fleet.worker_view import WorkerView
from gateway.http.headers import MAX_SESSION
from gateway.routing.policy import RoutingRequest
from shared.adapters.identity import AdapterRef, StoredAdapter
from shared.errors import AdapterNotFound, InvalidRequest, LoraplexError, WorkerUnavailable


class AdminContext:
    """`catalogs` maps each configured base model to its catalog; None: it has no adapter store."""

    def __init__(self, dispatcher: Dispatcher, catalogs: Mapping[str, Catalog | None]) -> None:
        self.dispatcher = dispatcher
        self.catalogs = catalogs

    def with_adapters(self) -> list[str]:
        """The base models that have an adapter store."""
        return [b for b, catalog in self.catalogs.items() if catalog is not None]

    def need(self, workers: Sequence[WorkerView]) -> None:
        """Raises WorkerUnavailable if there are none."""
        if not workers:
            raise WorkerUnavailable("No worker of this model serves now.", retry_after_s=1.0)

    def workers(self, base: str) -> list[WorkerView]:
        """The workers of the base model that take requests, by their ids."""
        return sorted(self.dispatcher.fleet.routable(base), key=lambda w: w.id)

    def base(self, request: web.BaseRequest) -> str:
        """The base model that the request means. Without `?base=` it is the only one with adapters.

        Raises InvalidRequest if there are several.
        """
        with_adapters = self.with_adapters()
        if "base" in request.query:
            return choice("base", request.query["base"], with_adapters)
        if len(with_adapters) != 1:
            raise InvalidRequest(
                f"Say which base model: ?base= one of {listed(with_adapters)}.", param="base"
            )
        return with_adapters[0]

    def catalog(self, base: str) -> Catalog:
        """Raises AdapterNotFound if the base model has no adapter store."""
        catalog = self.catalogs[base]
        if catalog is None:
            raise AdapterNotFound(f"The model `{base}` is served without adapters.", param="model")
        return catalog

    async def stored(self, base: str, name: str, *, needed: bool) -> StoredAdapter | None:
        """The store's newest version. None if the store has none and `needed` is false."""
        try:
            return await self.catalog(base).find(name)
        except LoraplexError:
            if needed:
                raise
            return None

    def is_known(self, base: str, name: str) -> bool:
        """Whether the name is in the catalog or on a worker."""
        return name in self.known(base) or any(
            s.name == name for w in self.workers(base) for s in w.heartbeat.adapters
        )

    def known(self, base: str) -> Mapping[str, StoredAdapter]:
        """Name -> adapter, as the catalog lists them now."""
        catalog = self.catalogs[base]
        return {} if catalog is None else catalog.known

    def routing_request(
        self,
        base: str,
        ref: AdapterRef | None,
        stored: StoredAdapter | None,
        prompt_tokens: int,
        session: str,
    ) -> RoutingRequest:
        """The request as routing would get it, to ask where it would go."""
        return RoutingRequest(base, ref, prompt_tokens, session=session[:MAX_SESSION])
