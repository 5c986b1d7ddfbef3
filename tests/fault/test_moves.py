"""Shell. Workers are killed, or leave, in the middle of answers. Every client gets the answer that
it would have got from one worker.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
from pathlib import Path

import aiohttp

from shared.link.token_ids import BYTES_PER_TOKEN
from tests.fault.test_link import Lanes, ask, check_all_whole, nothing_left
from tests.harness import Cluster, chat_body, cluster, make_adapter, sim_config
from worker.requests.open_request import PROGRESS_TOKENS

END_S = 60.0
LONG = 400  # tokens: some seconds
SIM = {"itl_ms": 10}


async def streaming(c: Cluster, tokens: int, count: int) -> list[asyncio.Task[object]]:
    """So many streams, all of which have begun."""
    tasks: list[asyncio.Task[object]] = [asyncio.create_task(ask(c, tokens)) for _ in range(count)]
    async with asyncio.timeout(END_S):
        while await c.metric("loraplex_worker_load") < count:
            await asyncio.sleep(0.02)
    await asyncio.sleep(20 * SIM["itl_ms"] / 1e3)  # some tokens: nothing says when they have come
    return tasks


async def test_while_workers_are_killed_again_and_again_every_answer_is_whole(
    tmp_path: Path, adapters: Path
) -> None:
    dice = random.Random(3)
    names = ["w0", "w1", "w2"]
    async with cluster(sim_config(adapters, sim=SIM), tmp_path) as c:
        for name in names:
            await c.start_worker(name)
        async with Lanes(c, 32, 150) as lanes:
            for _ in range(4):
                await lanes.answered(24)
                name = dice.choice(names)
                c.workers[name].signal(signal.SIGKILL)
                await c.workers[name].wait()
                await c.start_worker(name)
            check_all_whole(await lanes.finish(), 150)
        assert await c.metric("loraplex_streams_moved_total") > 0
        assert await c.metric("loraplex_streams_lost_total") == 0
        for name in names:
            await nothing_left(c, name)


async def test_a_worker_that_leaves_at_once_hands_its_streams_over(
    tmp_path: Path, adapters: Path
) -> None:
    async with cluster(sim_config(adapters, sim=SIM, drain_s=0), tmp_path) as c:
        for name in ("w0", "w1"):
            await c.start_worker(name)
        streams = await streaming(c, LONG, 16)
        c.workers["w1"].signal(signal.SIGHUP)  # as for a reload, which a worker does not do
        c.workers["w0"].signal(signal.SIGTERM)
        assert await c.workers["w0"].wait(END_S) == 0
        async with asyncio.timeout(END_S):
            check_all_whole([await stream for stream in streams], LONG)  # type: ignore[misc]
        assert await c.metric("loraplex_streams_moved_total") > 0
        await nothing_left(c, "w1")


async def test_answers_that_are_sent_whole_are_not_lost_either(
    tmp_path: Path, adapters: Path
) -> None:
    make_adapter(adapters, "pirate")
    async with cluster(sim_config(adapters, sim=SIM), tmp_path) as c:
        for name in ("w0", "w1"):
            await c.start_worker(name)
        due = await c.text("sim:pirate", max_tokens=LONG)
        asked = [asyncio.create_task(c.chat("sim:pirate", max_tokens=LONG)) for _ in range(12)]
        told = 0.0
        for name in ("w0", "w1"):
            # all tell of tokens before their worker dies: it is given to no third one else
            told += 12 * 2 * PROGRESS_TOKENS * BYTES_PER_TOKEN
            async with asyncio.timeout(END_S):
                while await c.metric("loraplex_journal_bytes") < told:
                    await asyncio.sleep(0.02)
            told = await c.metric("loraplex_journal_bytes")
            c.workers[name].signal(signal.SIGKILL)
            await c.workers[name].wait()
            await c.start_worker(name)
        async with asyncio.timeout(END_S):
            answers = [await one for one in asked]
        assert {status for status, *_ in answers} == {200}, answers
        assert {answer["choices"][0]["message"]["content"] for _, answer, _ in answers} == {due}
        assert any(int(headers.get("x-loraplex-moves", "0")) for *_, headers in answers)
        await nothing_left(c, "w0")
        await nothing_left(c, "w1")


async def _events(answer: aiohttp.ClientResponse) -> tuple[list[dict[str, object]], bytes]:
    raw = await answer.content.read()
    events = [line[6:] for line in raw.split(b"\n") if line.startswith(b"data: {")]
    return [json.loads(event) for event in events], raw


async def test_a_stream_that_moved_keeps_its_name_and_time_and_tells_of_it(
    tmp_path: Path, adapters: Path
) -> None:
    async with cluster(sim_config(adapters, sim=SIM), tmp_path) as c:
        await c.start_worker("w0")
        body = chat_body("sim", max_tokens=LONG, stream=True)
        body["stream_options"] = {"include_usage": True}
        async with c.http.post(c.url + "/v1/chat/completions", json=body) as answer:
            await answer.content.readany()
            c.workers["w0"].signal(signal.SIGKILL)
            await asyncio.sleep(1.1)  # the second in which the answer was created is over
            await c.start_worker("w1", serving=False)
            events, raw = await _events(answer)
        assert len({(event["id"], event["created"], event["model"]) for event in events}) == 1
        assert raw.count(b": continued by another worker\n\n") == 1
        assert events[-1]["usage"]["completion_tokens"] == LONG  # type: ignore[index]
        assert raw.endswith(b"data: [DONE]\n\n") and raw.count(b'"role"') <= 1
        assert c.gateway is not None
        async with asyncio.timeout(END_S):
            while '"moves":1' not in c.gateway.output():
                await asyncio.sleep(0.05)


async def test_a_stream_that_is_not_to_move_ends_with_the_reason(
    tmp_path: Path, adapters: Path
) -> None:
    async with cluster(sim_config(adapters, sim=SIM), tmp_path) as c:
        for name in ("w0", "w1"):
            await c.start_worker(name)
        body = chat_body("sim", max_tokens=LONG, stream=True)
        headers = {"x-loraplex-resume": "off"}
        async with c.http.post(
            c.url + "/v1/chat/completions", json=body, headers=headers
        ) as answer:
            await answer.content.readany()
            c.workers[answer.headers["x-loraplex-worker"]].signal(signal.SIGKILL)
            events, raw = await _events(answer)
        assert "It cannot be continued elsewhere: off." in str(events[-1]["error"])
        assert raw.endswith(b"data: [DONE]\n\n")
        assert await c.metric("loraplex_streams_lost_total", reason="off") == 1
        assert await c.metric("loraplex_streams_moved_total") == 0
        assert c.gateway is not None
        async with asyncio.timeout(END_S):
            while '"lost":"off"' not in c.gateway.output():
                await asyncio.sleep(0.05)
