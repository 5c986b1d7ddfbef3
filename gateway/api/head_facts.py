"""Shell. What a request's head says, read once. A client that keeps its connection sends the same
head again and again (see RequestHead), so its key need not be looked up for every request.
"""

from __future__ import annotations

import re

from gateway.accounts.account import Account
from gateway.accounts.key_ring import KeyRing
from gateway.api.body.schema import JSON_TYPE
from gateway.http.headers import (
    MAX_SESSION,
    RESUME_HEADER,
    TIMEOUT_HEADER,
    TIMEOUT_MS,
    IncomingRequest,
    authorization_of,
    given_id,
)
from gateway.http.parser import SimpleRequest
from shared.errors import InvalidRequest

_PRIORITY = re.compile(r"-?[0-9]{1,9}\Z")


class HeadFacts:
    """`account` is the one of the head's key in `ring`. `priority` and `timeout_s` None: the client
    gives none. `priority` is within the account's range. `given_id` empty: likewise. `in_batch` is
    for whoever answers the lines of files to say.

    Raises InvalidRequest for a header that cannot be served.
    """

    __slots__ = (
        "account",
        "content_type",
        "given_id",
        "in_batch",
        "may_move",
        "priority",
        "ring",
        "session",
        "timeout_s",
    )

    def __init__(
        self, account: Account, incoming: IncomingRequest, ring: KeyRing | None = None
    ) -> None:
        header = incoming.header
        self.account, self.ring = account, ring
        self.content_type = header("content-type") or JSON_TYPE
        self.given_id = given_id(incoming)
        self.in_batch = False
        self.session = (header("x-session-id") or "")[:MAX_SESSION]
        priority = _priority(header("x-loraplex-priority"))
        self.priority = None if priority is None else account.clamped(priority)
        self.timeout_s = _timeout_s(header(TIMEOUT_HEADER))
        self.may_move = (header(RESUME_HEADER) or "").strip().lower() != "off"


def facts_of(request: SimpleRequest, ring: KeyRing, now: float) -> HeadFacts | None:
    """The facts of its head, as long as they hold. None: a browser sends it for a page. `now` is in
    seconds of the Unix epoch.

    Raises InvalidApiKey or InvalidRequest.
    """
    facts = request.head.facts
    if type(facts) is not HeadFacts or facts.ring is not ring or now >= facts.account.expires:
        header = request.header
        if header("origin") is not None or header("sec-fetch-site") is not None:
            return None
        account = ring.account_of(authorization_of(request), now)
        facts = request.head.facts = HeadFacts(account, request, ring)
    return facts


def _priority(given: str | None) -> int | None:
    """Lower numbers go first. Raises InvalidRequest."""
    if given is not None and not _PRIORITY.match(given):
        raise InvalidRequest(
            "The header x-loraplex-priority must be a whole number; lower goes first.",
            param="x-loraplex-priority",
        )
    return None if given is None else int(given)


def _timeout_s(given: str | None) -> float | None:
    if given is not None and not TIMEOUT_MS.match(given):
        raise InvalidRequest(
            f"The header {TIMEOUT_HEADER} must be a whole number of milliseconds, at least 1.",
            param=TIMEOUT_HEADER,
        )
    return None if given is None else int(given) / 1e3
