"""Shell. `GET /admin/live`: the state of the fleet once a second, as server-sent events. While
nobody listens nothing is computed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping

from aiohttp import web

from gateway.accounts.keys import Keys
from gateway.accounts.limiter import Limiter
from gateway.admin import live_feed_views
from gateway.admin.autoscale import ScalingAdmin
from gateway.admin.history import ProcessNews, RequestRow, queued_in
from gateway.admin.parameters import Handler, json_answer
from gateway.admin.requests.timeline import row
from gateway.dispatch.dispatcher import Dispatcher
from gateway.http.headers import AiohttpRequest, authorization_of
from gateway.http.json_responses import to_json
from gateway.telemetry.ended_request import EndedRequest
from gateway.telemetry.prometheus import Metrics
from gateway.telemetry.recorder import MAX_NEWS, Recorder, newest
from gateway.telemetry.wall_clock import wall_offset
from shared.errors import LoraplexError, TooManyPages
from shared.link.messages import AdapterState, WorkerId

MAX_LISTENERS = 16
"""All of them get the same bytes, so the bound is one of memory: each may be an event behind."""
EVERY_S = 1.0
WRITE_TIMEOUT_S = 10.0
"""A listener that does not read for so long is cut off."""


GONE = b"null"


class LiveSnapshot:
    """What all pages show, made once a second for all of them together. Whoever comes first after
    EVERY_S makes the next event.

    The adapters of a worker are encoded again only when they have changed. A listener that has seen
    the event before gets those changes; any other gets the adapters of all workers.

    `process` is the name of this gateway process. `news` asks the others; None: there are none.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        recorder: Recorder,
        scaling: ScalingAdmin,
        process: str,
        news: Callable[[dict[str, float]], Awaitable[dict[str, ProcessNews]]] | None,
    ) -> None:
        self._dispatcher, self._recorder, self._scaling = dispatcher, recorder, scaling
        self._process, self._news = process, news
        self._asking = asyncio.Lock()
        self._others: dict[str, ProcessNews] = {}
        self._rows_elsewhere: list[RequestRow] = []
        """The last ones of other processes, the newest first."""
        self.number = 0
        """Of the last event. It never falls."""
        self.made_at = 0.0
        self._facts: dict[str, object] = {}
        self._head = b"{}"
        self._held: dict[WorkerId, tuple[tuple[AdapterState, ...], bytes]] = {}
        self._changed: dict[WorkerId, bytes] = {}
        self._held_at = self._held_before = 0

    def forget(self) -> None:
        """Nobody listens any more."""
        self._recorder.follow(False)
        self._held, self._changed, self._facts = {}, {}, {}
        self._others, self._rows_elsewhere = {}, []
        self.made_at, self._held_at = 0.0, 0

    async def refresh(self) -> None:
        """Makes the next event if its time has come."""
        if self._news is None:
            self._refresh([])
        elif self._due():
            async with self._asking:
                if self._due():  # nobody else has made it meanwhile
                    told = await self._news({p: news.until for p, news in self._others.items()})
                    self._others |= told
                    self._refresh(_in_order(row for news in told.values() for row in news.rows))

    def _due(self) -> bool:
        return not self.made_at or time.monotonic() - self.made_at >= EVERY_S

    def _refresh(self, elsewhere: list[RequestRow]) -> None:
        """`elsewhere`: the requests of other processes that have ended since the last event."""
        if not self._due():
            return
        if not self.made_at:
            self._recorder.follow(True)
        self._rows_elsewhere = [*elsewhere, *self._rows_elsewhere][:MAX_NEWS]
        self.number, self.made_at = self.number + 1, time.monotonic()
        others = self._others.values()
        workers = sorted(self._dispatcher.fleet, key=lambda w: w.id)
        self._facts = {
            "at": round(time.time(), 3),
            "policy": self._dispatcher.policy,
            "open_requests": self._dispatcher.open_requests + sum(o.open_requests for o in others),
            "workers": [
                live_feed_views.worker(w, self._recorder, sum(o.moved.get(w.id, 0) for o in others))
                for w in workers
            ],
            "scaling": self._scaling.facts(queued_in(others)),
        }
        self._head = self._with(self._recorder.news(), elsewhere)

    def event(self, seen: int, *, with_adapters: bool) -> bytes:
        """The event for a listener whose last one had the number `seen` (0: it has none)."""
        follows = bool(seen) and seen == self.number - 1
        head = self._head if follows else self._first()
        if with_adapters:
            self._refresh_held()
            whole = not seen or seen != self._held_before
            shown = {w: held for w, (_, held) in self._held.items()} if whole else self._changed
            adapters = b",".join(to_json(worker) + b":" + held for worker, held in shown.items())
            head = (
                head[:-1] + b',"held":{' + adapters + b'},"held_is_whole":' + to_json(whole) + b"}"
            )
        return b"data: " + head + b"\n\n"

    def _refresh_held(self) -> None:
        if self._held_at == self.number:
            return
        self._held_before, self._held_at = self._held_at, self.number
        fleet = self._dispatcher.fleet
        self._changed = dict.fromkeys(self._held.keys() - {w.id for w in fleet}, GONE)
        for gone in self._changed:
            del self._held[gone]
        for w in fleet:
            states, before = w.heartbeat.adapters, self._held.get(w.id)
            if before is None or (before[0] is not states and before[0] != states):
                self._changed[w.id] = to_json(live_feed_views.held(states))
                self._held[w.id] = states, self._changed[w.id]

    def _first(self) -> bytes:
        return self._with(newest(self._recorder.requests(), MAX_NEWS), self._rows_elsewhere)

    def _with(self, requests: list[EndedRequest], elsewhere: list[RequestRow]) -> bytes:
        wall = wall_offset()
        rows = [row(ended, wall, self._process) for ended in requests]
        shown = _in_order([*rows, *elsewhere])[:MAX_NEWS] if elsewhere else rows
        return to_json({**self._facts, "requests": shown})


