"""Shell. `GET /admin/autoscale`: how many workers each model has and should have, and why."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping

import msgspec
from aiohttp import web

from gateway.admin.scope import json_answer
from gateway.dispatch.dispatcher import Dispatcher
from gateway.supervisor.load_link import LoadLink

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class ScalingAdmin:
    """`bases` are the configured base models."""

    def __init__(self, dispatcher: Dispatcher, link: LoadLink, bases: list[str]) -> None:
        self._dispatcher, self._link, self._bases = dispatcher, link, bases

    def routes(self) -> Mapping[tuple[str, str], Handler]:
        return {("GET", "/admin/autoscale"): self.autoscale}

    async def autoscale(self, request: web.BaseRequest) -> web.Response:
        return json_answer(self.facts())

    def facts(self) -> dict[str, object]:
        """`supervisor` is false where something else starts the workers (`loraplex worker`,
        Kubernetes); then Loraplex wants no number of them. `age_s` is the age of the figures.
        """
        heard_at = self._link.heard_at
        models = {
            base: {
                **(msgspec.to_builtins(status) if status is not None else {}),
                "queued": self._dispatcher.queued(base),
                "present": len(self._dispatcher.fleet.routable(base)),
            }
            for base in self._bases
            for status in [self._dispatcher.scaling.get(base)]
        }
        return {
            "supervisor": heard_at is not None,
            "age_s": None if heard_at is None else round(time.monotonic() - heard_at, 2),
            "models": models,
        }
