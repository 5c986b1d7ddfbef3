"""Shell. `GET /admin/live`: the fleet once a second, as events, for as long as somebody looks.

What a page needs again and again is small; the adapters of a worker are told only when they have
changed. Without a listener nothing is computed.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Mapping

from aiohttp import web

from gateway.accounts.keys import Keys
from gateway.admin import live_views
from gateway.admin.autoscale import ScalingAdmin
from gateway.admin.requests import wall_offset
from gateway.admin.scope import json_answer
from gateway.admin.story import Story, row
from gateway.dispatch.dispatcher import Dispatcher
from gateway.http.bodies import to_json
from gateway.telemetry.recorder import Recorder
from shared.errors import LoraplexError, Overloaded

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
EVERY_S = 1.0
MAX_LISTENERS = 16
"""Each costs about 1 ms a second with 64 workers: all of them stay below 2 % of a core."""
MAX_NEW_REQUESTS = 50
"""In one event; of a busier second the newest."""


class LiveAdmin:
    def __init__(
        self, dispatcher: Dispatcher, recorder: Recorder, scaling: ScalingAdmin, keys: Keys
    ) -> None:
        self._dispatcher, self._recorder = dispatcher, recorder
        self._scaling, self._keys = scaling, keys
        self._listeners = 0

    def routes(self) -> Mapping[tuple[str, str], Handler]:
        return {("GET", "/admin/live"): self.live, ("GET", "/admin/keys"): self.keys}

    async def live(self, request: web.BaseRequest) -> web.StreamResponse:
        """`?adapters=1` tells what each worker holds, too. It ends when this process drains, when
        the key is no longer valid, and when the listener does not read. Raises Overloaded.
        """
        if self._listeners >= MAX_LISTENERS:
            raise Overloaded(f"{MAX_LISTENERS} pages are open already.", retry_after_s=5.0)
        self._listeners += 1
        try:
            return await self._stream(request)
        finally:
            self._listeners -= 1

    async def keys(self, request: web.BaseRequest) -> web.Response:
        """What each account may do, without anything that could be used as a key. What it used is
        at /admin/usage.
        """
        return json_answer({"keys": live_views.accounts(self._keys.ring.accounts.values())})

    async def _stream(self, request: web.BaseRequest) -> web.StreamResponse:
        head = {"Content-Type": "text/event-stream", "Cache-Control": "no-store"}
        answer = web.StreamResponse(headers=head)
        await answer.prepare(request)
        with_adapters = request.query.get("adapters") == "1"
        told: dict[str, object] = {}
        since = -math.inf
        while not self._dispatcher.draining and self._may_listen(request):
            now = time.monotonic()
            event = self._event(told, since, with_adapters)
            since = now
            async with asyncio.timeout(10 * EVERY_S):  # a listener that does not read
                await answer.write(b"data: " + to_json(event) + b"\n\n")
            await asyncio.sleep(EVERY_S)
        return answer

    def _may_listen(self, request: web.BaseRequest) -> bool:
        try:
            self._keys.check_admin(request.headers.get("Authorization", ""))
        except LoraplexError:
            return False
        return True

    def _event(
        self, told: dict[str, object], since: float, with_adapters: bool
    ) -> dict[str, object]:
        fleet, wall = self._dispatcher.fleet, wall_offset()
        workers = sorted(fleet, key=lambda w: w.id)
        requests: list[Story] = []
        for ended in self._recorder.requests():
            if ended.t_end < since or len(requests) == MAX_NEW_REQUESTS:
                break
            requests.append(row(ended, wall))
        event: dict[str, object] = {
            "at": round(time.time(), 3),
            "policy": self._dispatcher.policy,
            "open_requests": self._dispatcher.open_requests,
            "workers": [live_views.worker(w) for w in workers],
            "scaling": self._scaling.facts(),
            "requests": requests,
        }
        if with_adapters:
            event["held"] = live_views.changed(workers, told)
        return event
