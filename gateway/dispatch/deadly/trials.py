"""Shell. A request that is suspected of killing workers gets one that has no other of which any
died: it is on trial there. If that worker dies too, it was this request. If not, it was another
one.

The worker keeps to it, since all gateways give it requests (worker/requests/trials.py). What one
gateway knows by itself it does not ask the worker for.
"""

from __future__ import annotations

from collections.abc import Set

from gateway.dispatch.deadly.death_table import RowKey
from gateway.dispatch.deadly.requests import DeadlyRequests, key_of_request
from gateway.dispatch.request import InFlightRequest
from gateway.dispatch.streams.stream_table import StreamTable
from shared.link.messages import SUSPECTED

ASK_AGAIN_S = 0.05
"""After so long a worker that had another trial is asked again. The other trial is over with the
first token.
"""
ASK_BYTES_PER_S = 20e6
"""The body travels each time. So a large one is asked with less often."""


class Trials:
    """`streams` are those of this gateway process, and `deadly` knows of what workers died. Times
    are seconds of the dispatcher's clock.
    """

    def __init__(self, streams: StreamTable, deadly: DeadlyRequests) -> None:
        self._streams = streams
        self._deadly = deadly
        self.suspicion = deadly.suspicion
        self._occupied: dict[bytes, float] = {}
        """Lives of workers that have a trial of another gateway: when to ask them again."""
        self._copies: dict[bytes, tuple[float, Set[RowKey]]] = {}
        """Lives of workers: until when it holds, and what was found there."""

    def admits(self, request: InFlightRequest, peer: bytes, now: float) -> bool:
        """Whether the request, which is suspected or a copy of one that is, may go to this life of
        a worker now. Copies may be there together: if the worker dies, it was one of them.
        """
        self._occupied = {of: until for of, until in self._occupied.items() if until > now}
        self._copies = {of: found for of, found in self._copies.items() if found[0] > now}
        if peer in self._occupied:
            return False
        on_trial = request.lifecycle.deaths >= SUSPECTED
        too_many, own = 1 if on_trial else SUSPECTED, key_of_request(request)
        there = self._streams.of_peer(peer).requests.values()
        lost = (other for other in there if other.lifecycle.deaths >= too_many)
        if any(key_of_request(other) != own for other in lost):
            return False
        return not on_trial or self._copies_there(peer, now) <= {own}

    def refused(self, request: InFlightRequest, now: float) -> None:
        """The request's worker has a trial that this gateway does not know of."""
        size_bytes = len(request.client_request.body)
        self._occupied[request.peer] = now + max(ASK_AGAIN_S, size_bytes / ASK_BYTES_PER_S)

    def over_at(self, until: float | None) -> float | None:
        """When a request that was not admitted is to be placed again, even if nothing happens until
        then. `until`: when the policy wants to be asked again.
        """
        copies = (found_until for found_until, found in self._copies.values() if found)
        return min(filter(None, (until, *self._occupied.values(), *copies)), default=None)

    def _copies_there(self, peer: bytes, now: float) -> Set[RowKey]:
        """Of what the requests are copies that have lost no worker themselves. It is looked up in
        the table for each, so it is not done anew for each of hundreds that have lost theirs.
        """
        if peer not in self._copies:
            there = self._streams.of_peer(peer).requests.values()
            unharmed = (other for other in there if not other.lifecycle.deaths)
            found = {key_of_request(o) for o in unharmed if self._deadly.suspicion(o, now).deaths}
            self._copies[peer] = now + ASK_AGAIN_S, found
        return self._copies[peer][1]
