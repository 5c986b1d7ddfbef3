"""Shell. `GET /admin/advise`: how many slots, workers and pins the traffic of each model needs. It
also warns in the log while more adapters are in flight than there are slots.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping

import msgspec
from aiohttp import web

from gateway.admin.parameters import Handler, json_answer, number
from gateway.advisor.advice import FleetSize, Goal, Oversubscription, advise
from gateway.advisor.traffic import Traffic, TrafficCounter
from gateway.dispatch.dispatcher import Dispatcher

log = logging.getLogger("loraplex.advisor")

LOOK_S = 5.0
FAR_S = 3600.0


class AdviseAdmin:
    """`processes` share the requests of this host evenly: each counts its own, and so many times
    more are assumed.
    """

    def __init__(
        self, dispatcher: Dispatcher, traffic: TrafficCounter, bases: list[str], processes: int
    ) -> None:
        self._dispatcher, self._traffic = dispatcher, traffic
        self._bases, self._processes = bases, processes
        self._watched = {base: Oversubscription() for base in bases}

    def routes(self) -> Mapping[tuple[str, str], Handler]:
        return {("GET", "/admin/advise"): self.advise}

    async def advise(self, request: web.BaseRequest) -> web.Response:
        """`?miss_rate=` and `?ttft_p99_s=` are the goal. With `?traffic=1` the answer also has what
        was counted: `loraplex advise --simulate` needs it. No simulation runs here, since it takes
        a core for up to a minute.
        """
        wanted_s = number(request, "ttft_p99_s", 0.0, FAR_S) or None
        goal = Goal(number(request, "miss_rate", Goal().miss_rate, 1.0), wanted_s)
        now = time.monotonic()
        seen = {base: self._seen_of(base, now) for base in self._bases}
        fleets = {base: self._fleet(base) for base in self._bases}
        # formulas over thousands of adapters: not on the loop that serves
        advices = await asyncio.to_thread(
            lambda: {base: advise(seen[base], fleets[base], goal) for base in seen}
        )
        found = {"goal": msgspec.to_builtins(goal), "models": msgspec.to_builtins(advices)}
        if request.query.get("traffic"):
            found["traffic"] = msgspec.to_builtins(seen)
        return json_answer(found)

    def _seen_of(self, base: str, now: float) -> Traffic:
        traffic = self._traffic.traffic(base, now)
        return traffic.plus(Traffic(traffic.span_s / self._processes - traffic.span_s))

    def _fleet(self, base: str) -> FleetSize:
        """By its smallest worker; the workers of one model are alike."""
        heartbeats = [worker.heartbeat for worker in self._dispatcher.fleet.routable(base)]
        return FleetSize(
            len(heartbeats),
            min((heartbeat.slots for heartbeat in heartbeats), default=0),
            min((heartbeat.capacity for heartbeat in heartbeats), default=0),
            max((heartbeat.load_s for heartbeat in heartbeats), default=0.0),
        )

    async def run(self) -> None:
        """Looks at the fleet every LOOK_S, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            now = time.monotonic()
            for base, load in self._dispatcher.loads(self._bases).items():
                slots = sum(w.slots for w in load.workers.values() if w.serving)
                if self._watched[base].look(len(load.adapters), slots, now):
                    log.warning(
                        "oversubscribed: more adapters in flight than slots, so requests wait for "
                        "slots; `loraplex advise` says how many would do",
                        extra={"model": base, "adapters": len(load.adapters), "slots": slots},
                    )
