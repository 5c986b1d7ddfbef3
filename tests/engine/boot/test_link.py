"""Shell. Real vLLM behind a proxy that resets its connections: greedy answers are the same as
without it.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from bench.chaos.link_proxy import CONTROL, DATA, link_proxy
from examples.demo.styles import HELD_OUT
from shared.runtime.children import Zygote
from tests.harness import Cluster, chat_body, cluster, demo_config

MODELS = ("demo", "demo:pirate", "demo:haiku")
ROUNDS = 6
RESET_EVERY_S = 0.1


async def stream(c: Cluster, model: str, prompt: str) -> str:
    body = chat_body(model, prompt, max_tokens=64, temperature=0, stream=True)
    async with c.http.post(c.url + "/v1/chat/completions", json=body) as answer:
        assert answer.status == 200, await answer.text()
        raw = (await answer.read()).decode()
    assert raw.endswith("data: [DONE]\n\n") and '"error"' not in raw, raw[-300:]
    events = [json.loads(e[6:]) for e in raw.split("\n\n")[:-2] if e.startswith("data: ")]
    return "".join(e["choices"][0]["delta"].get("content") or "" for e in events)


async def test_while_connections_are_reset_greedy_answers_are_those_of_undisturbed_ones(
    zygote: Zygote, tmp_path: Path
) -> None:
    link = {
        "control": "tcp://127.0.0.1:0",
        "data": "tcp://127.0.0.1:0",
        "peer": "off",
        "insecure": True,  # the proxy reads which port is the data socket's
    }
    async with cluster(demo_config(max_loras=2, link=link), tmp_path, zygote) as c:
        facts = json.loads((tmp_path / "run" / "g0.json").read_text())
        ports = [int(facts[kind].rpartition(":")[2]) for kind in (CONTROL, DATA)]
        async with link_proxy(*ports) as proxy:
            c.control = proxy.control
            await c.start_worker("w0")
            asked = [(model, prompt) for model in MODELS for prompt in HELD_OUT[:2]]
            due = [await stream(c, *one) for one in asked]
            resets = 0
            for _ in range(ROUNDS):
                answers = [asyncio.create_task(stream(c, *one)) for one in asked]
                while not all(answer.done() for answer in answers):
                    resets += proxy.reset(DATA)
                    await asyncio.wait(answers, timeout=RESET_EVERY_S)
                assert [answer.result() for answer in answers] == due
            assert resets > 0
            assert await c.metric("loraplex_worker_load", worker="w0") == 0
