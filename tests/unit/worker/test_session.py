"""A worker's outbox: what leaves together, and what leaves no more. What a session says of a link
that fell silent.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest
import zmq

from shared.link import messages
from shared.link.sockets import RouterSocket
from worker.session import GatewaySession, Outbox


class Taker:
    """The channel of an outbox. It takes what it is sent, or nothing."""

    def __init__(self) -> None:
        self.takes = True
        self.steps: list[messages.Step] = []

    def send(self, data: bytes) -> bool:
        if self.takes:
            step = messages.decode_worker_data(data)
            assert isinstance(step, messages.Step)
            self.steps.append(step)
        return self.takes


async def turns(n: int = 3) -> None:
    for _ in range(n):
        await asyncio.sleep(0)


async def test_what_the_streams_of_one_turn_yield_leaves_as_one_message() -> None:
    taker = Taker()
    outbox = Outbox(taker.send, lambda: None)
    for sid in range(3):
        outbox.frame(sid, messages.END, b"x")
        outbox.done(messages.Done(sid))
    outbox.refuse(messages.Refused(9, "worker_unavailable", "why", True))
    await turns()
    (step,) = taker.steps
    assert [frame[0] for frame in step.frames] == [d.sid for d in step.done] == [0, 1, 2]
    assert [r.sid for r in step.refused] == [9]
    outbox.frame(1, 0, b"y")
    await turns()
    assert len(taker.steps) == 2


async def test_a_channel_that_takes_no_more_is_over_and_its_owner_is_told_once() -> None:
    taker = Taker()
    told: list[bool] = []

    def overflow() -> None:
        told.append(True)
        outbox.close()

    outbox = Outbox(taker.send, overflow)
    taker.takes = False
    outbox.frame(1, 0, b"x")
    await turns()
    taker.takes = True
    outbox.frame(1, messages.END, b"y")  # without what came before, it must not arrive
    await turns()
    assert told == [True] and not taker.steps


class PlayedGateway:
    """Welcomes each worker, and answers its pings until it `ends`."""

    def __init__(self, context: zmq.Context[Any], folder: Path) -> None:
        self.data = RouterSocket(context, f"ipc://{folder}/data", self._data_in)
        self.control = RouterSocket(context, f"ipc://{folder}/control", self._control_in)
        self.endpoint = f"ipc://{folder}/control"
        self._peer = b""
        self._answers = True

    def greet(self, peer: bytes) -> None:
        self._peer = peer
        welcome = messages.Welcome("g0", self.data.endpoint, 30.0, 0.1, channel=7)
        self.control.send(peer, messages.encode(welcome))

    def end(self, *, farewell: bool) -> None:
        self._answers = False
        if farewell:
            self.control.send(self._peer, messages.encode(messages.Farewell("g0")))

    def close(self) -> None:
        for link in (self.control, self.data):
            link.close(0)

    def _control_in(self, peer: bytes, data: bytes) -> None:
        pass

    def _data_in(self, peer: bytes, data: bytes) -> None:
        packet = messages.decode_packet(data)
        if self._answers and type(packet) is messages.ChannelStatus:
            echo = messages.ChannelStatus(7, 0, packet.sent, ping=1, echo=packet.ping)
            self.data.send(peer, messages.encode(echo))


@pytest.mark.parametrize("farewell", [True, False], ids=["said farewell", "fell silent"])
async def test_a_link_is_complained_of_unless_its_gateway_has_said_farewell(
    farewell: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    context: zmq.Context[Any] = zmq.Context()
    gateway = PlayedGateway(context, tmp_path)
    session = GatewaySession(context, gateway.endpoint, "w0", 1, None)
    try:
        async with asyncio.timeout(30):
            session.open(lambda _, __: None, lambda _, __: None)
            while session._end is None:
                gateway.greet(messages.identity("w0", 1))
                await asyncio.sleep(0.01)
            while not session._end.path.heard:
                session._end.ping(asyncio.get_running_loop().time())
                await asyncio.sleep(0.01)
            gateway.end(farewell=farewell)
            while session._end.carries:
                await asyncio.sleep(0.01)
    finally:
        session.close()
        gateway.close()
        context.term()
    assert ("does not carry" in caplog.text) is not farewell
