"""Shell. One worker over two ranks, through vLLM's own multiprocess executor."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
from pathlib import Path

import psutil

from examples.demo.styles import HELD_OUT, is_style
from shared.runtime.children import Zygote
from tests.harness import DEMO, cluster, demo_config


async def test_two_ranks_serve_adapters_and_survive_a_bad_one_and_a_kill_leaves_no_rank_behind(
    zygote: Zygote, tmp_path: Path
) -> None:
    store = tmp_path / "adapters"
    shutil.copytree(DEMO / "adapters", store)
    async with cluster(
        demo_config(max_loras=2, adapters=store, engine={"tensor_parallel_size": 2}),
        tmp_path,
        zygote,
    ) as c:
        worker = await c.start_worker("w0")
        family = psutil.Process(worker.pid).children(recursive=True)
        assert len(family) >= 3  # EngineCore and two ranks
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
        worker.signal(signal.SIGKILL)
        _, alive = await asyncio.to_thread(psutil.wait_procs, family, 20)
        assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
