"""Pure. The ids inside an answer of `/v1/responses`. vLLM draws them at random. Here they follow
from the id of the answer, so they are the same on the worker that goes on with it.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from contextvars import ContextVar

_ID_BYTES = 8
"""As many as vLLM's own ids have."""


class AnswerIds:
    """The ids of the parts of one answer, in the order in which its text begins them."""

    def __init__(self, answer_id: str) -> None:
        self._answer_id = answer_id
        self._numbers = itertools.count()

    def next(self) -> str:
        seed = f"{self._answer_id} {next(self._numbers)}"
        return hashlib.blake2b(seed.encode(), digest_size=_ID_BYTES).hexdigest()


ANSWER_IDS: ContextVar[AnswerIds | None] = ContextVar("answer_ids", default=None)


def ids_of_answer(random: Callable[[], str]) -> Callable[[], str]:
    """The next id of the answer in this context. Of one without ids of its own: a random one."""

    def next_id() -> str:
        ids = ANSWER_IDS.get()
        return random() if ids is None else ids.next()

    return next_id
