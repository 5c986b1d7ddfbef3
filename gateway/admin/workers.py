"""Shell. Replaces workers on an operator's request: `POST /admin/workers/{id}/drain` for one, `POST
/admin/rollout` for all in turn.

A worker is replaced in three steps. First, other workers load the adapters in use that only this
one has. Then it drains, and its streams move to others. Whoever started it (`serve`, Kubernetes)
then starts a new one. A rollout waits for that before it goes on to the next worker. So it never
takes away more than one worker of a model.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping

from aiohttp import web

from gateway.admin.parameters import Handler, choice, json_answer, listed, number
from gateway.dispatch.dispatcher import Dispatcher
from gateway.fleet.handover_plan import handovers
from gateway.fleet.worker_view import WorkerView
from gateway.http.json_responses import to_json
from shared.errors import InvalidRequest, LoraplexError, NotDoneInTime
from shared.link.messages import AdapterAction

log = logging.getLogger("loraplex.rollout")


PREFIX, DRAIN = "/admin/workers/", "/drain"
WARM_S = 10.0
"""How long others may take to load the adapters. An adapter that is not loaded by then is loaded by
its next request.
"""
BACK_S, MAX_BACK_S = 600.0, 3600.0  # for a replaced worker to serve again
MAX_WAIT_S = 3600.0
LOOK_S = 0.1


class WorkerAdmin:
    """Only one rollout can run at a time in this process."""

    def __init__(self, dispatcher: Dispatcher, bases: list[str]) -> None:
        self._dispatcher, self._bases = dispatcher, bases
        self._busy = asyncio.Lock()

    def routes(self) -> Mapping[tuple[str, str], Handler]:
        return {("POST", "/admin/rollout"): self.rollout}

    def below(self, method: str, path: str) -> Handler | None:
        """The handler for paths that hold a worker's id."""
        found = method == "POST" and path.startswith(PREFIX) and path.endswith(DRAIN)
        return self.drain if found else None

    async def drain(self, request: web.BaseRequest) -> web.Response:
        """Answers once the worker takes no new requests. `?wait_s=` is how long its requests may
        take to end by themselves before they are moved (default 0).
        """
        wait_s = _wait_s(request)
        worker = self._worker(request.path.removeprefix(PREFIX).removesuffix(DRAIN))
        requests = worker.load
        warmed = await self._replace(worker, wait_s)
        return json_answer(
            {"worker": worker.id, "state": "draining", "requests": requests, "warmed": warmed}
        )

    async def rollout(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answers one JSON line per step as it happens. The last line says `done` or `error`. If
        the client leaves, the rollout ends after the current step. `?model=` restricts it to one
        base model.
        """
        wait_s, back_s = _wait_s(request), number(request, "timeout_s", BACK_S, MAX_BACK_S)
        model = request.query.get("model")
        bases = self._bases if model is None else [choice("model", model, self._bases)]
        if self._busy.locked():
            raise InvalidRequest("A rollout is under way already.")
        async with self._busy:
            answer = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
            await answer.prepare(request)
            try:
                async for step in self._all_in_turn(bases, wait_s, back_s):
                    log.info("rollout", extra=step)
                    await answer.write(to_json(step) + b"\n")
            except LoraplexError as exc:
                await answer.write(to_json({"error": exc.message}) + b"\n")
            await answer.write_eof()
        return answer

    async def _all_in_turn(
        self, bases: list[str], wait_s: float, back_s: float
    ) -> AsyncIterator[dict[str, object]]:
        fleet, done = self._dispatcher.fleet, 0
        todo = [w for base in bases for w in sorted(fleet.routable(base), key=lambda w: w.id)]
        for worker in todo:
            if fleet.get(worker.id) is not worker or not worker.routable:
                continue  # it has been replaced meanwhile, or has left
            serving = len(fleet.routable(worker.heartbeat.base))
            began, requests = time.monotonic(), worker.load
            warmed = await self._replace(worker, wait_s)
            yield {
                "worker": worker.id,
                "step": "draining",
                "requests": requests,
                "warmed": warmed,
            }
            await self._until_replaced(worker, serving, back_s)
            took_s = round(time.monotonic() - began, 1)
            yield {"worker": worker.id, "step": "replaced", "took_s": took_s}
            done += 1
        yield {"done": done}

    async def _replace(self, worker: WorkerView, wait_s: float) -> int:
        """Drains the worker. Returns how many of its adapters were loaded elsewhere first."""
        others = [
            w for w in self._dispatcher.fleet.routable(worker.heartbeat.base) if w is not worker
        ]
        loads = [
            self._dispatcher.send_command(h.worker, AdapterAction.LOAD, h.adapter, None)
            for h in handovers(worker, others)
        ]
        if loads:
            await asyncio.wait(loads, timeout=WARM_S)
        warmed = sum(f.done() and not f.cancelled() and f.exception() is None for f in loads)
        for future in loads:
            future.cancel()
        self._dispatcher.drain_worker(worker, wait_s, "drained by an operator")
        return warmed

    async def _until_replaced(self, worker: WorkerView, serving: int, back_s: float) -> None:
        """Raises NotDoneInTime if the worker does not end, or if no other one serves in its
        place. None has to where fewer are wanted by now.
        """
        fleet, base = self._dispatcher.fleet, worker.heartbeat.base

        def missing() -> bool:
            scaling = self._dispatcher.scaling.get(base)
            least = serving if scaling is None else min(serving, scaling.wanted)
            return len(fleet.routable(base)) < least

        try:
            async with asyncio.timeout(back_s):
                while fleet.get(worker.id) is worker or missing():  # noqa: ASYNC110 - rare
                    await asyncio.sleep(LOOK_S)
        except TimeoutError as exc:
            raise NotDoneInTime(
                f"{worker.id} was drained, but {serving} workers of `{base}` do not serve again "
                f"within {back_s:g} s; the rollout ends here. Is anybody there to start it again?"
            ) from exc

    def _worker(self, name: str) -> WorkerView:
        worker = self._dispatcher.fleet.get(name)
        if worker is None or not worker.routable:
            names = sorted(w.id for w in self._dispatcher.fleet if w.routable)
            raise InvalidRequest(
                f"No worker `{name[:200]}` serves now; there are {listed(names)}.", param="worker"
            )
        return worker


def _wait_s(request: web.BaseRequest) -> float:
    """The query's `wait_s`; 0 if it has none."""
    if request.query.get("wait_s", "0") == "0":
        return 0.0
    return number(request, "wait_s", 0.0, MAX_WAIT_S)
