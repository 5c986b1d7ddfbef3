"""Shell. Which requests and which sources of them are refused, because workers died of them.
Clients ask again by themselves after a 500, and may reach another gateway process.

The same request is one of the same tenant with the same body, for the same path and version of a
model. Of a long body both ends and the length are compared. So nobody can have another tenant's
requests refused.

A source is a tenant with a model. If several requests of it were deadly, the next ones are refused
for a while, and then each is on trial to its end. So an adapter of which every request kills, or a
client that changes its request each time, costs a worker a minute.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from gateway.dispatch.deadly.death_table import (
    DIGEST_BYTES,
    KEPT_S,
    DeathTable,
    Died,
    RowKey,
)
from gateway.dispatch.lifecycle import DEADLY
from gateway.dispatch.request import InFlightRequest
from shared.errors import ModelUnavailable, WorkersDied
from shared.link import messages

log = logging.getLogger("loraplex.dispatcher")

MANY_DEADLY = 2
"""Different requests of a source that were deadly, after which the next ones are refused, too."""
SOURCE_REFUSED_S = 60.0
"""From the last one on. A fleet that kills whatever it gets, and is mended, is tried again soon."""
SAMPLE_BYTES = 1 << 16
"""Of each end of a body. A worker that is lost may have had a gigabyte of bodies, which took the
gateway's loop a second to digest whole.
"""


class Suspicion(NamedTuple):
    """How much a worker has to fear of a request, as messages.Generate tells it."""

    deaths: int = 0
    to_its_end: bool = False


NO_SUSPICION = Suspicion()


class DeadlyRequests:
    """`path`: see DeathTable. `alone`: no other gateway process gives requests to its workers, so
    it knows all of theirs. Times are seconds of the machine's monotonic clock. Close it at the end.

    Raises ConfigError if the file cannot be made.
    """

    def __init__(self, path: Path | None = None, *, alone: bool = True, now: float = 0.0) -> None:
        self.alone = alone
        self.tell: Callable[[str, messages.KnownDeaths], None] = lambda base, known: None
        """Called with what is noted or forgotten of a request for this base model."""
        self._table = DeathTable(path, now)
        self.close = self._table.close

    def of(self, request: InFlightRequest, now: float) -> Died | None:
        """What is known of the same request. None: no worker died of it, nor of a copy."""
        length = len(request.client_request.body)
        if self._table.empty(now) or not self._table.has_length(length):
            return None
        found = self._table.find(key_of_request(request), now)
        return found.died if found is not None else None

    def suspicion(self, request: InFlightRequest, now: float) -> Suspicion:
        """A copy of a request of which workers died may kill one, too. But it is not counted with
        it: many clients may ask the same, and be unlucky together.
        """
        life = request.lifecycle
        if life.deaths:
            return Suspicion(life.deaths, life.to_its_end)
        if self._table.empty(now):
            return NO_SUSPICION
        died = self.of(request, now)
        return NO_SUSPICION if died is None else Suspicion(1, died.begun)

    def deadly(self, request: InFlightRequest, now: float) -> bool:
        """Whether the request, or a copy of it, is known to be what kills workers."""
        died = self.of(request, now)
        return died is not None and died.deaths >= DEADLY

    def heard(self, known: messages.KnownDeaths, now: float) -> None:
        """Another gateway has noted or forgotten a request, or a source."""
        key = RowKey(known.length, known.digest)
        if known.forgotten:
            self._table.erase(key)
        elif known.deaths >= 0:
            self._table.write(key, Died(known.deaths, known.begun), now)

    def recall(self, request: InFlightRequest, now: float) -> None:
        """A new request goes on counting where the same one has ended. Raises as `check` does."""
        if self._table.empty(now):
            return
        self.check(request, now)
        died = self.of(request, now)
        if died is not None:
            request.lifecycle.goes_on_from(*died)

    def check(self, request: InFlightRequest, now: float) -> None:
        """Raises WorkersDied if the request is refused. Raises ModelUnavailable if no worker has
        had it and all of its source are.
        """
        if self._table.empty(now):
            return
        if self.deadly(request, now):
            raise WorkersDied(
                f"Workers died of this request. It is refused for {KEPT_S:.0f} s after that."
            )
        if not request.lifecycle.attempts:
            self._check_source(request, now)

    def note(self, request: InFlightRequest, now: float, *, ended: bool) -> None:
        """Workers died of the request, as far as can be told. `ended`: it gets no answer. Call it
        before the client hears of that: it may ask again at once, at another process.
        """
        was_deadly = self.deadly(request, now)
        died = Died(request.lifecycle.deaths if ended else 0, bool(request.t_head))
        known = self._write(request.model.base, key_of_request(request), died, now)
        if known.deaths >= DEADLY and not was_deadly:
            self._note_source(request, now)

    def forget(self, request: InFlightRequest, now: float) -> None:
        """The request, or a copy of it, has got further than where workers died of it, as it
        seemed. If it was on trial to its end, its source is forgotten, too.
        """
        if self._table.empty(now):
            return
        base, source = request.model.base, key_of_source(request)
        if source is not None and request.lifecycle.deaths >= messages.SUSPECTED:
            self._erase(base, source)
        if self.of(request, now) is not None:
            self._erase(base, key_of_request(request))

    # ---- inside ----------------------------------------------------------------------------------

    def _check_source(self, request: InFlightRequest, now: float) -> None:
        source = key_of_source(request)
        found = self._table.find(source, now) if source is not None else None
        if found is None or found.died.deaths < MANY_DEADLY:
            return
        refused_for_s = found.since + SOURCE_REFUSED_S - now
        if refused_for_s > 0:
            raise ModelUnavailable(
                "Workers died of several requests of this account for this model. All of them are "
                f"refused for {SOURCE_REFUSED_S:.0f} s after the last one.",
                retry_after_s=refused_for_s,
            )
        request.lifecycle.goes_on_from(messages.SUSPECTED, True)

    def _note_source(self, request: InFlightRequest, now: float) -> None:
        """One more request of it was deadly."""
        source = key_of_source(request)
        if source is None:
            return
        found = self._table.find(source, now)
        count = 1 if found is None else found.died.deaths + 1
        self._write(request.model.base, source, Died(count), now)
        if count >= MANY_DEADLY:
            log.error(
                "workers died of several requests",
                extra={
                    "tenant": request.requester.tenant,
                    "base": request.model.base,
                    "adapter": request.key[0] if request.key is not None else "",
                    "refused_s": SOURCE_REFUSED_S,
                },
            )

    def _write(self, base: str, key: RowKey, died: Died, now: float) -> Died:
        known = self._table.write(key, died, now)
        self.tell(base, messages.KnownDeaths(*key, *known))
        return known

    def _erase(self, base: str, key: RowKey) -> None:
        self._table.erase(key)
        self.tell(base, messages.KnownDeaths(*key, 0, forgotten=True))


def key_of_request(request: InFlightRequest) -> RowKey:
    """The same for each copy, in every process. Of a long body it is of both ends. The digest is
    made once, since a lost worker has all that it had compared with all that others have.
    """
    body, path = request.client_request.body, request.client_request.path
    if not request.digest:
        ends = body if len(body) <= 2 * SAMPLE_BYTES else body[:SAMPLE_BYTES] + body[-SAMPLE_BYTES:]
        request.digest = _digest(request, sha256(ends).digest() + path.encode())
    return RowKey(len(body), request.digest)


def key_of_source(request: InFlightRequest) -> RowKey | None:
    """None: it is everybody with the base."""
    if not request.requester.tenant and request.key is None:
        return None
    digest = _digest(request)
    return RowKey(-1 - int.from_bytes(digest[:2]), digest)


def _digest(request: InFlightRequest, more: bytes = b"") -> bytes:
    """Of the tenant and the version of a model, with what else makes them the same."""
    made = sha256()
    for part in (request.requester.tenant, request.model.base, *(request.key or ())):
        made.update(part.encode("utf-8", "surrogateescape") + b"\0")
    made.update(more)
    return made.digest()[:DIGEST_BYTES]
