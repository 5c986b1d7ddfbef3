"""Shell. `python -m bench.micro.catalog [--adapters 1000,100000]`: what a large folder of adapters
costs a gateway.

It measures, per number of adapters: CPU seconds of the first listing, and of one in which nothing
has changed; the longest time that the event loop stood still during the latter; memory per known
adapter; time and size of the answer to `GET /v1/models`.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import uvloop

from bench.gateways.growth import write_adapters
from gateway.adapters.catalog import Catalog
from gateway.api.models import ModelList
from shared.stores import open_store

LEVELS = "1000,100000"
AGAIN = 3
LOOK_S = 0.001
SETTLE_S = 2.5  # a folder just written is looked at in full


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.micro.catalog")
    parser.add_argument("--adapters", default=LEVELS, help="default %(default)s")
    flags = parser.parse_args(arguments)
    print(
        "| adapters | first listing, CPU s | again, CPU s | again, worst stall ms | "
        "bytes per adapter | models: made in ms | MB |\n" + "|---" * 7 + "|"
    )
    for level in flags.adapters.split(","):
        print(uvloop.run(_level(int(level))), flush=True)
    return 0


async def _level(adapters: int) -> str:
    with tempfile.TemporaryDirectory(prefix="bench-adapters-") as folder:
        await asyncio.to_thread(write_adapters, Path(folder), adapters)
        await asyncio.sleep(SETTLE_S)
        catalog = Catalog("base", open_store(folder), 30.0)
        models = ModelList({"base": catalog}, lambda _: (), 0)
        gc.collect()
        before = _rss_bytes()
        began = time.process_time()
        await catalog.refresh()
        first = time.process_time() - began
        gc.collect()
        each = (_rss_bytes() - before) / adapters
        again: list[float] = []
        stalls: list[float] = []
        for _ in range(AGAIN):
            async with _watched(stalls):
                began = time.process_time()
                await catalog.refresh()
                again.append(time.process_time() - began)
        began = time.perf_counter()
        body = await models.body()
        made_ms = (time.perf_counter() - began) * 1e3
        assert len(catalog.known) == adapters
        return (
            f"| {adapters:,} | {first:.2f} | {min(again):.3f} | {max(stalls) * 1e3:.1f} | "
            f"{each:,.0f} | {made_ms:.1f} | {len(body) / 1e6:.1f} |"
        )


@asynccontextmanager
async def _watched(stalls: list[float]) -> AsyncIterator[None]:
    """Adds how much later than asked the loop ran each time."""

    async def watch() -> None:
        while True:
            asked = time.perf_counter() + LOOK_S
            await asyncio.sleep(LOOK_S)
            stalls.append(time.perf_counter() - asked)

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()


def _rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    sys.exit(main())
