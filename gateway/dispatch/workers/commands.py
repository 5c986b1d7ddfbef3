"""Shell. Commands to workers about adapters (load, pin, evict ...), and the question which worker
keeps an answer that a client asks for again. A command is a future that resolves once the worker
reports that it is done.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from zlib import crc32

from gateway.dispatch.workers.outbox import WorkerOutbox
from gateway.fleet.fleet import Fleet, WorkerView
from gateway.fleet.peer_hints import peer_hints
from shared.adapters.identity import AdapterRef, StoredAdapter, key_of
from shared.errors import LoraplexError, Overloaded, WorkerUnavailable, from_refusal
from shared.link import messages
from shared.link.sockets import SendResult

MAX_OPEN = 1000
FIND_S = 0.5
"""How long to wait for the answers of all workers, before it is looked again who they are."""
AGAIN_S = 0.01  # before a worker is asked again; some could not be sent the question


class PendingCommands:
    """The open commands by stream id. If the owner cancels a future, its place is free at once; the
    worker carries out the command all the same.
    """

    def __init__(self) -> None:
        self._open: dict[
            messages.StreamId, tuple[messages.WorkerId, int, asyncio.Future[None]]
        ] = {}

    def __len__(self) -> int:
        return len(self._open)

    def begin(
        self, sid: messages.StreamId, worker: messages.WorkerId, epoch: int
    ) -> asyncio.Future[None]:
        """A future for a new command. It fails at once with Overloaded if MAX_OPEN are open."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        future.add_done_callback(lambda f: self._ended(sid, f))
        if len(self._open) >= MAX_OPEN:
            future.set_exception(
                Overloaded(
                    f"{MAX_OPEN} commands to workers are open already; try again later.",
                    retry_after_s=1.0,
                )
            )
        else:
            self._open[sid] = (worker, epoch, future)
        return future

    def done(self, peer: bytes, sid: messages.StreamId) -> None:
        """This life of a worker has carried out the command. Others cannot say so."""
        if self._has(peer, sid):
            self._take(sid, None)

    def refused(self, peer: bytes, refused: messages.Refused) -> None:
        if self._has(peer, refused.sid):
            self._take(refused.sid, from_refusal(refused.code, refused.message))

    def fail(self, sid: messages.StreamId, error: LoraplexError) -> None:
        self._take(sid, error)

    def lost(self, worker: messages.WorkerId, epoch: int) -> None:
        """Fails the commands of a worker whose life is over."""
        for sid in [
            sid for sid, (id_, life, _) in self._open.items() if (id_, life) == (worker, epoch)
        ]:
            self._take(
                sid, WorkerUnavailable("The worker was lost before it was done.", retry_after_s=1.0)
            )

    def _has(self, peer: bytes, sid: messages.StreamId) -> bool:
        worker, epoch, _ = self._open.get(sid, ("", 0, None))
        return messages.identity(worker, epoch) == peer

    def _take(self, sid: messages.StreamId, error: LoraplexError | None) -> None:
        _, _, future = self._open.pop(sid, (None, 0, None))
        if future is None or future.done():
            return
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)

    def _ended(self, sid: messages.StreamId, future: asyncio.Future[None]) -> None:
        self._open.pop(sid, None)
        if not future.cancelled():
            future.exception()  # heard of, even where nobody awaits it


class WorkerCommands:
    """Sends commands, and keeps them in `pending` until they are answered. `answers` asks where an
    answer is kept.

    Args:
        sids: yields stream ids that no message has carried yet.
        on_unreachable: called for a worker whose link is gone. It must fail the worker's open
            commands.
    """

    def __init__(
        self,
        fleet: Fleet,
        outbox: WorkerOutbox,
        sids: Iterator[messages.StreamId],
        on_unreachable: Callable[[WorkerView], None],
    ) -> None:
        self._fleet = fleet
        self._outbox = outbox
        self._sids = sids
        self._on_unreachable = on_unreachable
        self.pending = PendingCommands()
        self.answers = AnswerFinder(fleet, outbox, sids)

    def send(
        self,
        worker: WorkerView,
        action: messages.AdapterAction,
        adapter: AdapterRef,
        stored: StoredAdapter | None,
    ) -> asyncio.Future[None]:
        """Sends the command. The future resolves once the worker has carried it out. The caller
        decides how long to wait.

        The future fails with Overloaded if too many commands are open. It fails with
        WorkerUnavailable if the worker takes nothing or was lost. Otherwise it fails with the error
        that the worker reports.
        """
        sid = next(self._sids)
        future = self.pending.begin(sid, worker.id, worker.heartbeat.epoch)
        if future.done():
            return future
        if not worker.routable or self._fleet.get(worker.id) is not worker:
            self._fail(sid, "The worker does not serve.")
            return future
        if action is messages.AdapterAction.CACHE:  # what is on the disk alone is in no heartbeat
            future.add_done_callback(lambda f: self._note_cached(f, worker, adapter))
        peers = peer_hints(self._fleet.pool(adapter.base), worker, key_of(adapter))
        command = messages.AdapterCommand(sid, action, adapter, stored, peers)
        sent = self._outbox.send(worker, command)
        if sent is SendResult.FULL:
            self._fail(sid, "The worker does not take messages fast enough.")
        elif sent is not SendResult.OK:
            self._on_unreachable(worker)
        return future

    def keep_copy(self, maker: bytes, copy: messages.StoredCopy) -> None:
        """Another worker of the same model keeps a copy of what this one stores. None does if there
        is no other one.
        """
        made_by = self._fleet.lives([maker])
        others = [
            worker
            for one in made_by
            for worker in self._fleet.routable(one.heartbeat.base)
            if worker is not one
        ]
        if others:
            at = crc32(copy.answer_id.encode()) % len(others)
            self._outbox.send(others[at], messages.KeepCopy(copy.answer_id, copy.data))

    def _fail(self, sid: messages.StreamId, why: str) -> None:
        self.pending.fail(sid, WorkerUnavailable(why, retry_after_s=1.0))

    def _note_cached(
        self, future: asyncio.Future[None], worker: WorkerView, adapter: AdapterRef
    ) -> None:
        if not future.cancelled() and future.exception() is None:
            self._fleet.cached(worker, adapter)


