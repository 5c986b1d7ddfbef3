"""Shell. Several gateway processes behind one port, as `loraplex serve` starts them. The answer is
that of all processes, whichever is asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiohttp
import psutil
import pytest_asyncio

from tests.harness import chat_body
from tests.integration.serve.test_serve import Served, served
from tests.processes import command_line

PROCESSES = 3
REQUESTS = 60
END_S = 60.0
FINISHED = 'loraplex_requests_total{base="sim",outcome="finished"}'


@pytest_asyncio.fixture(loop_scope="session")
async def three(tmp_path: Path) -> AsyncIterator[Served]:
    async with served(tmp_path, processes=PROCESSES) as s:
        yield s


async def ask(s: Served, path: str) -> tuple[int, str]:
    """A request over a new connection, for which the kernel picks the process."""
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as http,
        http.get(s.url + path) as answer,
    ):
        return answer.status, await answer.text()


async def chats(s: Served, count: int) -> None:
    async def one() -> None:
        async with (
            aiohttp.ClientSession() as http,
            http.post(
                s.url + "/v1/chat/completions", json=chat_body("sim:pirate", max_tokens=2)
            ) as answer,
        ):
            assert answer.status == 200, await answer.text()

    await asyncio.gather(*(one() for _ in range(count)))


async def shown(s: Served) -> dict[str, float]:
    _, text = await ask(s, "/metrics")
    return {
        series: float(value)
        for series, _, value in (
            line.rpartition(" ") for line in text.splitlines() if line[:1] != "#"
        )
    }


def of(seen: dict[str, float], name: str) -> dict[str, float]:
    """By the label `process`."""
    found = {
        re.search(r'process="(\w+)"', series): value
        for series, value in seen.items()
        if series.startswith(name + "{")
    }
    return {match[1]: value for match, value in found.items() if match}


async def until(s: Served, true: Callable[[dict[str, float]], bool]) -> dict[str, float]:
    async with asyncio.timeout(END_S):
        while not true(seen := await shown(s)):
            await asyncio.sleep(0.1)
    return seen


def pid_of(s: Served, process: int) -> int:
    lines = {p.pid: command_line(p) for p in s.family()}
    return next(
        pid
        for pid, line in lines.items()
        if "gateway" in line and line[line.index("--index") + 1] == str(process)
    )


async def test_any_scrape_shows_the_requests_of_all_processes(three: Served) -> None:
    await chats(three, REQUESTS)
    for _ in range(10):
        seen = await shown(three)
        assert seen[FINISHED] == REQUESTS
        assert seen['loraplex_adapter_requests_total{adapter="pirate",base="sim"}'] == REQUESTS
        assert (
            seen['loraplex_request_seconds_count{base="sim"}']
            == seen['loraplex_request_seconds_bucket{base="sim",le="+Inf"}']
            == REQUESTS
        )
        assert of(seen, "loraplex_gateway_process_up") == {f"g{i}": 1 for i in range(PROCESSES)}
        mine = of(seen, "loraplex_gateway_requests")
        assert sum(mine.values()) == REQUESTS and min(mine.values()) > 0, mine
        assert len([s for s in seen if s.startswith("loraplex_worker_up{")]) == 2
    # the others' share is as old as a heartbeat
    await until(three, lambda seen: seen['loraplex_worker_load{base="sim",worker="w0"}'] == 0)


async def test_counters_never_fall_when_a_process_dies_and_comes_back(three: Served) -> None:
    await chats(three, REQUESTS)
    assert (await shown(three))[FINISHED] == REQUESTS  # and so it is on file
    pid = pid_of(three, 1)
    next(p for p in three.family() if p.pid == pid).kill()
    seen = await until(three, lambda seen: of(seen, "loraplex_gateway_process_up")["g1"] == 0)
    assert seen[FINISHED] == REQUESTS
    seen = await until(three, lambda seen: of(seen, "loraplex_gateway_process_up")["g1"] == 1)
    assert seen[FINISHED] == REQUESTS and pid_of(three, 1) != pid
    await chats(three, REQUESTS)
    assert (await shown(three))[FINISHED] == 2 * REQUESTS


async def test_a_process_that_stands_still_is_named_and_what_it_had_counted_stays(
    three: Served,
) -> None:
    await chats(three, REQUESTS)
    assert (await shown(three))[FINISHED] == REQUESTS
    stopped = next(p for p in three.family() if p.pid == pid_of(three, 2))
    stopped.send_signal(signal.SIGSTOP)
    try:
        async with asyncio.timeout(END_S):
            while True:  # the kernel gives some connections to the one that stands still
                try:
                    async with asyncio.timeout(5):
                        seen = await shown(three)
                    break
                except TimeoutError:
                    continue
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):  # what hangs is replaced after a while
            stopped.send_signal(signal.SIGCONT)
    assert (
        of(seen, "loraplex_gateway_process_up") == {"g0": 1, "g1": 1, "g2": 0}
        and seen[FINISHED] == REQUESTS
    )


async def test_health_ready_models_and_explain_answer_the_same_in_every_process(
    three: Served,
) -> None:
    for _ in range(3 * PROCESSES):
        assert (await ask(three, "/health"))[0] == 200
        status, ready = await ask(three, "/ready")
        assert status == 200 and '"sim": 2' in ready
        assert '"sim:pirate"' in (await ask(three, "/v1/models"))[1]
        status, explained = await ask(three, "/admin/explain?model=sim:pirate")
        assert status == 200 and explained.count('"eligible":true') == 2


async def test_a_request_is_found_whichever_process_is_asked_for_it(three: Served) -> None:
    ids = [f"story-{n}" for n in range(12)]
    answered_by: set[str] = set()
    for request_id in ids:
        async with (
            aiohttp.ClientSession() as http,
            http.post(
                three.url + "/v1/chat/completions",
                json=chat_body("sim", max_tokens=2),
                headers={"x-request-id": request_id},
            ) as answer,
        ):
            assert answer.status == 200, await answer.text()
    for request_id in ids * 3:
        status, text = await ask(three, f"/admin/requests/{request_id}")
        assert status == 200, text
        story = json.loads(text)
        assert story["id"] == request_id, story
        answered_by.add(story["process"])
    assert len(answered_by) > 1, "one process served them all, so nothing was asked elsewhere"
    status, text = await ask(three, "/admin/requests/never-seen")
    assert status == 404, text
