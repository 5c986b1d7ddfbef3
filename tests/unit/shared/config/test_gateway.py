"""The gateway section: safe defaults, no secrets in the file, no open socket by accident."""

from __future__ import annotations

from typing import Any

import pytest

from shared.config.gateway import is_loopback
from shared.config.llm import GatewayConfig, LinkConfig
from shared.errors import ConfigError


def refusal(**fields: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        GatewayConfig(**fields)
    return caught.value.message


def test_defaults_listen_on_this_machine_only() -> None:
    config = GatewayConfig()
    assert (config.host, config.port, config.link) == (
        "127.0.0.1",
        8000,
        LinkConfig(control="ipc", data="ipc"),
    )
    assert (config.max_body_bytes, config.max_concurrent_requests, config.max_queued_requests) == (
        32 << 20,
        4096,
        1024,
    )
    assert (config.drain_s, config.kill_s, config.lease_s, config.heartbeat_s) == (
        20.0,
        5.0,
        0.9,
        0.1,
    )
    assert (config.routing_policy, config.slow_reader_bytes) == ("expected-ttft", 1 << 20)


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        (
            {"routing_policy": "round-robin"},
            "expected 'expected-ttft' or 'ray' or 'residency-p2c', got the text 'round-robin'",
        ),
        ({"port": 65536}, "(at least 0, at most 65535), got 65536"),
        ({"port": "8000"}, "write it without quotes or exponent: 8000"),
        ({"processes": 0}, "(at least 1)"),
        ({"queue_timeout_s": 0}, "(more than 0)"),
        ({"heartbeat_s": 2}, "lease_s: must be at least 3 heartbeats (6)"),
        ({"log_level": "loud"}, "'debug' or"),
        ({"api_keys_env": "sk-1234"}, "the name of an environment variable"),
        ({"link": {"secret_env": "p@ss word"}}, "link.secret_env: expected the name"),
        ({"link": {"control": "tcp://127.0.0.1:7000"}}, "must both be ipc, or both tcp"),
        (
            {"link": {"control": "tcp://127.0.0.1:7000", "data": "tcp://127.0.0.1:7000"}},
            "need two ports",
        ),
        (
            {"link": {"control": "udp://x:1", "data": "tcp://127.0.0.1:7000"}},
            "expected ipc or tcp://host:port",
        ),
        (
            {"link": {"control": "tcp://127.0.0.1:70000", "data": "tcp://127.0.0.1:7000"}},
            "expected ipc or tcp://host:port",
        ),
        (
            {"link": {"control": "tcp://10.0.0.1:7000", "data": "tcp://127.0.0.1:7001"}},
            "'10.0.0.1' is reachable from other machines",
        ),
        (
            {"link": {"control": "tcp://*:7000", "data": "tcp://127.0.0.1:7001"}},
            "'*' is reachable from other machines",
        ),
        ({"link": {"peer": "tcp://0.0.0.0:9760"}}, "'0.0.0.0' is reachable from other machines"),
        ({"link": {"peer": "ipc"}}, "expected off, auto or tcp://host:port"),
    ],
)
def test_what_cannot_work_is_refused(fields: dict[str, Any], part: str) -> None:
    assert part in refusal(**fields)


@pytest.mark.parametrize(
    "fields",
    [{"api_keys_env": "sk-1234"}, {"link": {"secret_env": "sk-1234"}}, {"api_keys_env": 1234}],
)
def test_a_pasted_secret_is_not_repeated(fields: dict[str, Any]) -> None:
    assert "1234" not in refusal(**fields)


@pytest.mark.parametrize("how", [{"secret_env": "LINK_SECRET"}, {"insecure": True}])
def test_a_link_beyond_this_machine_needs_a_secret_or_an_explicit_word(how: dict[str, Any]) -> None:
    link = LinkConfig(control="tcp://10.0.0.1:7000", data="tcp://10.0.0.1:7001", **how)
    assert link.data == "tcp://10.0.0.1:7001"


@pytest.mark.parametrize("host", ["localhost:8000", "http://x", "127.0.0.1:80", "a b", "[::1]:80"])
def test_a_host_with_anything_beside_it_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match="host: expected an address or a name"):
        GatewayConfig(host=host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "[::1]", "fe80::1%eth0", "my-host.example.org"])
def test_an_address_or_a_name_is_a_host(host: str) -> None:
    assert GatewayConfig(host=host).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost"])
def test_these_hosts_are_this_machine(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "*", "10.0.0.1", "localhost.example.org", ""])
def test_these_hosts_are_not(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize(
    ("fields", "bound"),
    [
        ({}, ""),
        (
            {
                "control": "tcp://127.0.0.1:7000",
                "data": "tcp://127.0.0.1:7001",
                "secret_env": "S",
            },
            "",
        ),
        ({"control": "tcp://10.0.0.1:7000", "data": "tcp://10.0.0.1:7001", "insecure": True}, ""),
        (
            {"control": "tcp://10.0.0.1:7000", "data": "tcp://10.0.0.1:7001", "secret_env": "S"},
            "tcp://0.0.0.0:0",
        ),
        (
            {
                "control": "tcp://10.0.0.1:7000",
                "data": "tcp://10.0.0.1:7001",
                "secret_env": "S",
                "peer": "off",
            },
            "",
        ),
        (
            {
                "control": "tcp://10.0.0.1:7000",
                "data": "tcp://10.0.0.1:7001",
                "secret_env": "S",
                "peer": False,
            },
            "",
        ),
        ({"peer": "tcp://127.0.0.1:9760", "secret_env": "S"}, "tcp://127.0.0.1:9760"),
    ],
)
def test_workers_open_a_socket_for_peers_where_the_link_leaves_the_machine_and_has_a_secret(
    fields: dict[str, Any], bound: str
) -> None:
    assert LinkConfig(**fields).peer_endpoint == bound
