"""Shell. Runs the batches of a gateway: a few lines at a time, with lower priority than all other
requests. Each result is written to disk at once. So a gateway that was killed continues where it
was, and so does a batch that has given its place to another key's (see turns.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from msgspec import structs

from gateway.accounts.account import ANONYMOUS, Account
from gateway.api.services import GenerationServices
from gateway.batches.collected_answer import LineRequest, answer_line
from gateway.batches.records import (
    Batch,
    BatchLine,
    BatchStatus,
    LineError,
    expired_line,
    read_lines,
    result_line,
)
from gateway.batches.store import BatchStore
from gateway.batches.turns import RunningBatch, next_to_run, to_yield
from shared.error_bodies import error_body
from shared.errors import BodyTooLarge, ConfigError, InvalidApiKey, LoraplexError

log = logging.getLogger("loraplex.batches")

LINES_AT_ONCE = 32
"""How many lines of one batch are answered at a time."""
LOOK_S = 1.0
"""The time between two searches for new batches, and between two writes of a batch's counts."""
SWEEP_S = 60.0
"""The time between two looks for files whose time is over."""
ROOM_S = 5.0
"""The time between two looks whether there is room for more results."""
LATER = frozenset((429, 503, 504))
"""With these statuses there is no room now, and the line is asked again later. It is not if it was
on a worker for long enough: it would take as many tokens again, and again in vain.
"""
LEAST_WAIT_S, MOST_WAIT_S = 1.0, 30.0
KEY_GONE = "The key of this batch is no longer valid."


@dataclass(slots=True)
class _BatchRun:
    """One batch that is running. `gives_way` is set once another key shall have its place, or it is
    cancelled. `asking` are the tasks that wait for an answer.
    """

    batch: Batch
    lines: Iterator[BatchLine]
    gives_way: asyncio.Event
    completed: int = 0
    failed: int = 0
    asking: set[asyncio.Task[object] | None] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class _Place:
    """One of the places in which batches run."""

    turn: RunningBatch
    gives_way: asyncio.Event