def _in_order(rows: Iterable[RequestRow]) -> list[RequestRow]:
    """The newest first."""
    return sorted(rows, key=lambda row: str(row["at"]), reverse=True)


class LiveFeedAdmin:
    def __init__(
        self,
        dispatcher: Dispatcher,
        snapshot: LiveSnapshot,
        keys: Keys,
        limiter: Limiter,
        metrics: Metrics,
    ) -> None:
        self._dispatcher, self._snapshot = dispatcher, snapshot
        self._keys, self._limiter, self._metrics = keys, limiter, metrics

    def routes(self) -> Mapping[tuple[str, str], Handler]:
        return {("GET", "/admin/live"): self.live, ("GET", "/admin/keys"): self.keys}

    async def live(self, request: web.BaseRequest) -> web.StreamResponse:
        """`?adapters=1` adds what each worker holds. The stream ends when this process drains, when
        the key becomes invalid, or when the listener does not read.

        Raises TooManyPages if there are MAX_LISTENERS already.
        """
        metrics = self._metrics
        if metrics.live_listeners >= MAX_LISTENERS:
            raise TooManyPages(f"{MAX_LISTENERS} pages are open already.", retry_after_s=5.0)
        metrics.live_listeners += 1
        try:
            return await self._stream(request)
        finally:
            metrics.live_listeners -= 1
            if not metrics.live_listeners:
                self._snapshot.forget()

    async def keys(self, request: web.BaseRequest) -> web.Response:
        """What each account may do, and what is left of its limits now. Nothing in the answer can
        be used as a key. /admin/usage has what was used.
        """
        accounts = sorted(self._keys.ring.accounts.values(), key=lambda a: a.name)
        rows = [live_feed_views.account(a, self._limiter.levels(a)) for a in accounts]
        return json_answer({"keys": rows})

    async def _stream(self, request: web.BaseRequest) -> web.StreamResponse:
        head = {"Content-Type": "text/event-stream", "Cache-Control": "no-store"}
        answer, snapshot = web.StreamResponse(headers=head), self._snapshot
        await answer.prepare(request)
        if request.method == "HEAD":
            return answer
        with_adapters = request.query.get("adapters") == "1"
        seen = 0
        while not self._dispatcher.draining and self._may_listen(request):
            await snapshot.refresh()
            if snapshot.number > seen:
                event = snapshot.event(seen, with_adapters=with_adapters)
                seen = snapshot.number
                # what waits for a slow reader is this one event; it misses those in between
                async with asyncio.timeout(WRITE_TIMEOUT_S):
                    await answer.write(event)
            await asyncio.sleep(max(0.0, snapshot.made_at + EVERY_S - time.monotonic()))
        return answer

    def _may_listen(self, request: web.BaseRequest) -> bool:
        try:
            self._keys.check_admin(authorization_of(AiohttpRequest(request)))
        except LoraplexError:
            return False
        return True
