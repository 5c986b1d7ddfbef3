"""Pure. Requests that two workers died of. The same request may kill the next two, and clients ask
again by themselves after a 500. So it is refused for a while.

The same request is one of the same tenant with the same body, for the same path and version of a
model. So nobody can have another tenant's requests refused.
"""

from __future__ import annotations

from typing import TypeAlias

from gateway.dispatch.request import InFlightRequest
from shared.adapters.identity import AdapterKey
from shared.errors import WorkersDied

REFUSED_S = 300.0
"""As long as the two workers may take to start again, with a large model."""
MAX_REMEMBERED = 1024
Fingerprint: TypeAlias = tuple[str, str, str, AdapterKey | None, int]


class DeadlyRequests:
    """Times are in seconds of one clock. The oldest is forgotten first."""

    def __init__(self) -> None:
        self._until: dict[Fingerprint, float] = {}

    def note(self, request: InFlightRequest, now: float) -> None:
        """Workers have died of it."""
        mark = fingerprint(request)
        self._until.pop(mark, None)
        self._until[mark] = now + REFUSED_S
        if len(self._until) > MAX_REMEMBERED:
            del self._until[next(iter(self._until))]

    def refusal(self, request: InFlightRequest, now: float) -> WorkersDied | None:
        """The error for a request of which workers have died a while ago. None: none did."""
        if not self._until or self._until.get(fingerprint(request), 0.0) <= now:
            return None
        return WorkersDied(
            f"Workers died of this request. It is refused for {REFUSED_S:.0f} s after that."
        )


def fingerprint(request: InFlightRequest) -> Fingerprint:
    asked = request.client_request
    tenant, base = request.requester.tenant, request.model.base
    return tenant, asked.path, base, request.key, hash(asked.body)
