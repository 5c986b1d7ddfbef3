"""Shell. Workers with real vLLM that are killed, or whose engine is, in the middle of answers:
greedy answers are those of an undisturbed worker.
"""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path

import psutil
import pytest

from examples.demo.styles import HELD_OUT
from shared.runtime.children import Zygote
from tests.harness import Cluster, chat_body, cluster, demo_config

END_S = 120.0
MODELS = ("demo", "demo:pirate", "demo:haiku")
ASKED = {"temperature": 0, "max_tokens": 200, "ignore_eos": True}


async def text(c: Cluster, model: str, question: str, begun: asyncio.Event | None = None) -> str:
    body = chat_body(model, question, stream=True, **ASKED)
    said, done = "", 0
    async with c.http.post(c.url + "/v1/chat/completions", json=body) as answer:
        assert answer.status == 200, await answer.text()
        async for line in answer.content:
            if line.startswith(b"data: [DONE]"):
                done += 1
            elif line.startswith(b"data: "):
                event = json.loads(line[6:])
                assert "error" not in event, event
                said += "".join(c["delta"].get("content") or "" for c in event["choices"])
                if begun is not None and len(said) > 40:
                    begun.set()
    assert done == 1
    return said


def engine_of(pid: int) -> psutil.Process:
    return next(
        p
        for p in psutil.Process(pid).children(recursive=True)
        if "EngineCore" in p.name() + " ".join(p.cmdline())
    )


@pytest.mark.parametrize("what", ["worker", "engine"])
async def test_answers_of_a_worker_that_is_killed_go_on_at_another_one(
    zygote: Zygote, tmp_path: Path, what: str
) -> None:
    async with cluster(demo_config(max_loras=2), tmp_path, zygote) as c:
        for name in ("w0", "w1"):
            await c.start_worker(name)
        asked = [(model, question) for model in MODELS for question in HELD_OUT[:3]]
        due = [await text(c, model, question) for model, question in asked]
        begun = [asyncio.Event() for _ in asked]
        async with asyncio.timeout(END_S), asyncio.TaskGroup() as tasks:
            streams = [
                tasks.create_task(text(c, *one, event))
                for one, event in zip(asked, begun, strict=True)
            ]
            for event in begun:
                await event.wait()
            if what == "worker":
                c.workers["w0"].signal(signal.SIGKILL)
            else:
                engine_of(c.workers["w0"].pid).send_signal(signal.SIGKILL)
        assert [stream.result() for stream in streams] == due
        assert await c.metric("loraplex_streams_moved_total") > 0
        assert await c.metric("loraplex_streams_lost_total") == 0
