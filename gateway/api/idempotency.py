"""Shell. Requests with an `Idempotency-Key`. A client that asks again with the same key gets the
answer of its first request, also from another gateway. It gets the whole answer, or what there is
of it so far and then the rest. No second answer is generated.

Statuses are those of draft-ietf-httpapi-idempotency-key-header: 422 for a key that was used for
another request, 409 while the first request has not come to a worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
from collections.abc import Callable, Iterator
from typing import Protocol

from gateway.accounts.account import Account
from gateway.dispatch.workers.commands import AnswerFinder, KeptOn
from gateway.http.headers import IncomingRequest
from shared.errors import (
    REUSED_KEY,
    IdempotencyKeyInUse,
    IdempotencyKeyReused,
    InvalidRequest,
)
from shared.link.messages import AnswerKey

HEADER = "idempotency-key"
_KEY = re.compile(r"[!-~]([ -~]{0,253}[!-~])?\Z")
REJOIN_S = 2.0
"""The workers of a gateway's earlier life come back within this time: each tries once a second to
connect, and says what it is. Until then an answer that nobody keeps may be kept by one of them.
"""
LOOK_S = 0.05
_TAG_BYTES = 16
"""128 bits: two accounts never meet by chance, and none can aim at another's."""


def answer_key(account: Account, incoming: IncomingRequest, body: bytes) -> AnswerKey | None:
    """The key in the header. None: there is no such header. Raises InvalidRequest for a key that is
    not allowed.
    """
    key = incoming.header(HEADER)
    if key is None:
        return None
    if _KEY.match(key) is None:
        raise InvalidRequest(
            "The header Idempotency-Key must have 1 to 255 printable ASCII characters.",
            param=HEADER,
        )
    return AnswerKey(
        _digest(account.name.encode(), key.encode()),
        _digest(incoming.path.encode(), (incoming.header("content-type") or "").encode(), body),
    )


def _digest(*parts: bytes) -> bytes:
    """A digest of the parts. Other parts never give the same bytes to hash."""
    found = hashlib.blake2b(digest_size=_TAG_BYTES)
    for part in parts:
        found.update(len(part).to_bytes(8, "big") + part)
    return found.digest()


class Repeatable(Protocol):
    """A request of this process for which a client may ask again."""

    @property
    def on_worker(self) -> bool:
        """Whether a worker has got it."""
        ...


class OpenKeys:
    """The keys of the requests that are open in this process."""

    def __init__(self, finder: AnswerFinder, clock: Callable[[], float]) -> None:
        self._finder, self._clock = finder, clock
        self._complete_at = clock() + REJOIN_S
        self._open: dict[bytes, tuple[AnswerKey, Repeatable]] = {}

    @contextlib.contextmanager
    def hold(self, key: AnswerKey, request: Repeatable) -> Iterator[None]:
        """Holds the key while the request is open. Raises IdempotencyKeyReused or
        IdempotencyKeyInUse.
        """
        held, first = self._open.get(key.tag, (key, request))
        if held != key:
            raise IdempotencyKeyReused(REUSED_KEY)
        if first is not request and not first.on_worker:
            raise IdempotencyKeyInUse(
                "The first request with this Idempotency-Key still waits; ask again.",
                retry_after_s=1.0,
            )
        self._open[key.tag] = key, request
        try:
            yield
        finally:
            if self._open.get(key.tag) == (key, request):
                del self._open[key.tag]

    async def find(self, base: str, key: AnswerKey) -> KeptOn | None:
        """The worker that keeps the answer, if any. Raises IdempotencyKeyReused."""
        while (found := await self._finder.find(base, key.tag)) is None:
            if self._clock() >= self._complete_at:
                return None
            await asyncio.sleep(LOOK_S)
        if found.digest != key.digest:
            raise IdempotencyKeyReused(REUSED_KEY)
        return found
