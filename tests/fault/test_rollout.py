"""Shell. Workers that operators have drained or replaced, under load: no request fails, and no
token is lost or repeated.
"""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path

import aiohttp

from tests.fault.test_stalls import check_whole_or_failed, stream, words
from tests.harness import chat_body, cluster, make_adapter, sim_config
from tests.integration.serve.test_serve import served, write_config
from tests.processes import command_line

END_S = 60.0
STREAMS = 16
TOKENS = 100
LONG = 400
"""Tokens of a stream that goes on while a worker is told to leave, on a busy machine too."""
WHOLE = [f"w{n}" for n in range(TOKENS - 1)]  # after the label, which is a token too
SLOW = {"itl_ms": 15}


async def test_a_rollout_replaces_every_worker_of_serve_and_fails_no_request(
    tmp_path: Path,
) -> None:
    async with served(tmp_path) as s, aiohttp.ClientSession() as http:
        before = {p.pid for p in s.family() if "--worker" in command_line(p)}
        going = True

        async def ask_on_and_on(model: str) -> list[str]:
            wrong = []
            while going:
                body = chat_body(model, max_tokens=TOKENS, stream=True)
                async with http.post(f"{s.url}/v1/chat/completions", json=body) as answer:
                    raw = await answer.read()
                    if answer.status != 200 or b'"error"' in raw or words(raw) != WHOLE:
                        wrong.append(f"{answer.status} {raw[-300:]!r}")
            return wrong

        lanes = [
            asyncio.create_task(ask_on_and_on("sim:pirate" if n % 2 else "sim"))
            for n in range(STREAMS)
        ]
        async with http.post(f"{s.url}/admin/rollout", json={}) as answer:
            assert answer.status == 200
            steps = [json.loads(line) async for line in answer.content]
        going = False
        assert [wrong for lane in await asyncio.gather(*lanes) for wrong in lane] == []
        assert steps[-1] == {"done": 2}, steps
        after = {p.pid for p in s.family() if "--worker" in command_line(p)}
        assert len(after) == 2 and not after & before


async def test_a_rollout_does_not_wait_for_workers_that_are_no_longer_wanted(
    tmp_path: Path,
) -> None:
    async with (
        served(tmp_path, replicas=3) as s,
        aiohttp.ClientSession() as http,
        http.post(f"{s.url}/admin/rollout?timeout_s=15", json={}) as answer,
    ):
        steps = [json.loads(await answer.content.readline())]
        write_config(tmp_path, replicas=1)
        s.process.send_signal(signal.SIGHUP)
        steps += [json.loads(line) async for line in answer.content]
    assert "done" in steps[-1], steps


async def test_a_drained_worker_gives_its_streams_to_others_without_waiting_for_them(
    adapters: Path, tmp_path: Path
) -> None:
    async with cluster(sim_config(adapters, sim=SLOW), tmp_path) as c:
        for name in ("w0", "w1"):
            await c.start_worker(name)
        streams = [asyncio.create_task(stream(c, tokens=LONG)) for _ in range(STREAMS)]
        async with asyncio.timeout(END_S):
            while not await c.metric("loraplex_worker_load", worker="w0"):
                await asyncio.sleep(0.02)
        status, answer, _ = await c.post("/admin/workers/w0/drain", {})
        assert status == 200 and answer["requests"] > 0, answer
        assert await c.workers["w0"].wait(END_S) == 0
        assert await c.metric("loraplex_streams_moved_total") > 0
        assert check_whole_or_failed(await asyncio.gather(*streams), LONG) == 0


async def test_adapters_in_use_are_loaded_elsewhere_before_their_only_holder_leaves(
    adapters: Path, tmp_path: Path
) -> None:
    make_adapter(adapters, "pirate")
    async with cluster(sim_config(adapters, sim=SLOW), tmp_path) as c:
        for name in ("w0", "w1"):
            await c.start_worker(name)
        going = asyncio.create_task(stream(c, "sim:pirate", LONG))
        holders: list[str] = []
        async with asyncio.timeout(END_S):
            while not holders:
                for name in ("w0", "w1"):
                    if await c.metric("loraplex_worker_adapters", worker=name, tier="gpu"):
                        holders.append(name)
        _, answer, _ = await c.post(f"/admin/workers/{holders[0]}/drain", {})
        assert answer["warmed"] == 1
        assert check_whole_or_failed([await going], LONG) == 0


async def test_nobody_can_drain_a_worker_that_is_not_there(adapters: Path, tmp_path: Path) -> None:
    async with cluster(sim_config(adapters), tmp_path) as c:
        await c.start_worker("w0")
        status, answer, _ = await c.post("/admin/workers/w7/drain", {})
        assert status == 400 and "w0" in answer["error"]["message"]
        c.workers["w0"].signal(signal.SIGTERM)
        await c.workers["w0"].wait()
