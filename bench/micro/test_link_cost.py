"""Shell. What the numbers of the link cost a gateway, beside reading the step that they carry."""

from __future__ import annotations

import pytest

from bench.micro.conftest import PerUnit
from bench.micro.test_wire_cost import EVENT
from shared.link import messages
from shared.link.link_end import LinkEnd
from shared.link.sockets import SendResult

STEPS = 2_000
MAX_RATIO = {1: 1.1, 8: 1.02, 64: 1.01}
"""Bytes of a step with its number to those without, by streams; the budget is 1.3."""


@pytest.mark.parametrize("streams", MAX_RATIO)
def test_taking_steps_off_a_channel(per_unit: PerUnit, streams: int) -> None:
    frames: list[messages.Frame] = [(1000 + n, 0, EVENT, b"") for n in range(streams)]
    step = messages.encode(messages.Step(frames))
    packets = [
        messages.encode(messages.DataPacket(1 << 31, number + 1, 1 << 20, memoryview(step)))
        for number in range(STEPS)
    ]
    assert len(packets[-1]) / len(step) < MAX_RATIO[streams]

    def take() -> None:
        end = LinkEnd(1 << 31, send, send, lambda body: None, 0.0)
        for packet in packets:
            end.arrive(packet, 0.0)
        assert end.channel.delivered == STEPS

    per_unit(take, STEPS * streams, "token")


def send(data: bytes) -> SendResult:
    return SendResult.OK
