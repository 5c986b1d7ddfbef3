"""Shell. Lets a request in if its account's limits have room for it, for what it will likely take;
what it took in truth is settled at its end.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from gateway.accounts import buckets
from gateway.accounts.account import UNLIMITED, Account
from gateway.accounts.shared_table import AT, FIRST_LEVEL, SharedTable
from shared.errors import RateLimited

REQUESTS, TOKENS, ADAPTERS = range(3)
BUSY_RETRY_AFTER_S = 1.0
"""Where an account has too many requests open: nobody knows when one will end."""


@dataclass(frozen=True, slots=True)
class Reserved:
    """What a request holds of its account's limits. `headers` tell the client what is left."""

    account: Account
    tokens: int = 0
    headers: tuple[tuple[str, str], ...] = ()


class Limiter:
    """`table` None: nothing is limited."""

    def __init__(
        self, table: SharedTable | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._table, self._clock = table, clock

    def admit(self, account: Account, tokens: int, adapter: str = "") -> Reserved:
        """For a request that will take about so many tokens. Raises RateLimited, and then nothing
        is held.
        """
        table, limits = self._table, account.limits
        if table is None or limits == UNLIMITED:
            return Reserved(account)
        per_minute = _per_minute(account)
        needed = [1.0, float(tokens), 0.0]
        now = self._clock()
        with table.alone:
            row, levels = self._levels(table, account, per_minute, now)
            busy = limits.concurrent_requests
            if busy is not None and table.open_requests(row) >= busy:
                raise _busy(busy)
            at = 0
            if limits.adapters_per_minute is not None and adapter:
                at, last = table.last_use(account.name, adapter)
                needed[ADAPTERS] = float(not 0 <= now - last <= buckets.MINUTE_S)
            for what, limit in enumerate(per_minute):
                if limit is not None and needed[what] > levels[what]:
                    raise _refused(what, needed[what], levels, per_minute)
            if at:
                table.use(at, account.name, adapter, now)
            for what in range(3):
                levels[what] -= needed[what]
                table.cells[row + FIRST_LEVEL + what] = levels[what]
            table.cells[row + table.own] += 1
        return Reserved(account, tokens, tuple(_headers(levels, per_minute).items()))

    def settle(self, reserved: Reserved, used_tokens: int, *, refused: bool = False) -> None:
        """Once for each reservation. `refused`: the request costs nothing."""
        table, account = self._table, reserved.account
        if table is None or account.limits == UNLIMITED:
            return
        per_minute = _per_minute(account)
        back = (float(refused), float(reserved.tokens - used_tokens))
        with table.alone:
            row, levels = self._levels(table, account, per_minute, self._clock())
            for what, tokens in enumerate(back):
                limit = per_minute[what]
                if limit is not None:
                    level = min(float(limit), levels[what] + tokens)
                    table.cells[row + FIRST_LEVEL + what] = level
            table.cells[row + table.own] = max(0.0, table.cells[row + table.own] - 1)

    def _levels(
        self,
        table: SharedTable,
        account: Account,
        per_minute: tuple[int | None, int | None, int | None],
        now: float,
    ) -> tuple[int, list[float]]:
        """(row, what is left as of now)."""
        row, new = table.row(account.name)
        cells = table.cells
        since_s = now - cells[row + AT]
        cells[row + AT] = now
        levels = []
        for what, limit in enumerate(per_minute):
            level = math.inf  # so that a limit that is set later begins full
            if limit is not None:
                level = math.inf if new else cells[row + FIRST_LEVEL + what]
                level = buckets.filled(level, limit, since_s)
            cells[row + FIRST_LEVEL + what] = level
            levels.append(level)
        return row, levels


def _per_minute(account: Account) -> tuple[int | None, int | None, int | None]:
    limits = account.limits
    return limits.requests_per_minute, limits.tokens_per_minute, limits.adapters_per_minute


def _headers(
    levels: list[float], per_minute: tuple[int | None, int | None, int | None]
) -> dict[str, str]:
    headers: dict[str, str] = {}
    for what, name in ((REQUESTS, "requests"), (TOKENS, "tokens")):
        limit = per_minute[what]
        if limit is not None:
            headers |= buckets.rate_headers(name, levels[what], limit)
    return headers


def _busy(limit: int) -> RateLimited:
    return RateLimited(
        f"This key may have {limit} requests open at once.", retry_after_s=BUSY_RETRY_AFTER_S
    )


def _refused(
    what: int,
    needed: float,
    levels: list[float],
    per_minute: tuple[int | None, int | None, int | None],
) -> RateLimited:
    limit = per_minute[what] or 0
    name = ("requests", "tokens", "adapters")[what]
    text = f"This key may use {limit} {name} a minute"
    if what == TOKENS:
        text += f"; this request may take {needed:.0f}, and {max(0.0, levels[what]):.0f} are left"
    after_s = buckets.wait_s(levels[what], needed, limit) if limit else buckets.MINUTE_S
    error = RateLimited(text + ".", retry_after_s=after_s)
    error.headers = _headers(levels, per_minute)
    return error
