"""Pure. Answers that a worker keeps for later requests: which worker, and whose they are, is read
from their ids.
"""

from __future__ import annotations

from dataclasses import dataclass

from gateway.accounts.account import Account
from gateway.fleet.fleet import Fleet
from shared.errors import ResponseNotFound
from shared.link.messages import WorkerId, owner_tag, read_kept_id, worker_tag

SHOWN_ID = 100


@dataclass(frozen=True, slots=True)
class KeptAnswer:
    """`path` is what its worker is asked for."""

    worker: WorkerId
    base: str
    path: str = ""
    streams: bool = False


def find_kept(
    fleet: Fleet, account: Account, answer_id: str, path: str = "", streams: bool = False
) -> KeptAnswer:
    """Raises ResponseNotFound, with the same words for what is gone and for what is another
    account's.
    """
    tags = read_kept_id(answer_id)
    if tags is not None and tags[1] == owner_tag(account.name):
        for worker in fleet:
            if worker.routable and worker_tag(worker.id, worker.beat.epoch) == tags[0]:
                return KeptAnswer(worker.id, worker.beat.base, path, streams)
    raise ResponseNotFound(
        f"Response with id '{answer_id[:SHOWN_ID]}' not found. Responses are kept by the worker "
        "that made them, for a limited time."
    )
