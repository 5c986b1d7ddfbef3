"""Shell. `python -m bench.gateways.page`: what the page at /ui costs its gateway, with 1,000
adapters on 64 mock workers.

    python -m bench.gateways.page [--workers 64] [--adapters 1000] [--for-s 20]

Each row is the CPU of the gateway process, as a share of one core, above what it takes for the
workers' heartbeats alone. A page is played by a client that asks for what the page's scripts ask
for, as often as they do.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import TypeAlias

import aiohttp
import uvloop

from bench.gateways.__main__ import one_peer
from bench.gateways.growth import adapter_name, write_adapters
from bench.gateways.peers.loraplex import Loraplex
from bench.gateways.peers.peer import Running
from bench.process import spent_s

View: TypeAlias = tuple[bool, tuple[tuple[str, float], ...]]
"""Whether its stream has the adapters, and the paths that it asks for, each so many seconds."""
VIEWS: dict[str, View] = {
    "fleet": (False, ()),
    "residency": (True, (("/admin/adapters?after=&workers=0", 10.0),)),
    "requests": (False, ()),
    "time": (False, (("/admin/series", 5.0),)),
    "keys": (False, (("/admin/keys", 2.0), ("/admin/usage?by=key,base,adapter", 60.0))),
}
MANY = 10
SETTLE_S = 2.0
REQUESTS_PER_S = 20
AT_ONCE = 32


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gateways.page")
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--for-s", type=float, default=20.0, help="of each measurement")
    uvloop.run(_measure(parser.parse_args()))
    return 0


async def _measure(flags: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="bench-page-") as folder:
        await asyncio.to_thread(write_adapters, Path(folder), flags.adapters)
        peer = Loraplex(workers=flags.workers, adapters=Path(folder))
        async with one_peer(peer) as (running, _), aiohttp.ClientSession() as client:
            await _use(running, client, flags.adapters)
            async with _traffic(running, client, flags.adapters):
                closed = await _share(running, flags.for_s)
                print(f"{'closed':<24} {closed:8.2%}", flush=True)
                rows: list[tuple[str, list[View]]] = [(n, [v]) for n, v in VIEWS.items()]
                rows += [(f"{MANY} x {n}", [VIEWS[n]] * MANY) for n in ("fleet", "residency")]
                for name, views in rows:
                    async with _pages(running, client, views):
                        share = await _share(running, flags.for_s) - closed
                    print(f"{name:<24} {share:8.2%} more", flush=True)
                print(f"{'closed again':<24} {await _share(running, flags.for_s):8.2%}")


async def _use(running: Running, client: aiohttp.ClientSession, adapters: int) -> None:
    """One request for each adapter, so that they lie in slots, memory and on disks."""
    numbers = iter(range(adapters))

    async def some() -> None:
        for number in numbers:
            await _ask(running, client, number)

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(some(), name="use adapters")


async def _ask(running: Running, client: aiohttp.ClientSession, number: int) -> None:
    body = {
        "model": f"base:{adapter_name(number)}",
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 2,
    }
    async with client.post(f"{running.url}/v1/chat/completions", json=body) as answer:
        await answer.read()


@contextlib.asynccontextmanager
async def _traffic(
    running: Running, client: aiohttp.ClientSession, adapters: int
) -> AsyncIterator[None]:
    """A few requests a second, the same with and without a page."""

    async def run() -> None:
        number = 0
        while True:
            number = (number + 7) % adapters
            await _ask(running, client, number)
            await asyncio.sleep(1.0 / REQUESTS_PER_S)

    async with _running([run]):
        yield


@contextlib.asynccontextmanager
async def _pages(
    running: Running, client: aiohttp.ClientSession, views: list[View]
) -> AsyncIterator[None]:
    async def listen(with_adapters: bool) -> None:
        path = f"{running.url}/admin/live?adapters={int(with_adapters)}"
        async with client.get(path, timeout=aiohttp.ClientTimeout(total=None)) as answer:
            async for _ in answer.content.iter_any():
                pass

    async def poll(path: str, every_s: float) -> None:
        while True:
            async with client.get(running.url + path) as answer:
                assert answer.status == 200, await answer.text()
                await answer.read()
            await asyncio.sleep(every_s)

    tasks: list[Callable[[], Coroutine[object, object, None]]] = []
    for with_adapters, polls in views:
        tasks.append(functools.partial(listen, with_adapters))
        tasks += [functools.partial(poll, path, every_s) for path, every_s in polls]
    async with _running(tasks):
        await asyncio.sleep(SETTLE_S)  # the first event has everything
        yield


@contextlib.asynccontextmanager
async def _running(
    work: list[Callable[[], Coroutine[object, object, None]]],
) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(), name="page") for one in work]
        yield
        for task in tasks:
            task.cancel()


async def _share(running: Running, for_s: float) -> float:
    """The gateway's CPU for a while, as a share of one core."""
    (gateway,) = running.gateway
    before = gateway.usage()
    await asyncio.sleep(for_s)
    return spent_s(before, gateway.usage()) / for_s


if __name__ == "__main__":
    sys.exit(main())
