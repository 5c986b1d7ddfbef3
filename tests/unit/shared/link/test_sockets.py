"""Shell. ZeroMQ's sockets on the loop: no message stays unseen."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from shared.link.sockets import DealerSocket, RouterSocket, SendResult, Socket, open_context

ARRIVES_WITHIN_S = 0.3
"""Of a message between two sockets of one process. Later ones are announced anew, so a test that
waits too short passes for nothing, and never fails for nothing.
"""


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    found = open_context()
    yield found
    found.destroy(linger=0)


class Pair:
    """A router and a dealer that have exchanged a message each way. `arrived` are those since."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], folder: Path) -> None:
        self.arrived: asyncio.Queue[bytes] = asyncio.Queue()
        endpoint = f"ipc://{folder}/s"
        self.router = RouterSocket(context, endpoint, lambda _, data: self.arrived.put_nowait(data))
        self.dealer = DealerSocket(context, endpoint, b"worker", self.arrived.put_nowait)

    async def meet(self) -> None:
        for send in (self.dealer.send, lambda data: self.router.send(b"worker", data)):
            assert send(b"hello") is SendResult.OK
            async with asyncio.timeout(10):
                await self.arrived.get()

    def close(self) -> None:
        for socket in (self.router, self.dealer):
            socket.close(0)


async def test_a_send_to_nobody_hides_no_message_that_has_arrived(
    context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path
) -> None:
    pair = Pair(context, tmp_path)
    await pair.meet()
    assert pair.dealer.send(b"unseen") is SendResult.OK
    # all in one turn of the loop: the message is announced, and a send takes note of it
    until = time.monotonic() + ARRIVES_WITHIN_S
    while time.monotonic() < until:
        assert pair.router.send(b"nobody", b"x") is SendResult.GONE
    async with asyncio.timeout(10):
        assert await pair.arrived.get() == b"unseen"
    pair.close()


async def test_a_send_that_is_full_hides_no_message_that_has_arrived(
    context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path
) -> None:
    pair = Pair(context, tmp_path)
    await pair.meet()
    _stop_reading(pair.router)
    while pair.dealer.send(bytes(4096)) is SendResult.OK:
        pass
    assert pair.router.send(b"worker", b"unseen") is SendResult.OK
    until = time.monotonic() + ARRIVES_WITHIN_S
    while time.monotonic() < until:
        pair.dealer.send(bytes(4096))
    async with asyncio.timeout(10):
        while await pair.arrived.get() != b"unseen":
            pass
    pair.close()


def _stop_reading(socket: Socket) -> None:
    """As a process does that stands still."""
    asyncio.get_running_loop().remove_reader(socket._fd)
    socket._asking = socket._scheduled = True
