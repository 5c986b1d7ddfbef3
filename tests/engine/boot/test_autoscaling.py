"""Shell. Real vLLM workers come and go with the load, and no request fails."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.harness import demo_config
from tests.integration.serve.test_autoscaling import QUICK, serving


async def test_vllm_workers_scale_up_down_to_zero_and_back(tmp_path: Path) -> None:
    """1 -> 2 -> 1 -> 0 -> 1. On the way down a stream is open all the time; none is cut."""
    config = demo_config(state_dir=str(tmp_path / "state"), progress_s=0.2)
    config["llm_configs"][0]["deployment_config"] = {
        "autoscaling_config": {
            **QUICK,
            "max_replicas": 2,
            "initial_replicas": 1,
            "downscale_delay_s": 2.0,
        }
    }
    async with serving(tmp_path, config, "demo") as s:
        stop = asyncio.Event()
        load = asyncio.create_task(s.load(4, stop, tokens=200))
        await s.until(serving=2)
        async with asyncio.timeout(60):
            while not s.workers_seen >= {"w0", "w1"}:
                await asyncio.sleep(0.05)
        less = asyncio.Event()
        little = asyncio.create_task(s.load(1, less, tokens=200))
        stop.set()
        await load
        await s.until(serving=1, draining=0, wanted=1)
        less.set()
        await little
        await s.until(serving=0, draining=0, wanted=0)
        text = await s.stream(5, "pirate")
        assert ": starting a worker" in text
        await s.until(serving=1)
