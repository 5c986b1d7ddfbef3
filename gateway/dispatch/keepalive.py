"""Pure. What a stream is told while it waits: SSE comments, which clients skip and proxies take as a sign of life.

A request enters once and leaves once (with its first frame or its end), and one sweep over all of them finds those whose turn it is: no timer
and no task per request, nothing per token.
"""

from __future__ import annotations

from collections.abc import Mapping

from gateway.dispatch.lifecycle import Phase
from gateway.dispatch.request import Flight, adapter_key
from shared.link.messages import Tier


class Progress:
    """Requests that wait for their first frame, the next one due first. `every_s` 0: nobody is ever due."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._due: dict[Flight, float] = {}  # all wait equally long between two turns, so the order of entry is that of the turns

    def __len__(self) -> int:
        return len(self._due)

    def enter(self, flight: Flight, now: float) -> None:
        if self._every_s:
            self._due[flight] = now + self._every_s

    def leave(self, flight: Flight) -> None:
        """Idempotent."""
        self._due.pop(flight, None)

    def turns(self, now: float) -> list[Flight]:
        """Those whose turn it is; each has its next one `every_s` from now."""
        found: list[Flight] = []
        for flight, when in self._due.items():
            if when > now:
                break
            found.append(flight)
        for flight in found:
            del self._due[flight]
            self._due[flight] = now + self._every_s
        return found


def comment(flight: Flight, places: Mapping[Flight, int]) -> bytes:
    """What it waits for, as one SSE comment. `places` are positions in the queue; an adapter's name holds no character that means something here."""
    if flight.life.phase is Phase.QUEUED:
        return b": queued, position about %d\n\n" % places.get(flight, 1)
    key = adapter_key(flight.adapter)
    if key is not None and flight.choice is not None and flight.choice.worker.tier_at(key) is not Tier.GPU:
        return b": loading adapter %b\n\n" % key[0].encode()
    return b": waiting for the first token\n\n"
