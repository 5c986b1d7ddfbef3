"""Shell. Everything that operators may ask under /admin, as one value with one table of routes."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.admin.adapters import AdapterAdmin
from gateway.admin.advise import AdviseAdmin
from gateway.admin.aliases import AliasAdmin
from gateway.admin.autoscale import ScalingAdmin
from gateway.admin.history import HistoryAdmin
from gateway.admin.live_feed import LiveFeedAdmin
from gateway.admin.parameters import Handler
from gateway.admin.usage import UsageAdmin
from gateway.admin.workers import WorkerAdmin


@dataclass(frozen=True, slots=True)
class OperatorAPI:
    """The parts of /admin. Each handler needs an admin key, which the caller checks."""

    adapters: AdapterAdmin
    aliases: AliasAdmin
    scaling: ScalingAdmin
    usage: UsageAdmin
    workers: WorkerAdmin
    history: HistoryAdmin
    live_feed: LiveFeedAdmin
    advise: AdviseAdmin

    def routes(self) -> dict[tuple[str, str], Handler]:
        """(method, path) -> handler, for the paths without an id in them."""
        return {
            **self.adapters.routes(),
            **self.aliases.routes(),
            **self.scaling.routes(),
            **self.usage.routes(),
            **self.workers.routes(),
            **self.history.routes(),
            **self.live_feed.routes(),
            **self.advise.routes(),
        }

    def below(self, method: str, path: str) -> Handler | None:
        """The handler for a path with an id in it. None: /admin has no such path."""
        parts = (self.adapters, self.aliases, self.workers, self.history)
        return next((found for part in parts if (found := part.below(method, path))), None)
