"""A worker's outbox: what leaves together, and what leaves no more."""

from __future__ import annotations

import asyncio

from shared.link import messages
from worker.session import Outbox


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
