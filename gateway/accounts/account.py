"""Pure. An account: what the owner of a key may use, how much, and with which priority."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase

import msgspec

ANYTHING = ("*",)
LOWEST_PRIORITY = 999_999_999
"""The largest number that a client can give. Lower numbers go first."""


class AccountLimits(msgspec.Struct, frozen=True):
    """None means no limit. Tokens are those of the prompt plus all answers to it."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_requests: int | None = None
    adapters_per_minute: int | None = None
    n: int | None = None
    body_bytes: int | None = None
    output_tokens: int | None = None


UNLIMITED = AccountLimits()


class Account(msgspec.Struct, frozen=True):
    """One tenant. Its `name` stands for it in queues, metrics, logs and the usage ledger.

    `models` are globs of base models. `adapters` are globs of the part after the colon (an adapter
    or an alias), or of `base:adapter`. `priority` is the range (first, last) that its requests may
    use. `weight` is its share of the service when several tenants wait. `expires` is in seconds of
    the Unix epoch.
    """

    name: str = ""
    models: tuple[str, ...] = ANYTHING
    adapters: tuple[str, ...] = ANYTHING
    priority: tuple[int, int] = (0, LOWEST_PRIORITY)
    weight: float = 1.0
    limits: AccountLimits = UNLIMITED
    expires: float = math.inf

    @property
    def scoped(self) -> bool:
        """Whether there is any model or adapter that it may not use."""
        return self.models != ANYTHING or self.adapters != ANYTHING

    def may_use(self, base: str, adapter: str | None = None) -> bool:
        """`adapter` None stands for the base model itself."""
        if not any(fnmatchcase(base, glob) for glob in self.models):
            return False
        return adapter is None or any(
            fnmatchcase(adapter, glob) or fnmatchcase(f"{base}:{adapter}", glob)
            for glob in self.adapters
        )

    def clamped(self, priority: int) -> int:
        """The allowed priority that is nearest to this one."""
        return min(max(priority, self.priority[0]), self.priority[1])


ANONYMOUS = Account()
"""The account of every request on a gateway that asks for no keys. All of them are one tenant."""
