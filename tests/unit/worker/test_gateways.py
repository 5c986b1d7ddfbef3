"""Which sessions a worker has, as names are looked up again."""

from __future__ import annotations

import asyncio
from typing import Any

from shared.config.gateway import is_endpoint
from worker import gateways
from worker.gateways import Gateways


class Line:
    """A session that records; its gateway is heard or silent as the test says."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.silent = False
        self.state = "made"

    def open(self, on_request: Any, on_silence: Any) -> None:
        self.state = "open"

    def close(self) -> None:
        self.state = "closed"


class Names:
    """A name server whose answers the test changes. `asked` is set by each question."""

    def __init__(self, *addresses: str) -> None:
        self.addresses: list[str] | None = list(addresses)
        self.questions = 0

    def __call__(self, host: str) -> list[str]:
        assert host == "gateways"
        self.questions += 1
        if self.addresses is None:
            raise OSError("no such name")
        return self.addresses


def gateways_of(*endpoints: str, names: Names) -> tuple[Gateways, dict[str, Line]]:
    lines: dict[str, Line] = {}

    def made(endpoint: str) -> Any:
        lines[endpoint] = Line(endpoint)
        return lines[endpoint]

    found = Gateways(endpoints, made, names)
    found.open(lambda session, message: None, lambda session, reason: None)
    return found, lines


async def test_a_gateway_that_comes_later_is_found_and_one_that_is_named_is_open_at_once() -> None:
    names = Names()
    found, lines = gateways_of("tcp://10.0.0.9:9750", "dns://gateways:9750", names=names)
    assert {line.endpoint: line.state for line in lines.values()} == {"tcp://10.0.0.9:9750": "open"}
    names.addresses = ["10.0.0.1"]
    await found.look_up()
    names.addresses = ["10.0.0.1", "10.0.0.2"]
    await found.look_up()
    await found.look_up()
    assert sorted(lines) == ["tcp://10.0.0.1:9750", "tcp://10.0.0.2:9750", "tcp://10.0.0.9:9750"]
    assert {line.state for line in lines.values()} == {"open"}
    assert sorted(session.endpoint for session in found) == sorted(lines)


async def test_a_gateway_whose_address_is_gone_stays_until_it_is_silent() -> None:
    names = Names("10.0.0.1", "10.0.0.2")
    found, lines = gateways_of("dns://gateways:9750", names=names)
    await found.look_up()
    names.addresses = ["10.0.0.2"]
    await found.look_up()
    assert lines["tcp://10.0.0.1:9750"].state == "open"  # it drains, and its streams are here
    lines["tcp://10.0.0.1:9750"].silent = True
    await found.look_up()
    assert lines["tcp://10.0.0.1:9750"].state == "closed"
    assert [session.endpoint for session in found] == ["tcp://10.0.0.2:9750"]


async def test_a_name_server_that_fails_changes_nothing() -> None:
    names = Names("10.0.0.1")
    found, lines = gateways_of("dns://gateways:9750", names=names)
    await found.look_up()
    lines["tcp://10.0.0.1:9750"].silent = True
    names.addresses = None
    await found.look_up()
    assert lines["tcp://10.0.0.1:9750"].state == "open"


async def test_names_are_looked_up_again_and_again_and_addresses_never(
    monkeypatch: Any,
) -> None:
    monkeypatch.setattr(gateways, "LOOK_UP_S", 0.001)
    names = Names("10.0.0.1")
    found, _ = gateways_of("dns://gateways:9750", names=names)
    following = asyncio.create_task(found.follow())
    async with asyncio.timeout(10):
        while names.questions < 3:
            await asyncio.sleep(0.001)
    following.cancel()
    fixed, _ = gateways_of("tcp://10.0.0.9:9750", names=names)
    async with asyncio.timeout(10):
        await fixed.follow()


def test_a_name_with_a_port_is_an_endpoint() -> None:
    assert is_endpoint("dns://loraplex-link:9750")
    assert not is_endpoint("dns://loraplex-link") and not is_endpoint("dns://:9750")
