"""Shell. One worker over two ranks, through vLLM's own multiprocess executor."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from examples.demo.styles import HELD_OUT, is_style
from shared.runtime.children import Zygote
from shared.runtime.owned_folder import sweep
from shared.runtime.shared_memory import SEGMENTS
from tests.engine.requests.test_moves import text
from tests.harness import DEMO, Cluster, cluster, demo_config
from tests.processes import called, family_of, still_alive


@dataclass
class TwoRanks:
    """A gateway, and worker w0 over two ranks. The tests of this module build on one another."""

    cluster: Cluster
    store: Path

    def family(self, worker: str) -> list[psutil.Process]:
        """The processes below the worker: EngineCore and its ranks."""
        return family_of(self.cluster.workers[worker].pid)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def ranks(
    zygote: Zygote, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[TwoRanks]:
    folder = tmp_path_factory.mktemp("ranks")
    store = folder / "adapters"
    shutil.copytree(DEMO / "adapters", store)
    config = demo_config(max_loras=2, adapters=store, engine={"tensor_parallel_size": 2})
    async with cluster(config, folder, zygote) as c:
        await c.start_worker("w0")
        yield TwoRanks(c, store)


async def test_two_ranks_serve_adapters_and_survive_a_bad_one(ranks: TwoRanks) -> None:
    c, store = ranks.cluster, ranks.store
    assert len(ranks.family("w0")) >= 3  # EngineCore and two ranks
    for name in ("pirate", "haiku", "shouting"):
        assert is_style(name, await c.text(f"demo:{name}", HELD_OUT[0], max_tokens=120))
    before = await c.text("demo", HELD_OUT[0])
    for i in range(3):
        bad = store / f"bad{i}"
        shutil.copytree(store / "pirate", bad)
        config = json.loads((bad / "adapter_config.json").read_text())
        (bad / "adapter_config.json").write_text(
            json.dumps({**config, "target_modules": ["no_such_module"]})
        )
        (bad / "adapter_model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
        assert (await c.chat(f"demo:bad{i}", HELD_OUT[0]))[0] == 422
    assert await c.text("demo", HELD_OUT[0]) == before
    assert is_style("pirate", await c.text("demo:pirate", HELD_OUT[1], max_tokens=120))


async def test_a_killed_rank_takes_its_worker_along_and_its_streams_go_on_at_another_one(
    ranks: TwoRanks,
) -> None:
    """The kernel's out-of-memory killer sends the same signal."""
    c, family = ranks.cluster, ranks.family("w0")
    worker = c.workers["w0"]
    due = await text(c, "demo:haiku", HELD_OUT[0])
    rank = next(p for p in family if "Worker" in called(p))
    held, begun = segments(family), asyncio.Event()
    going = asyncio.create_task(text(c, "demo:haiku", HELD_OUT[0], begun))
    await begun.wait()
    rank.kill()
    assert await worker.wait() == 1
    assert c.gateway is not None
    assert f"process {rank.pid} of the engine has ended" in c.gateway.output()
    await until_gone(family)
    assert [name for name in held if (SEGMENTS / name).exists()] == []
    await c.start_worker("w1")
    assert await going == due


async def test_a_killed_worker_leaves_no_rank_behind(ranks: TwoRanks) -> None:
    family = ranks.family("w1")
    held = segments(family)
    assert held, "ranks talk through shared memory"
    ranks.cluster.workers["w1"].signal(signal.SIGKILL)
    await until_gone(family)
    sweep()  # as the next start does
    assert [name for name in held if (SEGMENTS / name).exists()] == []


def segments(family: list[psutil.Process]) -> set[str]:
    """The names of the shared memory that these processes use."""
    lines = [m.path for p in family for m in p.memory_maps(grouped=True)]
    return {path.removeprefix(f"{SEGMENTS}/") for path in lines if path.startswith(f"{SEGMENTS}/")}


async def until_gone(family: list[psutil.Process]) -> None:
    assert not await still_alive(family, 20)
