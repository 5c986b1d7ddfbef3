"""Shell. The engine itself, asked what it holds: adapters that leave a slot are really gone, and a refused one leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from pathlib import Path

from tests.harness import DEMO, ROOT, demo_config

PROGRAM = """
import asyncio, json, sys
from pathlib import Path
from shared.adapters import AdapterRef
from shared.config import LLMConfig
from shared.errors import InvalidAdapter
from worker.__main__ import open_engine
from worker.engine import Loaded

async def main(config, folders):
    engine = open_engine(LLMConfig(**config))
    facts = await engine.start()
    held = lambda: engine._engine.list_loras()
    loaded = [Loaded(AdapterRef("demo", Path(f).name, "d"), i, Path(f), 8, 0) for i, f in enumerate(folders, 1)]
    said = {"slots": facts.slots, "start": sorted(await held())}
    for adapter in loaded[:2]:
        await engine.load(adapter)
    said["two"] = sorted(await held())
    await engine.unload(loaded[0])
    said["one"] = sorted(await held())
    try:
        await engine.load(loaded[2])
    except InvalidAdapter as exc:
        said["refused"] = exc.message
    said["after"] = sorted(await held())
    active = lambda: engine._engine.collective_rpc("loraplex_slots")
    said["in_slots"] = await active()
    await engine.demote(loaded[1])
    said["demoted"] = [sorted(await held()), await active()]
    await engine.load(loaded[1])
    said["again"] = [sorted(await held()), await active()]
    await engine.stop()
    print(json.dumps(said))

asyncio.run(main(json.loads(sys.argv[1]), sys.argv[2:]))
"""


async def test_unloaded_and_refused_adapters_are_really_gone_and_demoted_ones_are_only_out_of_their_slot(tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(DEMO / "adapters" / "haiku", bad)
    # Says rank 8 and has tensors of rank 16: vLLM raises only while it copies them into a slot, and would keep the half-copied adapter.
    config = json.loads((bad / "adapter_config.json").read_text())
    (bad / "adapter_config.json").write_text(json.dumps({**config, "r": 8}))
    folders = [str(DEMO / "adapters" / "pirate"), str(DEMO / "adapters" / "shouting"), str(bad)]
    model = json.dumps(demo_config(max_loras=2, engine={"max_lora_rank": 8})["llm_configs"][0])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    argv = [sys.executable, "-c", PROGRAM, model, *folders]
    process = await asyncio.create_subprocess_exec(*argv, stdout=-1, stderr=-1, env=env, cwd=ROOT)
    async with asyncio.timeout(120):
        out, err = await process.communicate()
    assert process.returncode == 0, err.decode()[-3000:]
    said = json.loads(out.decode().splitlines()[-1])
    assert said["slots"] == 2 and said["start"] == []
    assert said["two"] == [1, 2] and said["one"] == [2]
    assert said["in_slots"] == [[2]]
    assert said["demoted"] == [[2], [[]]] and said["again"] == [[2], [[2]]]
    assert said["after"] == [2] and str(tmp_path) not in said["refused"]
