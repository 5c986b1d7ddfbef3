"""Shell. Five times the load that the workers serve, from clients with little patience: as many
whole answers in time as without overload.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio

from tests.harness import Cluster, chat_body, cluster, sim_config

PATIENCE_S = 2.0
TOKENS = 20
AT_ONCE = 8
ROUND_S = 6.0
WARM_S = 2.5  # until the queue is as deep as patience lets it be


@pytest_asyncio.fixture(loop_scope="session")
async def slow(tmp_path: Path, adapters: Path) -> AsyncIterator[Cluster]:
    """Eight answers at a time, each in half a second or more."""
    config = sim_config(adapters, sim={"itl_ms": 25, "max_num_seqs": AT_ONCE})
    config["llm_configs"][0]["deployment_config"] = {"max_ongoing_requests": AT_ONCE}
    async with cluster(config, tmp_path) as c:
        await c.start_worker("w0")
        yield c


class Clients:
    """Counts whole answers that came in time, from WARM_S on."""

    def __init__(self, c: Cluster, patience: str) -> None:
        self._url = c.url + "/v1/chat/completions"
        self._headers = {}
        total: float | None = 60.0
        if patience == "deadline":
            self._headers = {"x-loraplex-timeout-ms": str(int(PATIENCE_S * 1e3))}
        elif patience == "leaving":
            total = PATIENCE_S
        self._timeout = aiohttp.ClientTimeout(total=total)
        self._begun = time.monotonic()
        self.whole = 0

    async def ask(self, http: aiohttp.ClientSession) -> None:
        sent = time.monotonic()
        try:
            async with http.post(
                self._url,
                json=chat_body("sim", max_tokens=TOKENS),
                headers=self._headers,
                timeout=self._timeout,
            ) as answer:
                await answer.read()
                now = time.monotonic()
                in_time = now - sent < PATIENCE_S + 0.5
                if answer.status == 200 and in_time and now - self._begun > WARM_S:
                    self.whole += 1
                elif answer.status != 200:
                    await asyncio.sleep(0.1)
        except TimeoutError:
            pass

    async def closed(self, clients: int) -> int:
        """Each asks again as soon as it has its answer."""

        async def one(http: aiohttp.ClientSession) -> None:
            while time.monotonic() < self._begun + ROUND_S:
                await self.ask(http)

        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
            await asyncio.gather(*(one(http) for _ in range(clients)))
        return self.whole

    async def open(self, per_s: float) -> int:
        """They come evenly, whatever has become of the others."""
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http,
            asyncio.TaskGroup() as tasks,
        ):
            for n in range(int(per_s * ROUND_S)):
                await asyncio.sleep(max(0.0, self._begun + n / per_s - time.monotonic()))
                tasks.create_task(self.ask(http))
        return self.whole


@pytest.mark.parametrize("patience", ["deadline", "leaving"])
async def test_goodput_holds_when_clients_have_little_patience(
    slow: Cluster, patience: str
) -> None:
    peak = await Clients(slow, "patient").closed(AT_ONCE)
    assert peak > 10
    per_s = 5 * peak / (ROUND_S - WARM_S)
    for whole in (
        await Clients(slow, patience).open(per_s),
        await Clients(slow, patience).closed(5 * AT_ONCE * 2),
    ):
        assert whole >= 0.9 * peak - 2, f"{whole} whole answers, {peak} without overload"
