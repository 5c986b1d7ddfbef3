"""Shell. Performs what `versions` decides for one base model: new versions are loaded on the
workers, and old ones leave the engines.

Every gateway process does this on its own. Its commands are idempotent, so several processes at
once do no harm.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Iterable
from typing import assert_never

from gateway.adapters import version_placement as version_queries
from gateway.adapters.version_placement import (
    CacheVersion,
    LoadVersion,
    NothingToPrepare,
    NoWorkerServes,
    Prepare,
    in_engines,
    in_flight,
)
from gateway.adapters.versions import Versions, VersionStage
from gateway.fleet.commands import SendCommand
from gateway.fleet.fleet import Fleet
from gateway.fleet.rendezvous import Rendezvous
from gateway.fleet.worker_view import WorkerView
from gateway.telemetry.prometheus import Metrics
from shared.adapters.identity import AdapterKey, AdapterRef, StoredAdapter
from shared.errors import InvalidAdapter, LoraplexError, WorkerUnavailable
from shared.link.messages import AdapterAction, WorkerId

log = logging.getLogger("loraplex.versions")

TICK_S = 0.25
PREPARE_TIMEOUT_S = 300.0
"""Time limit for one worker. Transfers have their own limits; this one is for a worker that has no
slot to give.
"""


class VersionRollout:
    """`run()` works for ever on version changes of one base model's adapters."""

    def __init__(
        self,
        base: str,
        found: Versions,
        fleet: Fleet,
        send_command: SendCommand,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.base, self._versions, self._fleet, self._send_command = (
            base,
            found,
            fleet,
            send_command,
        )
        self._metrics = metrics
        self._clock = clock
        self._homes = Rendezvous()
        self._leaving: set[tuple[WorkerId, AdapterKey]] = set()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            while True:
                for prepare in self._versions.due(self._clock()):
                    tasks.create_task(
                        self._prepare(prepare),
                        name=f"prepare {prepare.new.name}@{prepare.new.digest}",
                    )
                self._evict()
                await asyncio.sleep(TICK_S)

    async def _prepare(self, prepare: Prepare) -> None:
        old, new = prepare.old, prepare.new
        facts = {"base": self.base, "adapter": new.name, "old": old.digest, "new": new.digest}
        begun = self._clock()
        plan = version_queries.plan(prepare, self._fleet.pool(self.base), self._homes)
        try:
            match plan:
                case LoadVersion(workers):
                    await self._load(workers, new)
                case CacheVersion(worker):
                    await self._ask([worker], AdapterAction.CACHE, new)
                case NothingToPrepare():
                    pass
                case NoWorkerServes():
                    raise WorkerUnavailable("No worker serves this model now.")
                case _:
                    assert_never(plan)
        except LoraplexError as exc:
            stage = self._versions.failed(new, exc, self._clock())
            self._metrics.version_change(
                self.base, "refused" if stage is VersionStage.REFUSED else "failed"
            )
            if stage is VersionStage.REFUSED:
                log.error(
                    "new version refused, the old one goes on",
                    extra={**facts, "code": exc.code, "reason": exc.message},
                )
            else:
                log.warning(
                    "new version not ready yet",
                    extra={**facts, "code": exc.code, "reason": exc.message},
                )
            return
        if self._versions.ready(new, self._clock()):
            self._metrics.version_change(self.base, "switched")
            log.info(
                "version switched", extra={**facts, "ms": round((self._clock() - begun) * 1e3, 1)}
            )

    async def _load(self, workers: tuple[WorkerView, ...], new: StoredAdapter) -> None:
        """Loads on the first worker, then on the others. For the others only a refusal of the
        adapter counts, since requests can load it where it is missing.
        """
        await self._ask(workers[:1], AdapterAction.LOAD, new)
        try:
            await self._ask(workers[1:], AdapterAction.LOAD, new)
        except InvalidAdapter:
            raise
        except LoraplexError as exc:
            log.warning(
                "new version not loaded everywhere",
                extra={"base": self.base, "adapter": new.name, "reason": exc.message},
            )

    async def _ask(
        self, workers: Iterable[WorkerView], action: AdapterAction, new: StoredAdapter
    ) -> None:
        """Returns when all workers have carried the command out. Otherwise raises the first error
        that calls the adapter invalid, else the first error, else WorkerUnavailable at the time
        limit.
        """
        ref = AdapterRef(self.base, new.name, new.digest)
        sent = [self._send_command(worker, action, ref, new) for worker in workers]
        if not sent:
            return
        # The futures are waited for but never cancelled: the worker goes on anyway, and its answer
        # must have a place to go.
        done, waiting = await asyncio.wait(sent, timeout=PREPARE_TIMEOUT_S)
        for late in waiting:
            late.add_done_callback(lambda f: f.exception())
        failures = [exc for f in done if (exc := f.exception()) is not None]
        failures.sort(key=lambda exc: not isinstance(exc, InvalidAdapter))
        if failures:
            raise failures[0]
        if waiting:
            raise WorkerUnavailable(
                f"A worker did not {action.name.lower()} the adapter within "
                f"{PREPARE_TIMEOUT_S:g} s."
            )

    def _evict(self) -> None:
        pool = self._fleet.pool(self.base)
        for key in self._versions.leaving(lambda key: in_flight(key, pool), self._clock()):
            for worker in in_engines(key, pool):
                if (worker.id, key) not in self._leaving:
                    self._leaving.add((worker.id, key))
                    future = self._send_command(
                        worker, AdapterAction.EVICT, AdapterRef(self.base, *key), None
                    )
                    gone = functools.partial(self._gone, worker=worker.id, key=key)
                    future.add_done_callback(gone)

    def _gone(self, future: asyncio.Future[None], worker: WorkerId, key: AdapterKey) -> None:
        """The eviction has ended. If it failed, the next tick asks again."""
        self._leaving.discard((worker, key))
        if not future.cancelled() and future.exception() is None:
            log.info(
                "old version unloaded",
                extra={"worker": worker, "base": self.base, "adapter": key[0], "digest": key[1]},
            )
