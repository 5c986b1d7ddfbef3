"""Whose connections are counted together."""

from __future__ import annotations

import asyncio

import pytest

from gateway.http.connection import client_of


@pytest.mark.parametrize(
    ("peer", "client"),
    [
        (("192.0.2.7", 5), "192.0.2.7"),
        (("::ffff:192.0.2.7", 5, 0, 0), "192.0.2.7"),
        (("2001:db8:1:2::3", 5, 0, 0), "20010db800010002"),
        (("2001:db8:1:2:ffff::9", 5, 0, 0), "20010db800010002"),
        (("2001:db8:1:3::3", 5, 0, 0), "20010db800010003"),
        (("fe80::1%eth0", 5, 0, 2), "fe80000000000000"),
        ("", ""),
        (None, ""),
    ],
)
def test_a_client_is_an_ipv4_address_or_a_network_of_ipv6(peer: object, client: str) -> None:
    assert client_of(asyncio.Transport({"peername": peer})) == client
