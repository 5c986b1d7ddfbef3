"""Work in threads is done for each tenant in turn."""

from __future__ import annotations

import asyncio
import threading

from gateway.http.turns import Turns


async def test_a_tenant_s_second_work_waits_for_its_first_and_another_tenant_s_does_not() -> None:
    turns, free, begun = Turns(), threading.Event(), list[str]()

    def work(name: str, until: threading.Event | None) -> str:
        begun.append(name)
        if until is not None:
            until.wait(10)
        return name

    async with asyncio.timeout(10):
        first = asyncio.create_task(turns.run("a", work, "a1", free))
        while not begun:
            await asyncio.sleep(0)
        second = asyncio.create_task(turns.run("a", work, "a2", None))
        assert await turns.run("b", work, "b1", None) == "b1"
        assert begun == ["a1", "b1"]
        free.set()
        assert (await first, await second) == ("a1", "a2")


async def test_a_turn_lasts_until_its_work_has_ended_although_its_caller_has_left() -> None:
    turns, free, begun = Turns(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        free.wait(10)
        raise ValueError

    async with asyncio.timeout(10):
        left = asyncio.create_task(turns.run("a", work))
        while not begun.is_set():
            await asyncio.sleep(0)
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)
        after = asyncio.create_task(turns.run("a", free.is_set))
        await turns.run("b", int)
        assert not after.done()
        free.set()
        assert await after
