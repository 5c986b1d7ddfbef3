from __future__ import annotations

import asyncio

import pytest

from shared.link import messages
from shared.link.sockets import SendResult
from worker import session
from worker.session import Outbox


class Gateway:
    """The other end of a link: takes what it is sent, or nothing."""

    def __init__(self) -> None:
        self.takes = True
        self.frames: list[messages.Frame] = []
        self.refused: list[int] = []

    def send(self, data: bytes) -> SendResult:
        if not self.takes:
            return SendResult.FULL
        step = messages.decode_worker_data(data)
        assert isinstance(step, messages.Step)
        self.frames += step.frames
        self.refused += [r.sid for r in step.refused]
        return SendResult.OK


async def turns(n: int = 3) -> None:
    for _ in range(n):
        await asyncio.sleep(0)


@pytest.mark.parametrize("streams", [1, 10, 500])
async def test_streams_whose_frames_a_gateway_never_took_are_refused_once_it_takes_something_again(
    streams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "MAX_PENDING_BYTES", 1000)
    monkeypatch.setattr(session, "RETRY_S", 0.001)
    gateway = Gateway()
    overflows: list[bool] = []

    def overflow() -> None:
        overflows.append(True)
        outbox.give_up("does not take what it is sent")

    outbox = Outbox(overflow)
    outbox.connect(gateway.send)
    for sid in range(streams):
        outbox.frame(sid, 200 << messages.STATUS_SHIFT, b"head")
    await turns()
    assert len(gateway.frames) == streams
    gateway.takes = False
    for sid in range(streams):
        outbox.frame(sid, messages.END, b"x" * 1001)
        outbox.done(messages.Done(sid))
    async with asyncio.timeout(10):
        while not overflows:
            await asyncio.sleep(0.001)
        gateway.takes = True
        while len(gateway.refused) < streams:
            await asyncio.sleep(0.001)
    assert (
        sorted(gateway.refused) == list(range(streams))
        and len(gateway.frames) == streams
        and len(overflows) == 1
    )


async def test_what_a_gateway_did_not_take_at_once_arrives_in_order_when_it_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session, "RETRY_S", 0.001)
    gateway = Gateway()
    outbox = Outbox(lambda: pytest.fail("nothing overflows"))
    outbox.connect(gateway.send)
    gateway.takes = False
    for number in range(5):
        outbox.frame(1, 0, b"%d" % number)
        await turns()
    gateway.takes = True
    async with asyncio.timeout(10):
        while len(gateway.frames) < 5:
            await asyncio.sleep(0.001)
    assert [data for _, _, data, _ in gateway.frames] == [
        b"0",
        b"1",
        b"2",
        b"3",
        b"4",
    ] and not gateway.refused