class BatchRunner:
    """Must run in only one of the gateway processes that share a state folder."""

    def __init__(self, store: BatchStore, services: GenerationServices) -> None:
        self._store, self._services = store, services
        self._places: dict[str, _Place] = {}
        self._ran_last: dict[str, float] = {}
        self._full: dict[str, BodyTooLarge] = {}  # by owner: why no more results may be kept

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._remove_expired(), name="expired files")
            tasks.create_task(self._look_for_room(), name="room for results")
            while True:
                found = await self._open_batches()
                now, waiting = time.monotonic(), [b for b in found if b.id not in self._places]
                while (batch := next_to_run(waiting, self._turns(), self._ran_last)) is not None:
                    waiting.remove(batch)
                    self._start(batch, tasks, now)
                late = to_yield(waiting, self._turns(), now)
                if late is not None:
                    self._places[late.id].gives_way.set()
                await asyncio.sleep(LOOK_S)

    async def _open_batches(self) -> list[Batch]:
        """The empty list while the folder cannot be read. Batches that run go on."""
        try:
            return await asyncio.to_thread(self._store.open_batches)
        except OSError as exc:
            log.error("batches cannot be read", extra={"why": str(exc)})
            await asyncio.sleep(MOST_WAIT_S)
            return []

    def _turns(self) -> list[RunningBatch]:
        return [place.turn for place in self._places.values()]

    def _start(self, batch: Batch, tasks: asyncio.TaskGroup, now: float) -> None:
        place = _Place(RunningBatch(batch.id, batch.owner, now), asyncio.Event())
        self._places[batch.id], self._ran_last[batch.owner] = place, now
        task = tasks.create_task(self._try(batch, place.gives_way), name=batch.id)
        task.add_done_callback(lambda _: self._places.pop(batch.id))

    async def _remove_expired(self) -> None:
        while True:
            try:
                removed = await asyncio.to_thread(self._store.remove_expired, time.time())
            except (OSError, ConfigError) as exc:
                log.error("expired files are not removed", extra={"why": str(exc)})
            else:
                if removed:
                    log.info("expired files removed", extra={"files": removed})
            await asyncio.sleep(SWEEP_S)

    async def _look_for_room(self) -> None:
        while True:
            owners = {turn.owner for turn in self._turns()}
            with contextlib.suppress(OSError):  # then what was found last holds
                # every file of all keys is looked at, so not for nobody
                self._full = await asyncio.to_thread(self._store.full, owners) if owners else {}
            await asyncio.sleep(ROOM_S)

    async def _try(self, batch: Batch, gives_way: asyncio.Event) -> None:
        """A batch whose files cannot be read or written waits. The others go on."""
        try:
            await self._run(batch, gives_way)
        except* (OSError, ConfigError) as exc:
            why = str(exc.exceptions[0])
            log.error("batch paused", extra={"batch": batch.id, "why": why})
            await asyncio.sleep(MOST_WAIT_S)

    async def _run(self, batch: Batch, gives_way: asyncio.Event) -> None:
        """Runs one batch from where it is to its end, or until it gives way."""
        done, failed = await self._answered(batch)
        batch = _counted(batch, batch.total, len(done), len(failed))
        if batch.status is BatchStatus.CANCELLING:
            await self._end(batch)
            return
        lines, errors = await self._lines(batch)
        if errors:
            await self._end(batch, tuple(errors))
            return
        if batch.status is BatchStatus.VALIDATING:
            batch = batch.become(BatchStatus.IN_PROGRESS, _now())
        batch = await self._put(_counted(batch, len(lines), len(done), len(failed)))
        self._full |= await asyncio.to_thread(self._store.full, (batch.owner,))
        left = (line for line in lines if line.custom_id not in done | failed)
        run = _BatchRun(batch, left, gives_way, completed=len(done), failed=len(failed))
        log.info("batch runs", extra={"batch": batch.id, "lines": len(lines), "done": len(done)})
        if batch.status is not BatchStatus.CANCELLING:  # meanwhile
            await self._ask_all(run)
        left_over = run.completed + run.failed < run.batch.total
        if gives_way.is_set() and left_over and run.batch.status is not BatchStatus.CANCELLING:
            log.info("batch gives way", extra={"batch": batch.id})
        else:
            await self._end(_counted(run.batch, run.batch.total, run.completed, run.failed))

    async def _lines(self, batch: Batch) -> tuple[list[BatchLine], list[LineError]]:
        """(its requests, why they cannot be asked)."""
        if self._account(batch.owner) is None:
            return [], [LineError(InvalidApiKey.code, KEY_GONE)]
        bounds = self._services.limits.bounds
        try:
            data = await asyncio.to_thread(self._store.content, batch.owner, batch.input_file_id)
        except LoraplexError as exc:
            return [], [LineError(exc.code, exc.message)]
        return await asyncio.to_thread(read_lines, data, batch.endpoint, bounds.max_prompt_bytes)

    async def _answered(self, batch: Batch) -> tuple[set[str], set[str]]:
        done = await asyncio.to_thread(self._store.answered, batch, failed=False)
        return done, await asyncio.to_thread(self._store.answered, batch, failed=True)

    async def _ask_all(self, run: _BatchRun) -> None:
        async with asyncio.TaskGroup() as tasks:
            askers = [
                tasks.create_task(self._ask_lines(run), name=f"{run.batch.id} {n}")
                for n in range(LINES_AT_ONCE)
            ]
            while not all(task.done() for task in askers):
                await asyncio.wait(askers, timeout=LOOK_S)
                total = run.batch.total
                full = self._full.get(run.batch.owner)
                why = (LineError(full.code, full.message),) if full is not None else ()
                counted = _counted(run.batch, total, run.completed, run.failed)
                run.batch = await self._put(structs.replace(counted, errors=why))
                if run.batch.status is BatchStatus.CANCELLING:
                    run.gives_way.set()
                    for task in askers:
                        if task in run.asking:  # the others write what they have, and then end
                            task.cancel()

    async def _ask_lines(self, run: _BatchRun) -> None:
        me = asyncio.current_task()
        for line in run.lines:
            request_id = secrets.token_hex(16)
            run.asking.add(me)
            answer = await self._ask(run, line, request_id)
            run.asking.discard(me)
            if answer is None and run.gives_way.is_set():
                return
            if answer is None:
                written, failed = expired_line(line.custom_id, request_id), True
            else:
                status, body = answer
                failed = status >= 400
                written = result_line(run.batch, line.custom_id, request_id, status, body)
            await asyncio.to_thread(self._store.append, run.batch, written, failed=failed)
            run.failed += failed
            run.completed += not failed

    async def _ask(
        self, run: _BatchRun, line: BatchLine, request_id: str
    ) -> tuple[int, bytes] | None:
        """The answer to one line. None: the batch's time is over, or it gives way."""
        headers = {
            "content-type": "application/json",
            "x-request-id": request_id,
        }
        wait_s = LEAST_WAIT_S
        while time.time() < run.batch.expires_at and not run.gives_way.is_set():
            if self._services.dispatcher.draining or run.batch.owner in self._full:
                # the rest is for the next life, or for when there is room
                await asyncio.sleep(LOOK_S)
                continue
            account = self._account(run.batch.owner)
            if account is None:
                return InvalidApiKey.status, error_body(InvalidApiKey(KEY_GONE))
            incoming = LineRequest(run.batch.endpoint, headers)
            answer = await answer_line(self._services, account, incoming, line.body)
            if answer.final or answer.status not in LATER:
                return answer.status, answer.body
            told_s = answer.error.retry_after_s if answer.error is not None else None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(MOST_WAIT_S, max(wait_s, told_s or 0.0))):
                    await run.gives_way.wait()
            wait_s = min(MOST_WAIT_S, 2 * wait_s)
        return None

    async def _end(self, batch: Batch, errors: tuple[LineError, ...] = ()) -> None:
        """What is answered by now becomes files, also if the rest cannot be asked (`errors`)."""
        status = BatchStatus.COMPLETED
        if errors:
            status = BatchStatus.FAILED
        elif batch.status is BatchStatus.CANCELLING:
            status = BatchStatus.CANCELLED
        elif time.time() >= batch.expires_at:
            status = BatchStatus.EXPIRED
        if not errors:
            batch = batch.become(BatchStatus.FINALIZING, _now())
        output = await asyncio.to_thread(self._store.results_as_file, batch, failed=False)
        error = await asyncio.to_thread(self._store.results_as_file, batch, failed=True)
        ended = batch.become(
            status, _now(), output_file_id=output, error_file_id=error, errors=errors
        )
        await self._put(ended)
        await asyncio.to_thread(self._store.forget_results, batch)
        log.info("batch ended", extra={"batch": batch.id, "as": status.value})

    async def _put(self, batch: Batch) -> Batch:
        return await asyncio.to_thread(self._store.put, batch)

    def _account(self, owner: str) -> Account | None:
        """The account with its present scopes and limits. None: its key has been revoked."""
        ring = self._services.keys.ring
        if not ring.asks:
            return ANONYMOUS if owner == ANONYMOUS.name else None
        account = ring.accounts.get(owner)
        return account if account is not None and time.time() < account.expires else None


def _counted(batch: Batch, total: int, completed: int, failed: int) -> Batch:
    return structs.replace(batch, total=total, completed=completed, failed=failed)


def _now() -> int:
    return int(time.time())
