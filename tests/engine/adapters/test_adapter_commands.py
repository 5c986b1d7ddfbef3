"""Shell. Pins and evictions on a real engine. The engine itself is asked what it holds, in slots
and in host memory.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest_asyncio

from tests.harness import DEMO, ROOT, START_S, Cluster, cluster, demo_config

WORKER = """
import asyncio, json, os, sys
import worker.__main__ as program
from shared.config.settings_file import read_settings

opened = []
make = lambda *how: opened.append(program.open_engine(*how)) or opened[-1]

async def main(config, control):
    settings = program.worker_settings(read_settings(config), None, "w0", [control])
    running = asyncio.create_task(program.serve(settings, make))
    # not sys.stdin: the engine, a fork, would wait for its lock
    while await asyncio.to_thread(os.read, 0, 1):
        engine = opened[0]._engine
        [slots] = await engine.collective_rpc("loraplex_slots")
        said = {"slots": sorted(slots), "held": sorted(await engine.list_loras())}
        print("ENGINE", json.dumps(said), flush=True)
    running.cancel()

asyncio.run(main(*sys.argv[1:]))
"""


@dataclass
class Asked:
    """A gateway, and one worker with two slots that also reports what its engine holds."""

    cluster: Cluster
    worker: asyncio.subprocess.Process

    async def engine(self) -> dict[str, list[int]]:
        assert self.worker.stdin is not None and self.worker.stdout is not None
        self.worker.stdin.write(b"\n")
        async with asyncio.timeout(START_S):
            while line := await self.worker.stdout.readline():
                if line.startswith(b"ENGINE "):
                    return dict(json.loads(line.removeprefix(b"ENGINE ")))
        raise AssertionError("the worker ended")

    async def act(self, name: str, action: str, query: str = "") -> Any:
        status, body, _ = await self.cluster.post(f"/admin/adapters/{name}/{action}{query}", b"")
        assert status == 200, body
        return body

    async def use(self, name: str) -> str:
        return await self.cluster.text(f"demo:{name}", "Tell me about the sea.", max_tokens=8)


@pytest_asyncio.fixture(loop_scope="session")
async def asked(tmp_path: Path) -> AsyncIterator[Asked]:
    async with cluster(demo_config(max_loras=2), tmp_path) as c:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
        argv = [sys.executable, "-c", WORKER, str(tmp_path / "config.yaml"), c.control]
        with (tmp_path / "w0.log").open("wb") as log:
            worker = await asyncio.create_subprocess_exec(
                *argv, stdin=-1, stdout=-1, stderr=log, env=env, cwd=ROOT
            )
        try:
            async with asyncio.timeout(START_S):
                while (await c.get("/ready"))[0] != 200:
                    assert worker.returncode is None, (tmp_path / "w0.log").read_text()[-3000:]
                    await asyncio.sleep(0.1)
            yield Asked(c, worker)
        finally:
            if worker.returncode is None:
                worker.kill()
            await worker.wait()


async def test_a_pinned_adapter_survives_and_an_evicted_one_is_gone_from_slot_and_memory(
    asked: Asked,
) -> None:
    names = sorted(p.name for p in (DEMO / "adapters").iterdir() if p.is_dir())
    pinned, others = names[0], names[1:]
    assert len(others) > 2 and await asked.engine() == {"slots": [], "held": []}
    await asked.act(pinned, "pin")
    [its_id] = (await asked.engine())["slots"]
    before = await asked.use(pinned)
    for name in others:
        await asked.use(name)
        held = await asked.engine()
        assert its_id in held["slots"] and len(held["slots"]) == 2
    held = await asked.engine()
    assert len(held["held"]) == len(names), "what left its slot is in host memory"
    assert await asked.use(pinned) == before

    await asked.act(others[-1], "evict")  # in the other slot
    assert (await asked.engine())["slots"] == [its_id]
    await asked.act(others[0], "evict")  # in host memory
    held = await asked.engine()
    assert len(held["held"]) == len(names) - 2
    await asked.act(pinned, "evict")
    held = await asked.engine()
    assert (
        held["slots"] == [] and its_id not in held["held"] and len(held["held"]) == len(names) - 3
    )
    assert await asked.use(pinned) == before, "it comes back when it is asked for"
