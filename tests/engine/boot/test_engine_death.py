"""Shell. An engine that dies while it is asked for adapters ends its worker at once, so that
another one can be started.
"""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

from examples.demo.styles import HELD_OUT
from shared.runtime.children import Zygote
from tests.harness import cluster, demo_config
from tests.processes import called, family_of

# far less than the engine's own patience with a call that is not answered
# (worker.vllm_adapters.UTILITY_TIMEOUT_S)
END_S = 60.0


async def test_a_worker_whose_engine_dies_while_an_adapter_loads_ends_and_a_new_one_serves(
    zygote: Zygote, tmp_path: Path
) -> None:
    async with cluster(demo_config(max_loras=2), tmp_path, zygote) as c:
        worker = await c.start_worker("w0")
        await c.text("demo:haiku", HELD_OUT[0], max_tokens=2)
        core = next(p for p in family_of(worker.pid) if "EngineCore" in called(p))
        core.send_signal(signal.SIGSTOP)
        asked = [
            asyncio.create_task(c.chat(f"demo:{name}", HELD_OUT[0], max_tokens=2))
            for name in ("pirate", "shouting")
        ]
        async with asyncio.timeout(END_S):
            while len([*(tmp_path / "state" / "adapters" / "entries").glob("*/manifest")]) < 3:
                await asyncio.sleep(0.05)
            core.send_signal(signal.SIGKILL)
            assert await worker.wait(END_S) == 1
            await c.start_worker("w1")
            assert [status for status, *_ in await asyncio.gather(*asked)] == [200, 200]
