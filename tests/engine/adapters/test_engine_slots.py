"""Shell. The engine itself is asked what it holds. Adapters that leave a slot are really gone, and
a refused adapter leaves nothing behind and harms no other.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from examples.demo.styles import HELD_OUT
from tests.harness import DEMO, ROOT, demo_config

PROGRAM = """
import asyncio, json, shutil, sys
from pathlib import Path
from shared.adapters.identity import AdapterRef
from shared.config.llm import LLMConfig
from shared.errors import InvalidAdapter
from worker.engine.factory import open_engine
from worker.engine.base import EngineRequest, Loaded, Swap
from tests.engine import slot_audit

class Reply:
    prompt_tokens = output_tokens = 0
    finish_reasons = ""
    def head(self, status, sse, data, end, tokens=b""):
        ok = status == 200
        self.text = json.loads(data)["choices"][0]["message"]["content"] if ok else data.decode()
    def more(self, data, end, tokens=b""): pass
    def progress(self, tokens): pass

async def main(config, question, pirate, shouting, unfit, gone, head):
    engine = open_engine(LLMConfig(**config))
    facts = await engine.start()
    folders = [pirate, shouting, unfit, pirate, gone, head]
    a, b, bad, c, missing, of_head = [
        Loaded(AdapterRef("demo", f"a{i}", "d"), i, Path(f), 8, 0)
        for i, f in enumerate(folders, 1)
    ]
    said = {"slots": facts.slots}
    await engine._engine.collective_rpc(slot_audit.begin)
    async def note(what):
        slots = await engine._engine.collective_rpc("loraplex_slots")
        said[what] = [sorted(await engine._engine.list_loras()), slots]
    async def text(adapter):
        messages = [{"role": "user", "content": question}]
        body = {"model": "demo", "messages": messages, "max_tokens": 40, "temperature": 0}
        reply = Reply()
        data = json.dumps(body).encode()
        await engine.serve(EngineRequest("/v1/chat/completions", "r", data, adapter), reply)
        return reply.text
    async def swap(*parts):
        done = await engine.swap(Swap(*parts))
        assert done.stall_s > 0
        return {ref.name: exc.message for ref, exc in done.refused.items()}
    await note("start")
    said["base"] = await text(None)
    await asyncio.gather(engine.prepare(a), engine.prepare(b), engine.prepare(bad))
    await note("prepared")
    assert not await swap((a, b))
    await note("two")
    said["first"] = [await text(a), await text(b)]
    assert not await swap((), (), (a,))
    await note("one")
    said["refused"] = await swap((bad, c))
    await note("after")
    said["second"] = [await text(c), await text(b)]
    said["unprepared"] = await swap((a, missing), (c,), (b,))
    await note("again")
    said["third"] = [await text(a)]
    assert not await swap((c,), (a,))
    await note("demoted")
    said["fourth"] = [await text(c)]
    try:
        await engine.prepare(missing)
    except InvalidAdapter as exc:
        said["missing"] = exc.message
    await engine.prepare(b)
    assert not await swap((b,))
    said["fifth"] = [await text(b)]
    await engine.prepare(of_head)
    assert not await swap((of_head,), (c,))
    said["head"] = await engine._engine.collective_rpc(slot_audit.told_of_heads)
    assert not await swap((c,), (), (of_head,))
    async def staged_are(*int_ids):
        ranks = []
        async with asyncio.timeout(60):
            while not ranks or any(rank != list(int_ids) for rank in ranks):
                ranks = await engine._engine.collective_rpc(slot_audit.staged)
    moving, moved = Path(head).with_name("partial"), Path(head).with_name("entry")
    shutil.copytree(pirate, moving)
    engine.read_ahead(AdapterRef("demo", "a7", "d"), 7, moving)
    engine.read_ahead(AdapterRef("demo", "a8", "d"), 8, moving)
    await staged_are(7, 8)
    engine.forget(7)
    await staged_are(8)
    moving.rename(moved)
    (moved / "adapter_model.safetensors").unlink()  # what was read is used, and nothing again
    ahead = Loaded(AdapterRef("demo", "a8", "d"), 8, moved, 8, 0)
    await engine.prepare(ahead)
    assert not await swap((ahead,), (c,))
    said["ahead"] = await text(ahead)
    assert not await swap((c,), (), (ahead,))
    folders = {c.int_id: pirate, b.int_id: shouting}
    said["audit"] = await engine._engine.collective_rpc(slot_audit.audit, args=(folders,))
    await engine.stop()
    print(json.dumps(said))

