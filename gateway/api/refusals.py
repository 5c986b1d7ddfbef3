"""Shell. Notes requests that were turned away before they could wait for a worker: their key was
over a limit, their adapter is invalid, their model is unknown. So they are among /admin/requests,
and `loraplex why` can tell of them.

Requests without a valid key are not noted: anybody can send them.
"""

from __future__ import annotations

from gateway.accounts.account import Account
from gateway.api.exchange import Exchange
from gateway.api.services import GenerationServices
from gateway.dispatch.request import message_of
from gateway.dispatch.request_summary import INVALID, LIMITED, REFUSED
from gateway.http.headers import IncomingRequest, request_id_of
from gateway.telemetry.ended_request import EndedRequest
from shared.errors import LoraplexError, RateLimited

MAX_MODEL = 200
"""Characters of a model's name that are kept; the client chose it."""


def note_refusal(
    services: GenerationServices,
    incoming: IncomingRequest,
    account: Account | None,
    exchange: Exchange | None,
    error: LoraplexError,
) -> None:
    """Gives the error its request id, and notes the request. The dispatcher has noted those that
    came to it. `account` None: the key was not valid. `exchange` None: the request could not be
    read, or its key may not ask for this.
    """
    known = exchange.request_id if exchange is not None else request_id_of(incoming)
    error.request_id = error.request_id or known
    if account is None or (exchange is not None and exchange.submitted):
        return
    now = services.dispatcher.clock()
    waited_s = exchange.age_s if exchange is not None else 0.0
    model = exchange.model[:MAX_MODEL] if exchange is not None else ""
    base, _, adapter = model.partition(":")
    trace = None
    if services.traces is not None:
        trace = services.traces.begin(incoming.header, now - waited_s, b"")
    ended = EndedRequest(
        base,
        adapter or None,
        _outcome(error),
        None,
        now - waited_s,
        0.0,
        0.0,
        now,
        error.request_id,
        account.name,
        code=error.code,
        path=incoming.path,
        message=message_of(error),
        trace_id="" if trace is None else trace.id,
    )
    services.metrics.refused(ended, error.limit)
    if trace is not None:
        trace.ended(ended)


def _outcome(error: LoraplexError) -> str:
    if isinstance(error, RateLimited):
        return LIMITED
    return INVALID if error.status < 500 else REFUSED
