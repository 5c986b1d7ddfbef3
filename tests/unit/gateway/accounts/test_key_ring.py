"""Which account a key belongs to, also after the file has changed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.accounts.account import ANONYMOUS, Account
from gateway.accounts.key_ring import KeyRing, digest_of, plain_accounts
from shared.errors import Forbidden, InvalidApiKey

KEY = "lp-0123456789"
TENANT = Account(name="team-a")
RING = KeyRing({digest_of(KEY): TENANT}, [digest_of("operator")])


@given(
    word=st.sampled_from(["bearer", "Bearer", "BEARER", "bEaReR"]),
    before=st.text(" \t", max_size=3),
    between=st.integers(1, 5),
    after=st.text(" \t", max_size=3),
)
def test_a_tenant_is_its_key_however_the_header_is_spelled(
    word: str, before: str, between: int, after: str
) -> None:
    assert RING.account_of(f"{before}{word}{' ' * between}{KEY}{after}", 0.0) is TENANT


@given(st.binary(max_size=200))
def test_any_bytes_of_a_header_that_are_not_the_key_are_a_wrong_key(value: bytes) -> None:
    with pytest.raises(InvalidApiKey):
        RING.account_of(value.decode("utf-8", "surrogateescape"), 0.0)
    with pytest.raises(InvalidApiKey):
        RING.account_of("Bearer " + value.decode("utf-8", "surrogateescape"), 0.0)


def test_a_key_beyond_ascii_is_found_by_its_bytes() -> None:
    ring = KeyRing({digest_of("schlüssel"): TENANT})
    sent = "Bearer schlüssel".encode().decode("ascii", "surrogateescape")
    assert ring.account_of(sent, 0.0) is TENANT


def test_a_key_is_valid_until_it_expires() -> None:
    ring = KeyRing({digest_of(KEY): Account(name="a", expires=100.0)})
    assert ring.account_of(f"Bearer {KEY}", 99.9).name == "a"
    with pytest.raises(InvalidApiKey, match="expired"):
        ring.account_of(f"Bearer {KEY}", 100.0)


def test_without_keys_everybody_is_one_tenant_and_with_all_keys_revoked_nobody_is() -> None:
    assert KeyRing().account_of("Bearer anything", 0.0) is ANONYMOUS
    with pytest.raises(InvalidApiKey):
        KeyRing(asks=True).account_of(f"Bearer {KEY}", 0.0)


def test_each_key_of_a_plain_list_is_a_tenant_of_its_own() -> None:
    one, two = plain_accounts([digest_of("one"), digest_of("two")]).values()
    assert one.name != two.name and not one.scoped


def test_operators_need_an_admin_key_and_an_ordinary_one_does_not_suffice() -> None:
    RING.check_admin("Bearer operator", 0.0)
    with pytest.raises(Forbidden):
        RING.check_admin(f"Bearer {KEY}", 0.0)
    with pytest.raises(InvalidApiKey):
        RING.check_admin("Bearer wrong", 0.0)
    with pytest.raises(Forbidden):
        KeyRing({digest_of(KEY): TENANT}, local=False).check_admin(f"Bearer {KEY}", 0.0)
    KeyRing({digest_of(KEY): TENANT}).check_admin(f"Bearer {KEY}", 0.0)


def test_no_key_of_a_tenant_is_an_operators_even_where_only_this_machine_can_reach_it() -> None:
    """A proxy on the same machine brings everybody's requests to a loopback address."""
    ring = KeyRing({digest_of(KEY): TENANT}, local=True, apart=True)
    for sent in (f"Bearer {KEY}", "Bearer wrong", ""):
        with pytest.raises(Forbidden, match="admin_keys"):
            ring.check_admin(sent, 0.0)


def test_names_of_tenants_are_shown_to_whom_they_concern() -> None:
    sent, operator = f"Bearer {KEY}", digest_of("operator")
    expired = {digest_of(KEY): Account(name="a", expires=1.0)}
    for ring, seen in (
        (KeyRing(), {"": True, sent: True}),
        (KeyRing({digest_of(KEY): TENANT}), {"": False, "Bearer wrong": False, sent: True}),
        (KeyRing(expired), {sent: False}),
        (
            KeyRing({digest_of(KEY): TENANT}, [operator], apart=True),
            {"": False, sent: False, "Bearer operator": True},
        ),
    ):
        for authorization, expected in seen.items():
            assert ring.sees_tenants(authorization, 2.0) is expected, authorization


def test_no_error_repeats_the_key_that_was_sent() -> None:
    for value in (f"Bearer {KEY}x", KEY, f"Basic {KEY}"):
        with pytest.raises(InvalidApiKey) as caught:
            RING.account_of(value, 0.0)
        assert KEY not in caught.value.message