asyncio.run(main(json.loads(sys.argv[1]), *sys.argv[2:]))
"""


async def hear(tmp_path: Path, **engine: Any) -> dict[str, Any]:
    unfit = tmp_path / "unfit"
    shutil.copytree(DEMO / "adapters" / "haiku", unfit)
    # Its config says rank 8, but its tensors have rank 16. vLLM raises only while it copies them
    # into a slot, and would keep the half-copied adapter.
    config = json.loads((unfit / "adapter_config.json").read_text())
    (unfit / "adapter_config.json").write_text(json.dumps({**config, "r": 8}))
    folders = [
        str(DEMO / "adapters" / "pirate"),
        str(DEMO / "adapters" / "shouting"),
        str(unfit),
        str(tmp_path / "no" / "such"),
        str(adapter_of_the_head(tmp_path / "head")),
    ]
    model = json.dumps(
        demo_config(max_loras=2, engine={"max_lora_rank": 8, **engine})["llm_configs"][0]
    )
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    }
    argv = [sys.executable, "-c", PROGRAM, model, HELD_OUT[0], *folders]
    process = await asyncio.create_subprocess_exec(*argv, stdout=-1, stderr=-1, env=env, cwd=ROOT)
    async with asyncio.timeout(180):
        out, err = await process.communicate()
    assert process.returncode == 0, err.decode()[-3000:]
    assert b"EngineDeadError" not in err, "an engine that was stopped is not a dead one"
    said: dict[str, Any] = json.loads(out.decode().splitlines()[-1])
    return said


def adapter_of_the_head(folder: Path) -> Path:
    """It changes nothing but the head of the demo model."""
    base = json.loads((DEMO / "model" / "config.json").read_text())
    config = json.loads((DEMO / "adapters" / "pirate" / "adapter_config.json").read_text())
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        json.dumps({**config, "r": 8, "target_modules": ["lm_head"]})
    )
    shapes = {"A": (8, base["hidden_size"]), "B": (base["vocab_size"], 8)}
    save_file(
        {
            f"base_model.model.lm_head.lora_{half}.weight": torch.ones(n)
            for half, n in shapes.items()
        },
        folder / "adapter_model.safetensors",
    )
    return folder


def check(said: dict[str, Any], tmp_path: Path, ranks: int = 1) -> None:
    assert said["slots"] == 2 and said["start"] == [[], [[]] * ranks]
    assert said["prepared"] == [[], [[]] * ranks], "prepared beside the slots"
    assert said["two"] == [[1, 2], [[1, 2]] * ranks] and said["one"] == [[2], [[2]] * ranks]
    assert said["after"] == [[2, 4], [[4, 2]] * ranks], (
        "the refused adapter left its slot to the next, and the other stayed"
    )
    assert list(said["refused"]) == ["a3"] and list(said["unprepared"]) == ["a5"]
    assert said["again"] == [[1, 4], [[1]] * ranks] and said["demoted"] == [[1, 4], [[4]] * ranks]
    pirate, shouting = said["first"]
    assert len({pirate, shouting, said["base"]}) == 3
    assert said["second"] == [pirate, shouting], (
        "what the refused adapter half wrote was not wiped out of the slot"
    )
    assert said["third"] == [pirate] and said["fourth"] == [pirate]
    assert said["fifth"] == [shouting]
    assert said["ahead"] == pirate, "read before it was checked, and served from that"
    assert said["head"] == [[1, 1]] * ranks, "it alone has a head, and a GPU is told so"
    told = [rank.pop() for rank in said["audit"]]
    assert all(missed == 0 < both for missed, both in told), (
        "what a GPU's kernels are not told of answers like the base"
    )
    assert said["audit"] == [[8, [4, 2], True, True]] * ranks, (
        "all but the first went a known way, into whatever slot, and what lies there "
        "is bit for bit what vLLM alone would have put there"
    )
    assert all(
        str(tmp_path) not in words
        for words in (said["missing"], *said["refused"].values(), *said["unprepared"].values())
    )


async def test_one_swap_moves_several_adapters_and_a_refused_one_leaves_nothing_and_harms_nobody(
    tmp_path: Path,
) -> None:
    check(await hear(tmp_path), tmp_path)


@pytest.mark.long
async def test_two_ranks_swap_alike(tmp_path: Path) -> None:
    check(await hear(tmp_path, tensor_parallel_size=2), tmp_path, ranks=2)
