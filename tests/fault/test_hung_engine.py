"""Shell. An engine hangs while its worker lives on. It gets no new requests, its streams go on
elsewhere, and its worker is ended after a bound. A signal makes the simulated engine hang.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.fault.test_stalls import check_whole_or_failed, stream
from tests.harness import Cluster, cluster, sim_config
from worker.engine.sim.engine import FREEZE

END_S = 60.0
SUSPECT_S = 0.5


async def until_suspect(c: Cluster, name: str) -> None:
    async with asyncio.timeout(END_S):
        while "engine is suspect" not in c.workers[name].output():
            await asyncio.sleep(0.02)


async def test_streams_of_a_hung_engine_go_on_elsewhere_and_it_gets_nothing_new(
    adapters: Path, tmp_path: Path
) -> None:
    config = sim_config(
        adapters, sim={"itl_ms": 20}, engine_suspect_s=SUSPECT_S, engine_kill_s=END_S
    )
    async with cluster(config, tmp_path) as c:
        for name in ("w0", "w1"):
            await c.start_worker(name)
        streams = [asyncio.create_task(stream(c)) for _ in range(12)]
        async with asyncio.timeout(END_S):
            while not await c.metric("loraplex_worker_load", worker="w0"):
                await asyncio.sleep(0.02)
        c.workers["w0"].signal(FREEZE)
        await until_suspect(c, "w0")
        raws = await asyncio.gather(*streams)
        assert check_whole_or_failed(raws) == 0
        for _ in range(10):
            _, _, headers = await c.chat("sim", max_tokens=2)
            assert headers["x-loraplex-worker"] == "w1"


async def test_an_engine_that_goes_on_in_time_is_trusted_again(
    adapters: Path, tmp_path: Path
) -> None:
    config = sim_config(adapters, engine_suspect_s=SUSPECT_S, engine_kill_s=END_S)
    async with cluster(config, tmp_path) as c:
        await c.start_worker("w0")
        c.workers["w0"].signal(FREEZE)
        await until_suspect(c, "w0")
        waiting = asyncio.create_task(c.chat("sim", max_tokens=2))
        async with asyncio.timeout(END_S):
            while not await c.metric("loraplex_queue_depth"):
                await asyncio.sleep(0.02)
        c.workers["w0"].signal(FREEZE)
        status, *_ = await waiting
        assert status == 200


async def test_a_worker_whose_engine_hangs_for_good_ends_and_says_why(
    adapters: Path, tmp_path: Path
) -> None:
    config = sim_config(adapters, engine_suspect_s=SUSPECT_S, engine_kill_s=SUSPECT_S)
    async with cluster(config, tmp_path) as c:
        worker = await c.start_worker("w0")
        worker.signal(FREEZE)
        assert await worker.wait(END_S) == 1
        assert "it hangs: the engine has not answered" in worker.output()
