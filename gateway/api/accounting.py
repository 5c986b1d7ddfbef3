"""Shell. Charges requests to accounts. Before a request is submitted, its account's limits are
checked. Once it is known what it used, limits, ledger and metrics are updated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from gateway.accounts.account import UNLIMITED, Account
from gateway.accounts.ledger import Ledger
from gateway.accounts.limiter import Limiter
from gateway.dispatch.lifecycle import RequestPhase
from gateway.dispatch.request import (
    EXPECTED_OUTPUT_TOKENS,
    NOTHING_USED,
    InFlightRequest,
    UsedTokens,
)
from gateway.telemetry.prometheus import Metrics
from shared.link import token_ids


class Accounting:
    """The limits, the ledger and the metrics of this gateway process."""

    def __init__(self, limiter: Limiter, ledger: Ledger, metrics: Metrics) -> None:
        self.limiter, self.ledger, self.metrics = limiter, ledger, metrics

    def admit(self, account: Account, request: InFlightRequest) -> RequestCharge:
        """Reserves what the request will likely use, and attaches the charge to it.

        Raises RateLimited if its account has no room.
        """
        tokens, lines = 0, None
        if account.limits is not UNLIMITED:
            asked = request.client_request
            most = asked.output_tokens or account.limits.output_tokens or EXPECTED_OUTPUT_TOKENS
            tokens = asked.prompt_tokens + most * asked.choices
            lines = self.limiter.admit(account, tokens, request.model.adapter)
        charge = request.usage_sink = RequestCharge(self, account, tokens, lines)
        return charge

    def note_progress(self, requests: Iterable[InFlightRequest]) -> None:
        """Puts into the ledger what open requests have used by now, so that little is lost when
        this process is killed.
        """
        for request in requests:
            if isinstance(request.usage_sink, RequestCharge):
                request.usage_sink.note_progress(request)


class RequestCharge:
    """The charge of one admitted request. Only the first call of `refuse` or `settle` has an
    effect. `header_lines` tell the client what is left of its limits. None: it has none.
    """

    __slots__ = (
        "_account",
        "_accounting",
        "_noted",
        "_open",
        "_reserved_tokens",
        "_seen",
        "_then",
        "header_lines",
    )

    def __init__(
        self,
        accounting: Accounting,
        account: Account,
        reserved_tokens: int,
        header_lines: bytes | None,
    ) -> None:
        self._accounting, self._account = accounting, account
        self._reserved_tokens, self.header_lines = reserved_tokens, header_lines
        self._open = True
        self._then: Callable[[], object] = bool  # nobody waits
        self._noted = NOTHING_USED  # of it, in the ledger already
        self._seen = 0  # bytes of the journal that are counted in it

    def once_settled(self, call: Callable[[], object]) -> None:
        """Calls once it is known what the request has used, which may be now."""
        if self._open:
            self._then = call
        else:
            call()

    def refuse(self) -> None:
        """The request was turned away, so it costs nothing."""
        if self._open:
            if self.header_lines is not None:
                settle = self._accounting.limiter.settle
                settle(self._account, self._reserved_tokens, 0, refused=True)
            self._end()

    def note_progress(self, request: InFlightRequest) -> None:
        """Puts into the ledger what the open request has used since the last time."""
        words = request.journal.tokens
        if not self._open or len(words) <= self._seen:
            return
        output_tokens = self._noted.output_tokens + token_ids.count(bytes(words[self._seen :]))
        self._seen = len(words)
        so_far = UsedTokens(request.client_request.prompt_tokens, output_tokens)
        self._note(self._used_by(request), so_far, requests=0)

    def _used_by(self, request: InFlightRequest) -> tuple[str, str, str]:
        adapter = request.model.adapter
        return self._account.name, request.model.base, "" if adapter is None else adapter.name

    def _note(self, of: tuple[str, str, str], used: UsedTokens, *, requests: int) -> None:
        before, self._noted = self._noted, used
        prompt_tokens = used.prompt_tokens - before.prompt_tokens
        output_tokens = used.output_tokens - before.output_tokens
        self._accounting.ledger.note(of, prompt_tokens, output_tokens, requests=requests)

    def _end(self) -> None:
        self._open = False
        then, self._then = self._then, bool
        then()

    def settle(self, request: InFlightRequest) -> None:
        """It is known now what the request used."""
        if not self._open:
            return
        used, phase, accounting = request.used, request.lifecycle.phase, self._accounting
        counts = phase is RequestPhase.FINISHED or used != NOTHING_USED
        if phase is RequestPhase.FAILED and not counts:
            if self._noted != NOTHING_USED:
                self._note(self._used_by(request), NOTHING_USED, requests=0)
            self.refuse()
            return
        if self.header_lines is not None:
            tokens = used.prompt_tokens + used.output_tokens
            accounting.limiter.settle(self._account, self._reserved_tokens, tokens)
        if counts:
            of = self._used_by(request)
            if self._noted is NOTHING_USED:
                accounting.ledger.note(of, used.prompt_tokens, used.output_tokens)
            else:
                self._note(of, used, requests=1)
            accounting.metrics.used(of, used.prompt_tokens, used.output_tokens)
        self._end()
