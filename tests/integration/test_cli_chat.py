"""Shell. `loraplex chat` against a gateway with a simulated worker."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from tests.harness import ROOT, cluster, make_adapter, sim_config


async def talk(url: str, given: str, *more: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "loraplex", "chat", "sim:pirate", "--url", url, *more),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )
    out, err = await process.communicate(given.encode())
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_a_conversation_shows_the_answers_and_who_gave_them(
    tmp_path: Path, adapters: Path
) -> None:
    make_adapter(adapters, "pirate")
    async with cluster(sim_config(adapters), tmp_path) as c:
        await c.start_worker("w0")
        status, out, err = await talk(c.url, "hello\n/clear\nagain\n/exit\n", "--max-tokens", "4")
        assert status == 0 and out.count("adapter=pirate") == 2
        assert err.count("worker w0") == 2 and err.count("4 tokens]") == 2 and "tokens/s" in err
        status, out, err = await talk(c.url, "", "--prompt", "hi", "--max-tokens", "100000")
        assert status == 1 and "8192 tokens" in err and "Traceback" not in err


async def test_no_gateway_is_one_line() -> None:
    status, _, err = await talk("http://127.0.0.1:9", "", "--prompt", "hi")
    assert status == 1 and "no gateway answers" in err and "Traceback" not in err
