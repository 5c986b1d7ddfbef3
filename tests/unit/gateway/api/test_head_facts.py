"""What a head says is read once for a connection, and holds no longer than its key does."""

from __future__ import annotations

import math

import pytest

from gateway.accounts.account import Account
from gateway.accounts.key_ring import KeyRing, digest_of
from gateway.api.head_facts import facts_of
from gateway.http.parser import SimpleRequest, parse
from shared.errors import InvalidApiKey, InvalidRequest

NOW = 1000.0


def ring(expires: float = math.inf) -> KeyRing:
    return KeyRing({digest_of("key"): Account("a", expires=expires)})


def request(*lines: str, before: SimpleRequest | None = None) -> SimpleRequest:
    """The next request of a connection on which `before` was the last one."""
    every = ("POST / HTTP/1.1", "Host: x", "Authorization: Bearer key", "Content-Length: 2", *lines)
    data = "".join(f"{line}\r\n" for line in (*every, "")).encode() + b"{}"
    found = parse(data, 1000, None if before is None else before.head)
    assert isinstance(found, SimpleRequest)
    return found


def test_the_same_head_is_read_once() -> None:
    keys, first = ring(), request("x-session-id: s", "x-loraplex-timeout-ms: 1500")
    facts = facts_of(first, keys, NOW)
    assert facts is not None and (facts.account.name, facts.session) == ("a", "s")
    assert facts.timeout_s == 1.5
    again = request("x-session-id: s", "x-loraplex-timeout-ms: 1500", before=first)
    assert facts_of(again, keys, NOW) is facts
    other = facts_of(request("x-session-id: t", before=again), keys, NOW)
    assert other is not None and (other.session, other.timeout_s) == ("t", None)


@pytest.mark.parametrize("off", ["off", "OFF", "Off "])
def test_an_answer_that_is_not_to_move_is_told_by_its_head_in_any_case_of_letters(off: str) -> None:
    facts = facts_of(request(f"x-loraplex-resume: {off}"), ring(), NOW)
    assert facts is not None and not facts.may_move
    facts = facts_of(request("x-loraplex-resume: on"), ring(), NOW)
    assert facts is not None and facts.may_move


def test_a_key_that_was_revoked_is_refused_on_a_connection_that_had_it() -> None:
    first = request()
    assert facts_of(first, ring(), NOW) is not None
    with pytest.raises(InvalidApiKey, match="wrong"):
        facts_of(request(before=first), KeyRing({}, asks=True), NOW)


def test_a_key_that_has_expired_is_refused_on_a_connection_that_had_it() -> None:
    keys, first = ring(NOW + 1.0), request()
    assert facts_of(first, keys, NOW) is not None
    with pytest.raises(InvalidApiKey, match="expired"):
        facts_of(request(before=first), keys, NOW + 1.0)


def test_what_a_page_sends_is_not_looked_at_here() -> None:
    for line in ("Origin: https://other.example", "Sec-Fetch-Site: cross-site"):
        assert facts_of(request(line), KeyRing({}, asks=True), NOW) is None


@pytest.mark.parametrize("line", ["x-loraplex-priority: high", "x-loraplex-timeout-ms: 0"])
def test_a_header_that_means_nothing_is_refused_each_time(line: str) -> None:
    first = request(line)
    for again in (first, request(line, before=first)):
        with pytest.raises(InvalidRequest):
            facts_of(again, ring(), NOW)
