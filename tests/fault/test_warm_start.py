"""Shell. What a new worker has in its slots when it gets its first request."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

from tests.harness import Cluster, cluster, make_adapter, sim_config

LIMIT_S = 60.0
SLOW_LOADS = {"load_ms": 150}
NAMES = ("a", "b", "c", "d", "e", "f", "g", "h")


async def tier_of(c: Cluster, name: str) -> str:
    """Where the adapter was when a request for it came to its worker."""
    status, body, headers = await c.chat(f"sim:{name}", max_tokens=1)
    assert status == 200, body
    return headers["x-loraplex-adapter-tier"]


async def listed(c: Cluster) -> None:
    """The gateway knows the store's adapters. Before, it cannot name those that are preloaded."""
    async with asyncio.timeout(LIMIT_S):
        while (await c.get("/v1/models"))[1]["data"][-1]["id"] == "sim":
            await asyncio.sleep(0.02)


async def serving_from_the_begin(c: Cluster, name: str) -> float:
    """Adapters in the worker's slots in the first state that shows that it serves."""
    await c.start_worker(name)
    return await c.metric("loraplex_worker_adapters", worker=name, tier="gpu")


def config(adapters: Path, **lora: Any) -> dict[str, Any]:
    for name in NAMES:
        make_adapter(adapters, name)
    found = sim_config(adapters, max_loras=8, sim=SLOW_LOADS)
    found["llm_configs"][0]["lora_config"] |= lora
    return found


async def test_a_worker_that_was_killed_has_what_it_had_before_its_first_request(
    adapters: Path, tmp_path: Path
) -> None:
    async with cluster(config(adapters), tmp_path) as c:
        first = await c.start_worker("w0")
        for name in NAMES[:4]:
            assert await tier_of(c, name) == "remote"
        first.signal(signal.SIGKILL)
        await first.wait()
        assert await serving_from_the_begin(c, "w0") == 4
        assert [await tier_of(c, name) for name in NAMES[:4]] == ["gpu"] * 4
        log = c.workers["w0"].output()
        again = log[log.index('"event":"serving"') + 1 :]
        assert again.index("warmed up") < again.index('"event":"serving"')


async def test_a_worker_that_comes_has_its_share_of_what_the_others_are_asked_for(
    adapters: Path, tmp_path: Path
) -> None:
    async with cluster(config(adapters), tmp_path) as c:
        await c.start_worker("w0")
        ended = asyncio.Event()

        async def asked_for_all_the_time(name: str) -> None:
            while not ended.is_set():
                await tier_of(c, name)

        async with asyncio.TaskGroup() as tasks:
            for name in NAMES:
                tasks.create_task(asked_for_all_the_time(name))
            async with asyncio.timeout(LIMIT_S):
                while not await c.metric("loraplex_dispatched_total", reason="resident") > 200:
                    await asyncio.sleep(0.05)
            await c.start_worker("w1")
            ended.set()
        before, _, _ = c.workers["w1"].output().partition('"event":"serving"')
        loaded = before.count('"event":"adapter loaded"')
        assert 1 <= loaded <= 4, "half of its slots at most"


async def test_what_is_pinned_or_preloaded_is_there_before_the_first_request(
    adapters: Path, tmp_path: Path
) -> None:
    async with cluster(config(adapters, pin=["a"], preload=["b"]), tmp_path) as c:
        await listed(c)
        assert await serving_from_the_begin(c, "w0") == 2


async def test_a_gateway_that_says_nothing_holds_no_worker_back(
    adapters: Path, tmp_path: Path
) -> None:
    async with cluster(config(adapters, preload=["a"]), tmp_path) as c:
        await listed(c)
        async with asyncio.timeout(LIMIT_S):
            await c.start_worker("w0", gateways=[f"ipc://{tmp_path}/nobody"])
        assert await tier_of(c, "a") == "gpu"
