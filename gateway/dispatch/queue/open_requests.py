"""Pure. The open requests of a gateway process, waiting or running: how many of them each tenant
has, and how many bytes their bodies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Generic, TypeVar

from shared.held_bytes import KEPT_SHARE, HeldBytes

T = TypeVar("T")


class OpenRequests(Generic[T]):
    """The open requests, each with its tenant. If nobody has a key, everybody is the tenant ""."""

    def __init__(self) -> None:
        self._requests: dict[T, tuple[str, int]] = {}  # tenant, bytes of the body
        self._of_tenant: Counter[str] = Counter()
        self._bodies = HeldBytes()

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[T]:
        return iter(self._requests)

    def add(self, request: T, tenant: str, body_bytes: int = 0) -> None:
        self._requests[request] = tenant, body_bytes
        self._of_tenant[tenant] += 1
        self._bodies.add(tenant, body_bytes)

    def discard(self, request: T) -> None:
        """Idempotent."""
        tenant, body_bytes = self._requests.pop(request, (None, 0))
        if tenant is not None:
            self._bodies.add(tenant, -body_bytes)
            self._of_tenant[tenant] -= 1
            if not self._of_tenant[tenant]:
                del self._of_tenant[tenant]

    def full(self, tenant: str, most: int) -> bool:
        """Whether the tenant's next one has no place, if there may be so many of all."""
        held = len(self._requests)
        if held >= most:
            return True
        return (
            bool(tenant)
            and held >= most * (1.0 - KEPT_SHARE)
            and 2 * self._of_tenant[tenant] >= most
        )

    def too_large(self, tenant: str, body_bytes: int, most: int) -> bool:
        """Whether there is no room for a body of the tenant, if all may have so many bytes."""
        return self._bodies.beyond(tenant, most, body_bytes)
