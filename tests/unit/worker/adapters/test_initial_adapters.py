"""How long a new worker waits for its gateways and its loads."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, cast

from shared.adapters.identity import AdapterRef
from worker.adapters.initial_adapters import ANSWER_S, InitialAdapters
from worker.session import GatewaySession

LONG_S = 60.0


@dataclass(eq=False)
class Gateway:
    silent: bool


G0, G1 = (cast(GatewaySession, Gateway(silent=True)) for _ in range(2))


def refs(*names: str) -> list[AdapterRef]:
    return [AdapterRef("m", name, "d") for name in names]


async def test_it_takes_what_all_gateways_want_once_and_no_more_than_there_are_slots() -> None:
    initial = InitialAdapters(3)
    assert initial.receive(G0, refs("a", "b", "a")) == refs("a", "b")
    assert initial.receive(G1, refs("b", "c", "d")) == refs("c")


async def test_it_lasts_until_every_gateway_was_heard_and_every_load_has_ended() -> None:
    initial = InitialAdapters(2)
    waiting = asyncio.create_task(initial.wait(lambda: [G0, G1], LONG_S))
    steps: list[Any] = [
        lambda: initial.receive(G0, refs("a")),
        lambda: initial.begun(-1),
        lambda: initial.receive(G1, []),
    ]
    for step in steps:
        step()
        for _ in range(5):
            await asyncio.sleep(0)
        assert not waiting.done()
    initial.settled(-1)
    async with asyncio.timeout(LONG_S):
        assert await waiting < LONG_S


async def test_neither_a_silent_gateway_nor_a_load_without_end_is_waited_for_beyond_its_time() -> (
    None
):
    initial = InitialAdapters(2)
    assert await initial.wait(lambda: [G0], LONG_S) >= ANSWER_S
    initial.receive(G0, refs("a"))
    initial.begun(-1)
    assert await initial.wait(lambda: [G0], 0.05) >= 0.05


async def test_a_gateway_that_is_heard_is_waited_for_longer_until_it_falls_silent() -> None:
    initial, busy, dying = InitialAdapters(2), Gateway(silent=False), Gateway(silent=False)
    sessions = cast(list[GatewaySession], [busy, dying])
    waiting = asyncio.create_task(initial.wait(lambda: sessions, LONG_S))
    done, _ = await asyncio.wait([waiting], timeout=1.5 * ANSWER_S)
    assert not done
    initial.receive(sessions[0], refs("a"))
    done, _ = await asyncio.wait([waiting], timeout=0.5 * ANSWER_S)
    assert not done
    dying.silent = True
    async with asyncio.timeout(LONG_S):
        assert await waiting < LONG_S
