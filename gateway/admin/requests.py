"""Shell. `GET /admin/requests`: the last requests of this gateway process, and the story of one."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from urllib.parse import unquote

from aiohttp import web

from gateway.admin import story
from gateway.admin.scope import json_answer, number
from gateway.telemetry.recorder import MAX_REQUESTS, STEP_S, Recorder, newest
from shared.errors import RequestNotFound

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
PREFIX = "/admin/requests/"
PAGE = 100


class RequestAdmin:
    """`process` is the name of this one: each process of a gateway remembers its own requests."""

    def __init__(self, recorder: Recorder, process: str) -> None:
        self._recorder, self._process = recorder, process

    def routes(self) -> Mapping[tuple[str, str], Handler]:
        return {("GET", "/admin/requests"): self.requests, ("GET", "/admin/series"): self.series}

    def below(self, method: str, path: str) -> Handler | None:
        return self.request if method in ("GET", "HEAD") and path.startswith(PREFIX) else None

    async def requests(self, request: web.BaseRequest) -> web.Response:
        """Newest first; `?key=`, `?adapter=`, `?worker=` and `?status=` leave out others."""
        asked, wall = request.query, wall_offset()
        found = self._recorder.requests(
            tenant=asked.get("key", ""),
            adapter=asked.get("adapter", ""),
            worker=asked.get("worker", ""),
            status=asked.get("status", ""),
        )
        most = int(number(request, "limit", PAGE, MAX_REQUESTS))
        rows = [story.row(e, wall) for e in newest(found, most)]
        return json_answer({"process": self._process, "requests": rows})

    async def request(self, request: web.BaseRequest) -> web.Response:
        """`/admin/requests/{id}`. Raises RequestNotFound."""
        request_id = unquote(request.path.removeprefix(PREFIX))
        found = self._recorder.find(request_id)
        if found is None:
            raise RequestNotFound(
                f"The request `{request_id[:128]}` is not among the last {MAX_REQUESTS} that ended "
                f"in this gateway process ({self._process})."
            )
        return json_answer({"process": self._process, **story.story(found, wall_offset())})

    async def series(self, request: web.BaseRequest) -> web.Response:
        """The last hour, one value for each ten seconds, the newest at the end."""
        now = time.monotonic()
        return json_answer(
            {
                "process": self._process,
                "step_s": STEP_S,
                "until": round(now + wall_offset(), 3),
                "series": self._recorder.series(now),
                "errors": self._recorder.errors(now),
            }
        )


def wall_offset() -> float:
    """To add to the dispatcher's clock for seconds since 1970."""
    return time.time() - time.monotonic()
