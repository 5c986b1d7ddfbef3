"""Shell. `loraplex serve` with vLLM, from the first line to the address: what a person sees, and
that Ctrl-C is obeyed whatever it is at.
"""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest
import yaml

from tests.harness import demo_config
from tests.integration.serve.test_serve import LORAPLEX, start
from tests.processes import family_of, kill_with_family, lives

STAGES = ["importing vLLM", "loading the model"]
"""Those that last for seconds everywhere."""
START_S = 120.0


async def starting(folder: Path) -> tuple[asyncio.subprocess.Process, Path]:
    config = demo_config(max_loras=2, state_dir=str(folder / "state"))
    config["llm_configs"][0]["deployment_config"] = {"num_replicas": 1}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return await start(folder, LORAPLEX, "serve", str(folder / "config.yaml"))


def said_in(log: Path) -> str:
    return log.read_text()


async def until_said(log: Path, word: str) -> None:
    async with asyncio.timeout(START_S):
        while word not in said_in(log):
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("stage", [STAGES[0], pytest.param(STAGES[1], marks=pytest.mark.long)])
async def test_ctrl_c_ends_a_start_in_every_stage_before_it_has_come_to_its_end(
    tmp_path: Path, stage: str
) -> None:
    process, log = await starting(tmp_path)
    try:
        await until_said(log, stage)
        family = family_of(process.pid)
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(START_S):
            assert await process.wait() == 0, log.read_text()
        said = log.read_text()
        assert "stopping" in said and "Traceback" not in said
        later = STAGES[STAGES.index(stage) + 1 :]
        assert stage != STAGES[0] or not any(word in said for word in later)
        assert not [p for p in family if lives(p)]
        assert process.stdout is not None and not await process.stdout.read()  # no address
    finally:
        await kill_with_family(process)
