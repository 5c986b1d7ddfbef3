"""Shell. Workers that nobody supervises and that cannot start: the gateway says why, at once."""

from __future__ import annotations

import asyncio
from pathlib import Path

from shared.runtime.children import Zygote
from tests.harness import cluster, demo_config

LIMIT_S = 120.0


async def test_a_model_whose_remote_workers_cannot_start_is_not_waited_for(
    zygote: Zygote, tmp_path: Path
) -> None:
    config = demo_config()
    config["llm_configs"][0]["model_loading_config"]["model_source"] = str(tmp_path / "nothing")
    async with cluster(config, tmp_path, zygote) as c:
        waiting = asyncio.create_task(c.chat("demo", max_tokens=1))
        for _ in range(2):
            worker = await c.start_worker("w0", serving=False)
            assert await worker.wait(LIMIT_S) != 0
        async with asyncio.timeout(LIMIT_S):
            status, body, _ = await waiting
        assert status == 503 and body["error"]["code"] == "model_unavailable", body
        assert "did not start" in body["error"]["message"]
        status, ready = await c.get("/ready?model=demo")
        assert status == 503 and "did not start" in ready["models"]["demo"]["reason"]
        assert (await c.chat("demo", max_tokens=1))[0] == 503
