"""Shell. What every operator's request needs: its parts, read and checked in one way, and what this
gateway knows of adapters and workers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import msgspec
from aiohttp import web

from gateway.adapters.catalog import Catalog
from gateway.dispatch.dispatcher import Dispatcher
from gateway.fleet.worker_view import WorkerView
from gateway.http.bodies import to_json
from gateway.http.headers import MAX_SESSION
from gateway.routing.policy import RoutingRequest
from shared.adapters.identity import AdapterRef, StoredAdapter
from shared.errors import AdapterNotFound, InvalidRequest, LoraplexError, WorkerUnavailable

T = TypeVar("T")


class AdminScope:
    """The catalogs and the fleet, for operators' requests."""

    def __init__(self, dispatcher: Dispatcher, catalogs: Mapping[str, Catalog | None]) -> None:
        self.dispatcher = dispatcher
        self.catalogs = catalogs

    def with_adapters(self) -> list[str]:
        return [b for b, catalog in self.catalogs.items() if catalog is not None]

    def need(self, workers: Sequence[WorkerView]) -> None:
        if not workers:
            raise WorkerUnavailable("No worker of this model serves now.", retry_after_s=1.0)

    def workers(self, base: str) -> list[WorkerView]:
        return sorted(self.dispatcher.fleet.routable(base), key=lambda w: w.id)

    def base(self, request: web.BaseRequest) -> str:
        with_adapters = self.with_adapters()
        if "base" in request.query:
            return choice("base", request.query["base"], with_adapters)
        if len(with_adapters) != 1:
            raise InvalidRequest(
                f"Say which base model: ?base= one of {listed(with_adapters)}.", param="base"
            )
        return with_adapters[0]

    def catalog(self, base: str) -> Catalog:
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
            s.name == name for w in self.workers(base) for s in w.beat.adapters
        )

    def known(self, base: str) -> Mapping[str, StoredAdapter]:
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
        size_bytes = stored.size_bytes if stored is not None else 0
        return RoutingRequest(
            base,
            ref,
            size_bytes,
            prompt_tokens,
            session=session[:MAX_SESSION],
            arrived=self.dispatcher.clock(),
        )


async def body_of(request: web.BaseRequest, kind: type[T]) -> T:
    raw = await request.read()
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise InvalidRequest(f"The request body is not what this path takes: {exc}") from exc


def choice(key: str, value: str, allowed: Sequence[str] | Mapping[str, object]) -> str:
    if value not in allowed:
        raise InvalidRequest(
            f"`{key}` must be one of {listed(list(allowed))}, not `{value[:200]}`.", param=key
        )
    return value


def number(request: web.BaseRequest, key: str, otherwise: float, most: float) -> float:
    given = request.query.get(key)
    if given is None:
        return otherwise
    try:
        number = float(given) if isinstance(most, float) else int(given)
    except ValueError:
        number = 0
    if not 0 < number <= most:  # false for NaN too
        raise InvalidRequest(f"`{key}` must be a number above 0 and at most {most:g}.", param=key)
    return number


def listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{n}`" for n in names[:10]) or "(none)"


def json_answer(value: object) -> web.Response:
    return web.Response(body=to_json(value), content_type="application/json")


def text_answer(text: str) -> web.Response:
    return web.Response(text=text)
