"""Shell. A request that ends the engine of every worker that gets it, at four gateway processes or
at gateways of two machines, and clients that ask again and again. It costs three workers, and who
streams beside it is served.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gateway.dispatch.lifecycle import DEADLY
from tests.fault.test_stalls import check_whole_or_failed
from tests.harness import Cluster, chat_body, cluster, sim_config
from tests.integration.serve.test_serve import Served, served

END_S = 60.0
PROCESSES, WORKERS, BYSTANDERS, TOKENS = 4, 3, 16, 150
ASKED, COPIES = 12, 3
FRAGILE: dict[str, Any] = {
    "model_loading_config": {"model_id": "fragile"},
    "llm_engine": "sim",
    "engine_kwargs": {"sim": {"ttft_ms": 20, "itl_ms": 20, "deadly_word": "deadly"}},
    "deployment_config": {"num_replicas": WORKERS},
}


async def answer(s: Served, prompt: str, headers: dict[str, str], **more: object) -> bytes:
    """By a connection of its own, so any gateway process may get it."""
    body = chat_body("fragile", prompt, max_tokens=TOKENS, **more)
    async with (
        aiohttp.ClientSession() as http,
        http.post(s.url + "/v1/chat/completions", json=body, headers=headers) as got,
    ):
        return await got.read()


def engines_died(s: Served) -> int:
    return s.log.read_text().count('"event":"engine died: step loop broke')


async def bystander(s: Served, asked: asyncio.Event) -> list[bytes]:
    """One stream after another, until the deadly request is not asked any more."""
    streams: list[bytes] = []
    while not asked.is_set():
        streams.append(await answer(s, "harmless", {}, stream=True))
    return streams


@pytest.mark.parametrize(
    ("prompt", "stream", "headers"),
    [
        ("deadly", False, {}),
        ("deadly", True, {}),
        ("deadly20", True, {}),
        ("deadly20", True, {"x-loraplex-resume": "off"}),
    ],
    ids=["prompt", "streamed prompt", "twentieth token", "twentieth token, cannot move"],
)
async def test_however_often_a_deadly_request_is_asked_it_costs_three_workers_and_no_bystander(
    tmp_path: Path, prompt: str, stream: bool, headers: dict[str, str]
) -> None:
    async with (
        served(tmp_path, more=[FRAGILE], processes=PROCESSES) as s,
        asyncio.timeout(END_S),
    ):
        over = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            beside = [tasks.create_task(bystander(s, over)) for _ in range(BYSTANDERS)]
            answers = [await answer(s, prompt, headers, stream=stream) for _ in range(ASKED)]
            over.set()
        assert all(b'"error"' in got for got in answers), answers
        assert all(b"It is refused for" in got for got in answers[DEADLY:]), answers
        assert 2 <= engines_died(s) <= DEADLY, s.log.read_text()
        streams = [raw for task in beside for raw in task.result()]
        assert check_whole_or_failed(streams, TOKENS) == 0


async def test_three_copies_at_once_are_found_out_and_no_bystander_is_blamed(
    tmp_path: Path,
) -> None:
    async with (
        served(tmp_path, more=[FRAGILE], processes=PROCESSES) as s,
        asyncio.timeout(END_S),
    ):
        over = asyncio.Event()

        async def ask_again(prompt: str) -> list[bytes]:
            return [await answer(s, prompt, {}, stream=True) for _ in range(ASKED)]

        async with asyncio.TaskGroup() as tasks:
            beside = [tasks.create_task(bystander(s, over)) for _ in range(BYSTANDERS)]
            clients = [tasks.create_task(ask_again("deadly20")) for _ in range(COPIES)]
            answers = [raw for client in clients for raw in await client]
            over.set()
        assert all(b'"error"' in got for got in answers), answers
        assert engines_died(s) <= COPIES * DEADLY, s.log.read_text()
        streams = [raw for task in beside for raw in task.result()]
        assert check_whole_or_failed(streams, TOKENS) == 0


async def test_a_gateway_of_another_machine_knows_what_workers_died_of(tmp_path: Path) -> None:
    tcp = {"control": "tcp://127.0.0.1:0", "data": "tcp://127.0.0.1:0", "insecure": True}
    config = sim_config(tmp_path / "adapters", sim={"deadly_word": "deadly"}, link=tcp)
    async with cluster(config, tmp_path) as here, asyncio.timeout(END_S):
        (tmp_path / "there").mkdir()
        of_there = {**config["gateway"], "state_dir": str(tmp_path / "there" / "state")}
        config = {**config, "gateway": of_there}
        there = Cluster(config, tmp_path / "there", None, here.http, index=1)
        try:
            await there.start_gateway()
            for n in range(DEADLY + 2):
                await here.start_worker(f"w{n}", gateways=[there.control])
            while (await there.get("/ready"))[1].get("workers") != {"sim": DEADLY + 2}:
                await asyncio.sleep(0.02)
            answers = [await c.chat("sim", "deadly") for c in (here, there, there, here)]
            messages = [error["error"]["message"] for status, error, _ in answers if status == 500]
            assert len(messages) == 4 and all("Workers died" in why for why in messages)
            # the second may have been asked while the news was on its way
            assert all("It is refused for" in why for why in messages[2:]), messages
            assert await here.text("sim", "harmless") and await there.text("sim", "harmless")
        finally:
            await there.stop()