@dataclass(frozen=True, slots=True)
class KeptOn:
    """`worker` keeps the answer, which has this id and time. `digest` is that of the request that
    it answers.
    """

    worker: messages.WorkerId
    digest: bytes
    request_id: str
    created: int


class AnswerFinder:
    """Asks all workers for a kept or stored answer. `sids` yields stream ids that no message has
    carried yet.
    """

    def __init__(
        self, fleet: Fleet, outbox: WorkerOutbox, sids: Iterator[messages.StreamId]
    ) -> None:
        self._fleet, self._outbox, self._sids = fleet, outbox, sids
        self._questions: dict[
            messages.StreamId, tuple[bytes, asyncio.Future[messages.FoundAnswer]]
        ] = {}

    async def find(self, base: str, tag: bytes) -> KeptOn | None:
        """None: every worker of the base model that can be reached reports that it does not keep
        the answer. A worker that stands still is waited for until it has left the fleet: else the
        answer would be made twice. Then the others are asked again, for what it had has moved.
        """
        without, asked = set[bytes](), set[bytes]()
        for turn in itertools.count():
            workers = [
                worker
                for worker in self._fleet
                if worker.heartbeat.base == base and worker.reachable and worker.peer not in without
            ]
            if not workers:
                if asked <= without:
                    break
                without, asked = set(), set()
                continue
            asked |= {worker.peer for worker in workers}
            if turn:
                await asyncio.sleep(AGAIN_S)
            # whoever always takes longer than one wait is heard in the end
            wait_s = FIND_S * 2**turn
            async with aclosing(self._answers(workers, wait_s, tag=tag)) as answers:
                async for worker, found in answers:
                    if found.digest:
                        return KeptOn(worker.id, found.digest, found.request_id, found.created)
                    without.add(worker.peer)
        return None

    async def find_stored(self, answer_id: str, copies: bool) -> list[WorkerView] | None:
        """The workers that store the answer, the one that made it first. Empty: all workers report
        that they do not. None: not every worker has answered, or one that has the answer takes no
        requests now. `copies`: those with copies are looked for even if the first is found.

        A worker that has made it alone comes last: it may have been made elsewhere, too.
        """
        booted = messages.WorkerState.SERVING, messages.WorkerState.DRAINING
        workers = [w for w in self._fleet if w.heartbeat.state in booted]
        stored: list[tuple[messages.FoundAnswer, WorkerView]] = []
        answered = 0
        async with aclosing(self._answers(workers, FIND_S, answer_id=answer_id)) as answers:
            async for worker, found in answers:
                answered += 1
                if found.stored:
                    stored.append((found, worker))
                    if worker.routable and not (copies or found.alone or found.copied):
                        return [worker]
        stored.sort(key=lambda one: (one[0].alone, one[0].copied))
        able = [worker for _, worker in stored if worker.routable]
        return able if able or (answered == len(workers) and not stored) else None

    def heard(self, peer: bytes, found: messages.FoundAnswer) -> None:
        """Takes the answer of the worker that was asked."""
        peer_asked, future = self._questions.get(found.sid, (b"", None))
        if future is not None and peer_asked == peer and not future.done():
            future.set_result(found)

    async def _answers(
        self, workers: Iterable[WorkerView], wait_s: float, tag: bytes = b"", answer_id: str = ""
    ) -> AsyncGenerator[tuple[WorkerView, messages.FoundAnswer], None]:
        """What the workers answer within `wait_s`, in the order in which they do."""
        workers_by_sid = {
            sid: w for w in workers if (sid := self._ask(w, tag, answer_id)) is not None
        }
        waiting = {self._questions[sid][1] for sid in workers_by_sid}
        until = asyncio.get_running_loop().time() + wait_s
        try:
            while waiting:
                left_s = until - asyncio.get_running_loop().time()
                done, waiting = await asyncio.wait(
                    waiting, timeout=left_s, return_when=asyncio.FIRST_COMPLETED
                )
                if not done:
                    return
                for future in done:
                    found = future.result()
                    yield workers_by_sid[found.sid], found
        finally:
            for sid in workers_by_sid:
                del self._questions[sid]

    def _ask(self, worker: WorkerView, tag: bytes, answer_id: str) -> messages.StreamId | None:
        sid = next(self._sids)
        question = messages.FindAnswer(sid, tag, answer_id)
        if self._outbox.send(worker, question) is not SendResult.OK:
            return None
        self._questions[sid] = worker.peer, asyncio.get_running_loop().create_future()
        return sid
