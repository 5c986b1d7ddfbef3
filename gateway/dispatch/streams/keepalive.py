"""Pure. Keeps waiting streams alive with SSE comments. Clients skip them, and proxies take them as
a sign of life.

A request enters, and leaves with its first frame or its end. One sweep over all of them
finds the comments that are due. So there is no timer and no task per request, and no cost per
token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from gateway.dispatch.lifecycle import RequestPhase
from gateway.dispatch.request import InFlightRequest
from shared.link.messages import Tier

NOBODY_AWAITED: Mapping[str, float | None] = {}


class StreamKeepalive:
    """The requests that wait for their first frame, the next one due first. `every_s` 0: no
    comments are sent.
    """

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        # all wait equally long between two turns, so the order of entry is that of the turns
        self._due: dict[InFlightRequest, float] = {}

    def __len__(self) -> int:
        return len(self._due)

    def enter(self, request: InFlightRequest, now: float) -> None:
        """Idempotent. The turn of one that waits already stays."""
        if self._every_s:
            self._due.setdefault(request, now + self._every_s)

    def leave(self, request: InFlightRequest) -> None:
        """Idempotent."""
        self._due.pop(request, None)

    def turns(self, now: float) -> list[InFlightRequest]:
        """The requests whose comment is due. The next one of each is due `every_s` from now."""
        found: list[InFlightRequest] = []
        for request, when in self._due.items():
            if when > now:
                break
            found.append(request)
        for request in found:
            del self._due[request]
            self._due[request] = now + self._every_s
        return found


def comment(
    request: InFlightRequest,
    tickets: Mapping[InFlightRequest, int],
    awaited: Mapping[str, float | None] = NOBODY_AWAITED,
) -> bytes:
    """One SSE comment that says what the request waits for. `tickets` are positions in the queue.
    `awaited` are base models whose first worker is starting, with the seconds until it serves (0:
    unknown; None: it waits for a GPU). An adapter's name holds no character that has a meaning
    here.
    """
    if request.lifecycle.phase is RequestPhase.QUEUED:
        if request.model.base in awaited:
            seconds = awaited[request.model.base]
            if seconds is None:
                return b": waiting for a free GPU to start a worker\n\n"
            about = b", about %d s" % math.ceil(seconds) if seconds else b""
            return b": starting a worker%b\n\n" % about
        return b": queued, position about %d\n\n" % tickets.get(request, 1)
    key = request.key
    if (
        key is not None
        and request.choice is not None
        and request.choice.worker.tier_at(key) is not Tier.GPU
    ):
        return b": loading adapter %b\n\n" % key[0].encode()
    return b": waiting for the first token\n\n"
