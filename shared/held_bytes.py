"""Pure. How many bytes each tenant holds of a room that all share."""

from __future__ import annotations

KEPT_SHARE = 0.1
"""This share of a room is kept for tenants that hold less than half of it. So one tenant's large
bodies, or long streams, do not shut out the others.
"""


class HeldBytes:
    """`total` is held by all together. If nobody has a key, everybody is the tenant ""."""

    def __init__(self) -> None:
        self.total = 0
        self._of_tenant: dict[str, int] = {}

    def add(self, tenant: str, count: int) -> None:
        """`count` is negative for bytes that are given back."""
        self.total += count
        left = self._of_tenant.get(tenant, 0) + count
        if left:
            self._of_tenant[tenant] = left
        else:
            self._of_tenant.pop(tenant, None)

    def beyond(self, tenant: str, most: int, more: int = 0) -> bool:
        """Whether the tenant holds too much, or would with `more`, if there is room for `most`."""
        total, mine = self.total + more, self._of_tenant.get(tenant, 0) + more
        if total > most:
            return True
        return bool(tenant) and total > most * (1.0 - KEPT_SHARE) and 2 * mine > most
