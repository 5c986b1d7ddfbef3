"""Shell. What this gateway asked workers to do with adapters (messages.AdapterCommand) and has not heard of
yet: one future each.
"""

from __future__ import annotations

import asyncio

from shared.errors import LoraplexError, Overloaded, WorkerUnavailable, from_refusal
from shared.link import messages

MAX_OPEN = 1000


class PendingCommands:
    """The open tends by stream id. A future that its owner cancels makes room at once; the worker
    does it all the same.
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
                    f"{MAX_OPEN} adapters are being tended already; try again later.",
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
