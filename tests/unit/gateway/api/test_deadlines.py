"""Deadlines are kept with one timer, however many there are."""

from __future__ import annotations

import asyncio
import itertools

from gateway.api.deadlines import STEP_S, Deadlines


class Waiting:
    def __init__(self) -> None:
        self.late = asyncio.Event()

    def too_late(self) -> None:
        self.late.set()


class Broken(Waiting):
    def too_late(self) -> None:
        super().too_late()
        raise RuntimeError("this one fails")


async def test_each_is_told_after_its_own_deadline_and_none_before() -> None:
    loop = asyncio.get_running_loop()
    deadlines, begun = Deadlines(loop), loop.time()
    order: list[int] = []

    async def wait(n: int, after_s: float) -> None:
        waiting = Waiting()
        deadlines.enter(waiting, begun + after_s)
        await waiting.late.wait()
        assert loop.time() >= begun + after_s
        order.append(n)

    async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
        # a later one first, so the timer has to be moved to the earlier one
        for n, after_s in ((3, 0.3), (1, 0.05), (2, 0.15)):
            tasks.create_task(wait(n, after_s))
    assert order == [1, 2, 3] and len(deadlines) == 0


async def test_who_has_left_hears_nothing() -> None:
    loop = asyncio.get_running_loop()
    deadlines, gone, other = Deadlines(loop), Waiting(), Waiting()
    deadlines.enter(gone, loop.time() + 0.01)
    deadlines.enter(other, loop.time() + 0.05)
    deadlines.leave(gone)
    deadlines.leave(gone)
    async with asyncio.timeout(10):
        await other.late.wait()
    assert not gone.late.is_set()


async def test_one_that_fails_does_not_keep_the_others() -> None:
    loop = asyncio.get_running_loop()
    failures: list[object] = []
    loop.set_exception_handler(lambda _, context: failures.append(context["exception"]))
    deadlines, broken, other = Deadlines(loop), Broken(), Waiting()
    at = loop.time() + 0.01
    for who in (broken, other):
        deadlines.enter(who, at)
    async with asyncio.timeout(10):
        await other.late.wait()
    loop.set_exception_handler(None)
    assert broken.late.is_set() and len(failures) == 1


async def test_short_deadlines_do_not_make_it_look_more_often() -> None:
    loop = asyncio.get_running_loop()
    looks: list[float] = []

    class Watched(Deadlines):
        def _look(self) -> None:
            looks.append(loop.time())
            super()._look()

    deadlines = Watched(loop)
    async with asyncio.timeout(10):
        for _ in range(100):
            waiting = Waiting()
            deadlines.enter(waiting, loop.time() + 0.0001)
            await asyncio.sleep(0.001)
        await waiting.late.wait()
    assert all(b - a >= STEP_S * 0.9 for a, b in itertools.pairwise(looks))
