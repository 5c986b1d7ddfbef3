"""Shell. How long each attack of the corpus holds the event loops of a gateway and a worker."""

from __future__ import annotations

import asyncio
import contextlib
import json
import mmap
import signal
import time
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

from tests.harness import Cluster
from tests.hostile.attacks import corpus

ANSWER_S = 30.0
HOLD_MS = 50.0
"""On a core that needs JSON_MS and COPY_MS for the yardsticks; in proportion on a slower one."""
JSON_MS, COPY_MS = 10.0, 15.0
YARDSTICK, TIMES = [{"role": "user", "content": "words", "n": n} for n in range(1000)], 12
COPIED = bytes(20_000_000)
"""As long as the largest body. On some machines new memory costs more than what is done with it."""
AGAIN = 2
"""How often a turn that was too long is tried again. A garbage collection, or a cache that a
neighbour has emptied, is not caused by the attack.
"""


def hold_ms() -> float:
    """How long a turn may be on this machine, as it is now. A neighbour on the other half of a core
    makes all CPU time longer, also that of the yardstick.
    """
    slower = [min(_ms(yardstick) for _ in range(3)) / ms for yardstick, ms in YARDSTICKS]
    return HOLD_MS * max(1.0, *slower)


def _ms(work: Callable[[], object]) -> float:
    before = time.thread_time()
    work()
    return (time.thread_time() - before) * 1e3


def _read_json() -> None:
    for _ in range(TIMES):
        json.loads(json.dumps(YARDSTICK))


def _copy() -> None:
    with mmap.mmap(-1, len(COPIED)) as new:
        new.write(COPIED)


YARDSTICKS = ((_read_json, JSON_MS), (_copy, COPY_MS))


async def longest_turns_ms(c: Cluster, data: bytes) -> dict[str, float]:
    """The longest turn of each process, from the attack's first byte until a part of the answer is
    here.
    """
    assert c.gateway is not None
    processes = [c.gateway, *c.workers.values()]
    for process in processes:
        process.signal(signal.SIGWINCH)
    async with asyncio.timeout(ANSWER_S):
        while any(c.longest_turn_ms(p.name) > HOLD_MS / 2 for p in processes):
            await asyncio.sleep(0.01)
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(ANSWER_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(c.url).port)
            try:
                writer.write(data)
                await writer.drain()
                await reader.read(200)
            finally:
                writer.transport.abort()
    async with asyncio.timeout(ANSWER_S):  # nothing of it is left
        while await c.metric("loraplex_worker_load"):
            await asyncio.sleep(0.02)
    return {p.name: c.longest_turn_ms(p.name) for p in processes}


async def held(c: Cluster, data: bytes) -> dict[str, float]:
    """The turns that were too long, by process, at the last of several tries."""
    turns: dict[str, float] = {}
    for _ in range(1 + AGAIN):
        most = hold_ms()
        turns = {p: ms for p, ms in (await longest_turns_ms(c, data)).items() if ms > most}
        if not turns:
            break
    return turns


async def too_long(c: Cluster) -> dict[str, dict[str, float]]:
    """The turns that were too long, by attack. Attacks that wait for no answer are left out,
    because they never reach a worker.
    """
    found = {name: await held(c, data) for name, data in answered()}
    return {name: turns for name, turns in found.items() if turns}


def answered() -> Iterator[tuple[str, bytes]]:
    for name, data in corpus():
        if not name.startswith(("unfinished", "endless")):
            yield name, data
