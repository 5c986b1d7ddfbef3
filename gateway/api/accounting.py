"""Shell. What a request may cost its account, and what it did cost: limits before it is submitted;
limits, ledger and metrics once it is known what was used.
"""

from __future__ import annotations

from gateway.accounts.account import Account
from gateway.accounts.ledger import Ledger
from gateway.accounts.limiter import Limiter, Reserved
from gateway.dispatch.lifecycle import RequestPhase
from gateway.dispatch.request import EXPECTED_OUTPUT_TOKENS, NOTHING_USED, InFlightRequest
from gateway.telemetry.prometheus import Metrics


class Accounting:
    def __init__(self, limiter: Limiter, ledger: Ledger, metrics: Metrics) -> None:
        self.limiter, self.ledger, self.metrics = limiter, ledger, metrics

    def admit(self, account: Account, request: InFlightRequest) -> RequestBill:
        """The request has its bill from now on. Raises RateLimited."""
        asked, adapter = request.asked, request.model.adapter
        most = asked.output_tokens or account.limits.output_tokens or EXPECTED_OUTPUT_TOKENS
        name = "" if adapter is None else f"{adapter.base}:{adapter.name}"
        tokens = asked.prompt_tokens + most * asked.choices
        bill = RequestBill(self, self.limiter.admit(account, tokens, name))
        request.bill = bill
        return bill


class RequestBill:
    """Of one request that was admitted; settled once, by whoever comes first."""

    __slots__ = ("_accounting", "_reserved")

    def __init__(self, accounting: Accounting, reserved: Reserved) -> None:
        self._accounting = accounting
        self._reserved: Reserved | None = reserved

    @property
    def header_lines(self) -> bytes:
        """What is left of the account's limits."""
        headers = self._reserved.headers if self._reserved is not None else ()
        return "".join(f"{name}: {value}\r\n" for name, value in headers).encode()

    def refuse(self) -> None:
        """The request was turned away: it costs nothing."""
        if self._reserved is not None:
            self._accounting.limiter.settle(self._reserved, 0, refused=True)
            self._reserved = None

    def settle(self, request: InFlightRequest) -> None:
        """What it used is known."""
        used, reserved, phase = request.used, self._reserved, request.life.phase
        if reserved is None:
            return
        if used == NOTHING_USED and phase is RequestPhase.FAILED:
            self.refuse()
            return
        self._reserved = None
        accounting = self._accounting
        accounting.limiter.settle(reserved, used.prompt_tokens + used.output_tokens)
        if used == NOTHING_USED and phase is not RequestPhase.FINISHED:
            return
        base, adapter = request.model.base, request.model.adapter
        of = (reserved.account.name, base, adapter.name if adapter is not None else "")
        accounting.ledger.note(*of, used.prompt_tokens, used.output_tokens)
        accounting.metrics.used(*of, used.prompt_tokens, used.output_tokens)
