"""Shell. Commands to workers about adapters (load, pin, evict ...): each is a future that resolves
once the worker has said that it is done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

from gateway.dispatch.outbox import WorkerOutbox
from gateway.fleet.fleet import Fleet, WorkerView
from gateway.fleet.peer_hints import peer_hints
from shared.adapters.identity import AdapterRef, StoredAdapter, key_of
from shared.errors import LoraplexError, Overloaded, WorkerUnavailable, from_refusal
from shared.link import messages
from shared.link.sockets import SendResult

MAX_OPEN = 1000


class PendingCommands:
    """The open commands by stream id. A future that its owner cancels makes room at once; the
    worker carries the command out all the same.
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
        """Fails at once with Overloaded beyond MAX_OPEN."""
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

    def done(self, sid: messages.StreamId) -> None:
        self._take(sid, None)

    def refused(self, refused: messages.Refused) -> None:
        self._take(refused.sid, from_refusal(refused.code, refused.message))

    def fail(self, sid: messages.StreamId, error: LoraplexError) -> None:
        self._take(sid, error)

    def lost(self, worker: messages.WorkerId, epoch: int) -> None:
        """That life of the worker is over."""
        for sid in [
            sid for sid, (id_, life, _) in self._open.items() if (id_, life) == (worker, epoch)
        ]:
            self._take(
                sid, WorkerUnavailable("The worker was lost before it was done.", retry_after_s=1.0)
            )

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
    """Sends commands, and keeps them in `pending` until they are answered.

    Args:
        sids: yields stream ids that no message has carried yet.
        on_unreachable: is told of a worker whose link is gone, and fails its open commands.
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

    def send(
        self,
        worker: WorkerView,
        action: messages.AdapterAction,
        adapter: AdapterRef,
        stored: StoredAdapter | None,
    ) -> asyncio.Future[None]:
        """The future resolves once the worker has done it. The caller decides how long to wait.

        It fails with: Overloaded, too many are open. WorkerUnavailable: the worker takes nothing,
        or was lost. Else what the worker refused it with.
        """
        sid = next(self._sids)
        future = self.pending.begin(sid, worker.id, worker.beat.epoch)
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

    def _fail(self, sid: messages.StreamId, why: str) -> None:
        self.pending.fail(sid, WorkerUnavailable(why, retry_after_s=1.0))

    def _note_cached(
        self, future: asyncio.Future[None], worker: WorkerView, adapter: AdapterRef
    ) -> None:
        if not future.cancelled() and future.exception() is None:
            self._fleet.cached(worker, adapter)
