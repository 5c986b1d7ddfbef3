"""Pure. The open requests of a gateway process, waiting or running: how many of them each tenant
has, and how many bytes their bodies.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

KEPT_SHARE = 0.1
"""This share of all places and bytes is kept for tenants that hold less than half of them. So one
tenant's long streams do not shut out the others.
"""


class OpenRequests(Generic[T]):
    """The open requests, each with its tenant. If nobody has a key, everybody is the tenant ""."""

    def __init__(self) -> None:
        self._requests: dict[T, tuple[str, int]] = {}  # tenant, bytes of the body
        self._of_tenant: dict[str, _Held] = {}
        self._body_bytes = 0

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[T]:
        return iter(self._requests)

    def add(self, request: T, tenant: str, body_bytes: int = 0) -> None:
        self._requests[request] = tenant, body_bytes
        held = self._of_tenant.setdefault(tenant, _Held())
        held.requests += 1
        held.body_bytes += body_bytes
        self._body_bytes += body_bytes

    def discard(self, request: T) -> None:
        """Idempotent."""
        tenant, body_bytes = self._requests.pop(request, (None, 0))
        if tenant is not None:
            self._body_bytes -= body_bytes
            held = self._of_tenant[tenant]
            held.requests -= 1
            held.body_bytes -= body_bytes
            if not held.requests:
                del self._of_tenant[tenant]

    def full(self, tenant: str, most: int) -> bool:
        """Whether the tenant's next one has no place, if there may be so many of all."""
        held, mine = len(self._requests), self._of_tenant.get(tenant, _NONE).requests
        if held >= most:
            return True
        return bool(tenant) and held >= most * (1.0 - KEPT_SHARE) and 2 * mine >= most

    def too_large(self, tenant: str, body_bytes: int, most: int) -> bool:
        """Whether there is no room for a body of the tenant, if all may have so many bytes."""
        held = self._body_bytes + body_bytes
        mine = self._of_tenant.get(tenant, _NONE).body_bytes + body_bytes
        if held > most:
            return True
        return bool(tenant) and held > most * (1.0 - KEPT_SHARE) and 2 * mine > most


@dataclass(slots=True)
class _Held:
    """What one tenant holds."""

    requests: int = 0
    body_bytes: int = 0


_NONE = _Held()
