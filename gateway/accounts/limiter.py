"""Shell. Enforces the limits of accounts. A request is admitted if its account has room for its
estimated tokens. The real number is settled at its end.

Each request passes here twice, so this is written for few steps. What an account's limits come to
is worked out once. What a request gives back at its end counts for the account's next request here,
and elsewhere within SETTLE_S.

If other processes use the table of limits too, an account's balance is read and written with each
request, under the table's lock. If none does, this process keeps the lock and knows the balance.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from gateway.accounts.account import UNLIMITED, Account
from gateway.accounts.shared_limits import BALANCE, MAX_ROWS, SharedLimits, balance_of
from gateway.accounts.token_buckets import FULL_S, MINUTE_S, duration, each_s, level, rate_lines
from shared.adapters.identity import AdapterRef
from shared.errors import RateLimited

SETTLE_S = 0.1
"""How late other gateway processes see what a request has given back."""
REQUESTS, TOKENS = "requests_per_minute", "tokens_per_minute"
ADAPTERS, OPEN_REQUESTS = "adapters_per_minute", "concurrent_requests"
"""The limits that are kept here, by their names in AccountLimits."""
BUSY_RETRY_AFTER_S = 1.0
"""The Retry-After for an account with too many open requests. Nobody knows when one of them will
end.
"""


@dataclass(slots=True, eq=False)
class LimitTerms:
    """An account's limits as they are computed with: the seconds in which one request, token or
    new adapter flows in, and how many come in a second. Its balance is at `balance` in the table,
    its open requests of this process in cell `own`. `lines` are the header lines of its rates, to
    be filled in.

    Its balance: in how many seconds from `at` each bucket is full (see token_buckets), and how many
    requests are open here and in other processes. What requests have given back (negative: used
    beyond their estimate), and is not in the balance yet, is in `requests_back_s` and
    `tokens_back_s`.
    """

    account: Account
    balance: int
    own: int
    request_s: float
    token_s: float
    adapter_s: float
    open_requests: float
    requests_per_s: float
    tokens_per_s: float
    lines: bytes
    at: float = 0.0
    requests_s: float = 0.0
    tokens_s: float = 0.0
    adapters_s: float = 0.0
    open_elsewhere: float = 0.0
    open_here: float = 0.0
    requests_back_s: float = 0.0
    tokens_back_s: float = 0.0

    def advance(self, now: float) -> None:
        """The balance as of now, with what requests have given back."""
        since_s, self.at = now - self.at, now
        self.requests_s = _less(_less(self.requests_s, since_s), self.requests_back_s)
        self.tokens_s = _less(_less(self.tokens_s, since_s), self.tokens_back_s)
        self.adapters_s = _less(self.adapters_s, since_s)
        self.requests_back_s = self.tokens_back_s = 0.0


class Limiter:
    def __init__(self, table: SharedLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self._table, self._clock = table, clock
        self._alone = table.alone
        self._terms: dict[str, LimitTerms] = {}
        # of those whose balance in the table is behind
        self._unwritten: dict[LimitTerms, None] = {}

    async def run(self) -> None:
        while True:
            self.settle_with_others()
            await asyncio.sleep(SETTLE_S)

    def settle_with_others(self) -> None:
        """Writes what others must know, and finds out whether there are any."""
        self.flush()
        if self._table.keep_if_unshared():
            self._terms.clear()  # read again where they are needed

    def flush(self) -> None:
        """Writes what requests that have come or ended have changed."""
        if self._unwritten:
            unwritten, self._unwritten = self._unwritten, {}
            now = self._clock()
            with self._alone:
                for terms in unwritten:
                    self._read(terms)
                    terms.advance(now)
                    self._write(terms)

    def admit(
        self, account: Account, tokens: int, adapter: AdapterRef | None = None
    ) -> bytes | None:
        """Admits a request of about `tokens` tokens, which are reserved until `settle`. Returns
        header lines for its answer, which tell what is left. None: nothing is limited.

        Raises RateLimited if the account has no room. Nothing is reserved then.
        """
        terms = self._terms.get(account.name)
        if terms is None or terms.account is not account:
            if account.limits == UNLIMITED:
                return None
            terms = self._load(account)
        if self._alone.kept:
            self._unwritten[terms] = None
            return self._take(terms, tokens, adapter)
        with self._alone:
            self._read(terms)
            try:
                return self._take(terms, tokens, adapter)
            finally:  # also of one that is refused: what was given back is in the balance
                self._write(terms)

    def settle(self, account: Account, reserved: int, used: int, *, refused: bool = False) -> None:
        """Called once for each request that was admitted under a limit, with the tokens that were
        reserved and those that were really used. With `refused`, the request costs nothing.
        """
        terms = self._terms.get(account.name)
        if terms is None:
            terms = self._load(account)
        terms.open_here -= 1.0
        back_s = (reserved - used) * terms.token_s
        if refused or back_s < 0.0 or terms.tokens_back_s or not self._alone.kept:
            terms.requests_back_s += terms.request_s if refused else 0.0
            terms.tokens_back_s += back_s
        else:
            tokens_s = terms.tokens_s - back_s
            terms.tokens_s = tokens_s if tokens_s > 0.0 else 0.0
        self._unwritten[terms] = None

    def levels(self, account: Account) -> dict[str, float]:
        """What is left now of each limit that the account has, by the limit's name. Of concurrent
        requests it is how many more may be opened.
        """
        if account.limits == UNLIMITED:
            return {}
        self.flush()
        terms = self._terms.get(account.name)
        if terms is None or terms.account is not account:
            terms = self._load(account)
        with self._alone:
            self._read(terms)
        limits = account.limits
        terms.advance(self._clock())
        found = {
            REQUESTS: _left(terms.requests_s, limits.requests_per_minute),
            TOKENS: _left(terms.tokens_s, limits.tokens_per_minute),
            ADAPTERS: _left(terms.adapters_s, limits.adapters_per_minute),
            OPEN_REQUESTS: terms.open_requests - terms.open_here - terms.open_elsewhere,
        }
        return {name: round(left, 1) for name, left in found.items() if left < math.inf}

    # ---- inside ----------------------------------------------------------------------------------

    def _take(self, terms: LimitTerms, tokens: int, adapter: AdapterRef | None) -> bytes:
        """Of a balance that is known. While alone."""
        now = self._clock()
        if terms.tokens_back_s or terms.requests_back_s:
            terms.advance(now)
        opened, since_s = terms.open_here + terms.open_elsewhere, now - terms.at
        if opened >= terms.open_requests:
            raise _busy(terms.open_requests)
        # how long until each bucket is full, once the request has taken its part
        requests_s, tokens_s = terms.requests_s - since_s, terms.tokens_s - since_s
        requests_s = terms.request_s if requests_s < 0.0 else requests_s + terms.request_s
        more_s = tokens * terms.token_s
        tokens_s = more_s if tokens_s < 0.0 else tokens_s + more_s
        if requests_s > FULL_S or tokens_s > FULL_S:
            raise _refused(terms, requests_s, tokens_s, tokens)
        adapters_s = terms.adapters_s
        if adapters_s:
            adapters_s = _less(adapters_s, since_s)
        if adapter is not None and terms.adapter_s:
            name = f"{adapter.base}:{adapter.name}"
            place, last = self._table.last_use(terms.account.name, name)
            if not 0 <= now - last <= MINUTE_S:
                adapters_s += terms.adapter_s
                if adapters_s > FULL_S:
                    raise _refused(terms, requests_s, tokens_s, tokens, adapters_s)
            self._table.use(place, terms.account.name, name, now)
        terms.at, terms.adapters_s, terms.open_here = now, adapters_s, terms.open_here + 1.0
        terms.requests_s, terms.tokens_s = requests_s, tokens_s
        # A process that is killed now has not forgotten it.
        BALANCE.pack_into(
            self._table.map, terms.balance, now, requests_s, tokens_s, adapters_s, opened + 1.0
        )
        # as level() has it; it is not negative here
        requests = (FULL_S - requests_s) * terms.requests_per_s
        left = (FULL_S - tokens_s) * terms.tokens_per_s
        return _lines(terms, requests, requests_s, left, tokens_s)

    def _read(self, terms: LimitTerms) -> None:
        """The balance in the table, if other processes may have changed it. While alone."""
        if not self._alone.kept:
            table = self._table
            terms.at, terms.requests_s, terms.tokens_s, terms.adapters_s, opened = (
                BALANCE.unpack_from(table.map, terms.balance)
            )
            terms.open_elsewhere = opened - table.cells[terms.own]

    def _write(self, terms: LimitTerms) -> None:
        """While alone."""
        BALANCE.pack_into(
            self._table.map,
            terms.balance,
            terms.at,
            terms.requests_s,
            terms.tokens_s,
            terms.adapters_s,
            terms.open_here + terms.open_elsewhere,
        )
        self._table.cells[terms.own] = terms.open_here
        self._unwritten.pop(terms, None)

    def _load(self, account: Account) -> LimitTerms:
        """Of an account that is new here, or whose limits have changed. What was used beyond the
        old limits is forgiven then: it was counted in their minutes.
        """
        self.flush()
        table, limits, before = self._table, account.limits, self._terms.get(account.name)
        changed = before is not None and before.account.limits != limits
        most_s = MINUTE_S if changed else math.inf
        if len(self._terms) >= MAX_ROWS:
            self._terms.clear()
        with table.alone:
            row = table.row(account.name)
            *balance, opened = BALANCE.unpack_from(table.map, balance_of(row))
            here = table.cells[row + table.own]
            terms = self._terms[account.name] = LimitTerms(
                account,
                balance_of(row),
                row + table.own,
                each_s(limits.requests_per_minute),
                each_s(limits.tokens_per_minute),
                each_s(limits.adapters_per_minute),
                math.inf if limits.concurrent_requests is None else limits.concurrent_requests,
                (limits.requests_per_minute or 0) / MINUTE_S,
                (limits.tokens_per_minute or 0) / MINUTE_S,
                rate_lines("requests", limits.requests_per_minute)
                + rate_lines("tokens", limits.tokens_per_minute),
            )
            terms.at, requests_s, tokens_s, terms.adapters_s = balance
            terms.requests_s = min(requests_s, most_s) if terms.request_s else 0.0
            terms.tokens_s = min(tokens_s, most_s) if terms.token_s else 0.0
            terms.open_elsewhere, terms.open_here = opened - here, here
            self._write(terms)
        return terms


def _less(seconds: float, by_s: float) -> float:
    return max(seconds - by_s, 0.0)


def _left(until_full_s: float, per_minute: int | None) -> float:
    return math.inf if per_minute is None else level(until_full_s, per_minute)


def _lines(
    terms: LimitTerms, requests: float, requests_s: float, tokens: float, tokens_s: float
) -> bytes:
    """So many requests and tokens are left, and the buckets are full in so many seconds."""
    if terms.request_s and terms.token_s:
        return terms.lines % (requests, duration(requests_s), tokens, duration(tokens_s))
    if terms.request_s:
        return terms.lines % (requests, duration(requests_s))
    if terms.token_s:
        return terms.lines % (tokens, duration(tokens_s))
    return b""


def _busy(limit: float) -> RateLimited:
    text = f"This key may have {limit:.0f} requests open at once."
    error = RateLimited(text, retry_after_s=BUSY_RETRY_AFTER_S)
    error.limit = OPEN_REQUESTS
    return error


def _refused(
    terms: LimitTerms, requests_s: float, tokens_s: float, needed: int, adapters_s: float = 0.0
) -> RateLimited:
    """The first limit that has no room says so. The buckets would be full in so many seconds if
    there were room.
    """
    limits = terms.account.limits
    if requests_s > FULL_S:
        what, after_s, limit = "requests", requests_s - MINUTE_S, limits.requests_per_minute
    elif tokens_s > FULL_S:
        what, after_s, limit = "tokens", tokens_s - MINUTE_S, limits.tokens_per_minute
    else:
        what, after_s, limit = "adapters", adapters_s - MINUTE_S, limits.adapters_per_minute
    requests_s, tokens_s = requests_s - terms.request_s, tokens_s - needed * terms.token_s
    requests = level(requests_s, limits.requests_per_minute or 0)
    tokens = level(tokens_s, limits.tokens_per_minute or 0)
    text = f"This key may use {limit} {what} a minute"
    if what == "tokens":
        text += f"; this request may take {needed}, and {tokens:.0f} are left"
        after_s = min(after_s, tokens_s)  # one that is larger than the bucket waits for a full one
    error = RateLimited(text + ".", retry_after_s=after_s if limit else MINUTE_S)
    error.limit = f"{what}_per_minute"
    told = _lines(terms, requests, requests_s, tokens, tokens_s).decode()
    error.headers = {
        name: value for name, _, value in (line.partition(": ") for line in told.splitlines())
    }
    return error
