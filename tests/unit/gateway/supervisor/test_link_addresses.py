"""Where a gateway process meets its workers, and whether another one can have the same."""

from __future__ import annotations

import msgspec
import pytest

from gateway.supervisor.link_addresses import is_only_gateway
from shared.config.gateway import GatewayConfig, LinkConfig
from shared.config.llm import Settings

TCP = LinkConfig(control="tcp://127.0.0.1:5570", data="tcp://127.0.0.1:5571")


@pytest.mark.parametrize(
    ("gateway", "only"),
    [
        (GatewayConfig(), True),
        (GatewayConfig(processes=2), False),
        (GatewayConfig(link=TCP), False),  # as each pod of several has it
    ],
)
def test_a_gateway_is_the_only_one_of_workers_that_no_other_process_can_reach(
    gateway: GatewayConfig, only: bool
) -> None:
    settings = msgspec.structs.replace(Settings(models=()), gateway=gateway)
    assert is_only_gateway(settings) is only
