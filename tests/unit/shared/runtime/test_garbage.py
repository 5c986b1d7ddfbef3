"""When old objects are looked at."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import weakref
from collections.abc import AsyncIterator

import pytest

from shared.runtime import garbage


class Node:
    """One that only a cycle holds."""

    def __init__(self) -> None:
        self.me = self


def lost_node() -> weakref.ref[Node]:
    return weakref.ref(Node())


async def until_gone(node: weakref.ref[Node]) -> None:
    async with asyncio.timeout(20):
        while node() is not None:
            await asyncio.sleep(0.001)


@pytest.fixture
async def collecting() -> AsyncIterator[None]:
    gc.disable()
    task = asyncio.create_task(garbage.collect_for_ever(0.001))
    yield
    gc.enable()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


@pytest.mark.usefixtures("collecting")
async def test_cycles_are_found_now_and_then() -> None:
    await until_gone(lost_node())


@pytest.mark.usefixtures("collecting")
async def test_they_are_not_looked_for_while_a_large_value_is_made() -> None:
    with garbage.large_value(), garbage.large_value():
        node = lost_node()
        for _ in range(20):
            await asyncio.sleep(0.001)
        assert node() is not None
    await until_gone(node)


@pytest.mark.usefixtures("collecting")
async def test_a_large_value_of_a_request_lasts_until_all_of_the_request_has_ended() -> None:
    nodes: list[weakref.ref[Node]] = []
    ended = asyncio.Event()

    async def outlives_it() -> None:
        await ended.wait()
        garbage.keep_large_value()

    async def made() -> None:
        garbage.keep_large_value()
        with garbage.large_value():
            nodes.append(lost_node())

    with garbage.request():
        outliving = asyncio.create_task(outlives_it())
        await asyncio.gather(made(), made())
        for _ in range(20):
            await asyncio.sleep(0.001)
        assert all(node() is not None for node in nodes)
    for node in nodes:
        await until_gone(node)
    ended.set()
    await outliving
    garbage.keep_large_value()  # of no request
    await until_gone(lost_node())


@pytest.mark.usefixtures("collecting")
async def test_large_values_without_end_put_it_off_for_a_while_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(garbage, "LATEST_S", 0.01)
    with garbage.large_value():
        await until_gone(lost_node())
