"""Pure. What a key may do: an account with its scope, its priorities, its weight and its limits."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase

import msgspec

ANYTHING = ("*",)
LOWEST_PRIORITY = 999_999_999
"""The largest number that a client can give; lower numbers go first."""


class AccountLimits(msgspec.Struct, frozen=True):
    """None: no limit. Tokens are those of the prompt and of all answers together."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_requests: int | None = None
    adapters_per_minute: int | None = None
    n: int | None = None
    body_bytes: int | None = None
    output_tokens: int | None = None


UNLIMITED = AccountLimits()


class Account(msgspec.Struct, frozen=True):
    """One tenant. `name` stands for it in queues, metrics, logs and the usage ledger.

    `models` and `adapters` are globs: of base models, and of what stands behind the colon (an
    adapter, an alias), or of `base:adapter`. `priority` is the range (first, last) that its
    requests are kept in. `weight` is its share of the service beside others that wait. `expires` is
    in seconds of the Unix epoch.
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
        """Whether there is anything that it may not use."""
        return self.models != ANYTHING or self.adapters != ANYTHING

    def may_use(self, base: str, adapter: str | None = None) -> bool:
        """`adapter` None: the base model itself."""
        if not any(fnmatchcase(base, glob) for glob in self.models):
            return False
        return adapter is None or any(
            fnmatchcase(adapter, glob) or fnmatchcase(f"{base}:{adapter}", glob)
            for glob in self.adapters
        )

    def clamped(self, priority: int) -> int:
        """The nearest priority that it may use."""
        return min(max(priority, self.priority[0]), self.priority[1])


ANONYMOUS = Account()
"""Whoever asks a gateway that asks for no keys: one tenant, whatever it calls itself."""
