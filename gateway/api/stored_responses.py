"""Shell. Answers that a worker stores for later requests. Their ids say which account they belong
to. The workers are asked which of them has one: its answer may have moved.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from gateway.accounts.account import Account
from gateway.accounts.owned_ids import is_stored_id_of
from gateway.dispatch.workers.commands import AnswerFinder
from gateway.fleet.fleet import WorkerView
from shared.errors import ResponseNotFound, WorkerUnavailable

SHOWN_ID = 100
LONGEST_ID = 200
LOOK_S = 0.05
LONGEST_WAIT_S = 10.0
"""For a worker that goes on with a response. Clients poll, so they come again."""


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """`workers` are the lives of workers that store it, the best first. `path` is the path that one
    of them is asked for.
    """

    workers: tuple[bytes, ...]
    base: str
    path: str = ""
    streams: bool = False


class ResponseFinder:
    """Asks which workers store a response. `may_move` says whether a response that none stores may
    be on its way to another worker.
    """

    def __init__(self, finder: AnswerFinder, may_move: Callable[[str], bool]) -> None:
        self._finder, self._may_move = finder, may_move

    async def find(
        self, account: Account, answer_id: str, path: str = "", streams: bool = False
    ) -> StoredResponse:
        """Without a `path`, a request goes on from the response: every worker that stores it may
        take it.

        Raises ResponseNotFound. The message is the same for an answer that is gone and for another
        account's, so nobody learns which ids exist. Raises WorkerUnavailable if no worker has
        taken it yet, or not every worker answers.
        """
        if len(answer_id) <= LONGEST_ID and is_stored_id_of(account.name, answer_id):
            workers = await self._stored_on(answer_id, copies=not path)
            if workers:
                peers = tuple(worker.peer for worker in workers)
                return StoredResponse(peers, workers[0].heartbeat.base, path, streams)
        raise ResponseNotFound(
            f"Response with id '{answer_id[:SHOWN_ID]}' not found. Responses are kept by the "
            "worker that made them and by another one, for a limited time."
        )

    async def _stored_on(self, answer_id: str, *, copies: bool) -> list[WorkerView]:
        loop = asyncio.get_running_loop()
        until = loop.time() + LONGEST_WAIT_S
        while True:
            may_move = self._may_move(answer_id)
            workers = await self._finder.find_stored(answer_id, copies)
            if workers or (workers is not None and not may_move):
                return workers
            if loop.time() > until:
                raise WorkerUnavailable("The workers do not say who has it.", retry_after_s=1.0)
            await asyncio.sleep(LOOK_S)
