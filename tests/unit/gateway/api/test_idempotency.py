"""Whose answer a key names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.accounts.account import Account
from gateway.api.idempotency import OpenKeys, answer_key
from gateway.dispatch.workers.commands import AnswerFinder
from gateway.http.headers import IncomingRequest
from shared.errors import IdempotencyKeyInUse, IdempotencyKeyReused, InvalidRequest
from shared.link.messages import AnswerKey

TEXT = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=20)


class Asked:
    path = "/v1/chat/completions"
    method = "POST"

    def __init__(self, headers: Mapping[str, str]) -> None:
        self._headers = headers

    def header(self, name: str) -> str | None:
        return self._headers.get(name)


def key(
    account: str, given_key: str | None, body: bytes = b"{}", **headers: str
) -> AnswerKey | None:
    found = {**headers, **({} if given_key is None else {"idempotency-key": given_key})}
    return answer_key(Account(name=account), cast(IncomingRequest, Asked(found)), body)


def need(found: AnswerKey | None) -> AnswerKey:
    assert found is not None
    return found


@given(TEXT, TEXT, TEXT, TEXT)
def test_no_account_can_name_another_ones_answer_whatever_key_it_sends(
    a: str, b: str, key_a: str, key_b: str
) -> None:
    same = need(key(a, key_a)).tag == need(key(b, key_b)).tag
    assert same == ((a, key_a) == (b, key_b))


def test_a_key_belongs_to_one_path_type_and_body() -> None:
    first = need(key("a", "k"))
    assert need(key("a", "k")) == first
    for other in (key("a", "k", b"{ }"), key("a", "k", **{"content-type": "application/json"})):
        assert need(other).tag == first.tag and need(other).digest != first.digest


def test_without_the_header_there_is_no_key_and_one_that_cannot_be_is_refused() -> None:
    assert key("a", None) is None
    for wrong in ("", " ", "x" * 256, "ä", "a\tb", " a"):
        with pytest.raises(InvalidRequest):
            key("a", wrong)


class Request:
    def __init__(self, on_worker: bool) -> None:
        self.on_worker = on_worker


def test_while_a_request_is_open_its_key_is_for_it_alone_until_a_worker_has_it() -> None:
    keys = OpenKeys(cast(AnswerFinder, None), float)
    mine, other = AnswerKey(b"t", b"d"), AnswerKey(b"t", b"e")
    first = Request(on_worker=False)
    with keys.hold(mine, first):
        with pytest.raises(IdempotencyKeyReused), keys.hold(other, Request(False)):
            pass
        with pytest.raises(IdempotencyKeyInUse), keys.hold(mine, Request(False)):
            pass
        first.on_worker = True
        with keys.hold(mine, Request(False)):
            pass
    with keys.hold(other, Request(False)):
        pass
