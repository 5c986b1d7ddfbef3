"""Shell. `GET /admin/autoscale`: how many workers each model has and should have, and why."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping

import msgspec
from aiohttp import web

from gateway.admin.parameters import Handler, json_answer
from gateway.dispatch.dispatcher import Dispatcher
from gateway.supervisor.autoscaling.scaling_client import ScalingClient


class ScalingAdmin:
    """`bases` are the configured base models. `queued_elsewhere` asks the other gateway processes:
    by base model, what waits there.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        link: ScalingClient,
        bases: list[str],
        queued_elsewhere: Callable[[], Awaitable[Mapping[str, int]]],
    ) -> None:
        self._dispatcher, self._link, self._bases = dispatcher, link, bases
        self._queued_elsewhere = queued_elsewhere

    def routes(self) -> Mapping[tuple[str, str], Handler]:
        return {("GET", "/admin/autoscale"): self.autoscale}

    async def autoscale(self, request: web.BaseRequest) -> web.Response:
        return json_answer(self.facts(await self._queued_elsewhere()))

    def facts(self, queued_elsewhere: Mapping[str, int]) -> dict[str, object]:
        """`supervisor` is false if something else starts the workers (`loraplex worker`,
        Kubernetes). Loraplex then does not know how many are wanted. `age_s` is the age of the
        supervisor's figures.
        """
        last_report_at = self._link.last_report_at
        models = {
            base: {
                **(msgspec.to_builtins(status) if status is not None else {}),
                "queued": self._dispatcher.queued(base) + queued_elsewhere.get(base, 0),
                "present": len(self._dispatcher.fleet.routable(base)),
            }
            for base in self._bases
            for status in [self._dispatcher.scaling.get(base)]
        }
        return {
            "supervisor": last_report_at is not None,
            "age_s": None
            if last_report_at is None
            else round(time.monotonic() - last_report_at, 2),
            "models": models,
        }
