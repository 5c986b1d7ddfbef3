"""Work in threads is done for each tenant in turn."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import weakref

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


class Body:
    """One that a weak reference may know."""


async def test_what_a_work_that_failed_was_given_is_not_kept_until_garbage_is_looked_for() -> None:
    def refuse(body: Body) -> None:
        raise ValueError(body)

    async def asked() -> weakref.ref[Body]:
        body = Body()
        with contextlib.suppress(ValueError):
            await Turns().run("a", refuse, body)
        return weakref.ref(body)

    gc.disable()
    try:
        kept = await asked()
        async with asyncio.timeout(10):
            while kept() is not None:  # the thread lets go of it last
                await asyncio.sleep(0.001)
    finally:
        gc.enable()
