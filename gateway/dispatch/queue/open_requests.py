"""Pure. The open requests of a gateway process, waiting or running, and how many of them each
tenant has.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

KEPT_SHARE = 0.1
"""This share of all places is kept for tenants that hold less than half of them. So one tenant's
long streams do not shut out the others.
"""


class OpenRequests(Generic[T]):
    """The open requests, each with its tenant. If nobody has a key, everybody is the tenant ""."""

    def __init__(self) -> None:
        self._tenants: dict[T, str] = {}
        self._of_tenant: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._tenants)

    def __iter__(self) -> Iterator[T]:
        return iter(self._tenants)

    def add(self, request: T, tenant: str) -> None:
        self._tenants[request] = tenant
        self._of_tenant[tenant] = self._of_tenant.get(tenant, 0) + 1

    def discard(self, request: T) -> None:
        """Idempotent."""
        tenant = self._tenants.pop(request, None)
        if tenant is not None:
            left = self._of_tenant[tenant] - 1
            if left:
                self._of_tenant[tenant] = left
            else:
                del self._of_tenant[tenant]

    def full(self, tenant: str, most: int) -> bool:
        """Whether the tenant's next one has no place, if there may be so many of all."""
        held = len(self._tenants)
        if held >= most:
            return True
        return (
            bool(tenant)
            and held >= most * (1.0 - KEPT_SHARE)
            and 2 * self._of_tenant.get(tenant, 0) >= most
        )
