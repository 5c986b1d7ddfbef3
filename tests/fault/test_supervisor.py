"""Shell. `loraplex serve` while its processes hang, are killed or cannot start: what hangs is
replaced, what was killed comes back at once, and one bad model touches no other.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from gateway.supervisor.restarts import PROVEN_KILLED_S
from shared.runtime.owned_folder import PREFIX
from tests.fault.test_stalls import check_whole_or_failed
from tests.harness import chat_body
from tests.integration.serve.test_processes import pid_of
from tests.integration.serve.test_serve import Served, chat, served
from tests.processes import command_line, lives, still_alive

END_S = 90.0
HANG_S = 1.0
TOKENS = 150
STREAMS = 12


async def ready(s: Served) -> dict[str, Any]:
    """What /ready says; empty if nobody answers in time."""
    timeout = aiohttp.ClientTimeout(total=2)
    with contextlib.suppress(aiohttp.ClientError, TimeoutError):
        async with (
            aiohttp.ClientSession(timeout=timeout) as http,
            http.get(s.url + "/ready") as answer,
        ):
            return dict(await answer.json())
    return {}


async def until_serving(s: Served, workers: int) -> None:
    async with asyncio.timeout(END_S):
        while (await ready(s)).get("workers") != {"sim": workers}:
            await asyncio.sleep(0.05)


async def until_gone(process: psutil.Process) -> None:
    async with asyncio.timeout(END_S):
        while lives(process):
            await asyncio.sleep(0.02)


def worker(s: Served, name: str) -> psutil.Process | None:
    return next((p for p in s.family() if ["--worker", name] == _named(p)), None)


def _named(process: psutil.Process) -> list[str]:
    line = command_line(process)
    if "--worker" in line:
        return line[line.index("--worker") : line.index("--worker") + 2]
    return []


def restarts(s: Served, name: str) -> list[dict[str, Any]]:
    """What `serve` has logged of each end of the process."""
    found = []
    for line in s.log.read_text().splitlines():
        with contextlib.suppress(ValueError):
            said = json.loads(line)
            if said.get("which") == name and "starting it again" in said.get("event", ""):
                found.append(said)
    return found


@asynccontextmanager
async def streaming(s: Served) -> AsyncIterator[list[asyncio.Task[bytes]]]:
    """Streams that have begun."""
    begun = asyncio.Semaphore(0)

    async def stream(http: aiohttp.ClientSession) -> bytes:
        body = chat_body("sim", max_tokens=TOKENS, stream=True)
        async with http.post(s.url + "/v1/chat/completions", json=body) as answer:
            first = await answer.content.readany()
            begun.release()
            return first + await answer.content.read()

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        tasks = [asyncio.create_task(stream(http)) for _ in range(STREAMS)]
        async with asyncio.timeout(END_S):
            for _ in tasks:
                await begun.acquire()
        try:
            yield tasks
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_worker_that_hangs_is_replaced_and_its_streams_go_on(tmp_path: Path) -> None:
    async with served(tmp_path, hang_s=HANG_S) as s:
        hung = worker(s, "w0")
        assert hung is not None
        async with streaming(s) as streams:
            hung.send_signal(signal.SIGSTOP)
            async with asyncio.timeout(END_S):
                assert check_whole_or_failed(await asyncio.gather(*streams), TOKENS) == 0
        await until_gone(hung)
        await until_serving(s, 2)
        (end,) = restarts(s, "w0")
        assert end["reason"] == "it hung and was killed"


async def test_a_gateway_process_that_hangs_is_replaced_and_new_clients_are_answered(
    tmp_path: Path,
) -> None:
    async with served(tmp_path, processes=2, hang_s=HANG_S) as s:
        hung = psutil.Process(pid_of(s, 1))
        hung.send_signal(signal.SIGSTOP)
        await until_gone(hung)
        async with asyncio.timeout(END_S):
            while not any({"--index", "1"} <= {*command_line(p)} for p in s.family()):
                await asyncio.sleep(0.05)
            answers = await asyncio.gather(*(chat(s.url, max_tokens=2) for _ in range(30)))
        assert {answer["status"] for answer in answers} == {200}


async def test_a_worker_that_is_killed_while_it_serves_is_back_at_once_every_time(
    tmp_path: Path,
) -> None:
    async with served(tmp_path) as s:
        for kills in range(1, 5):
            await until_serving(s, 2)
            await asyncio.sleep(PROVEN_KILLED_S + 0.5)  # it has served for long enough
            victim = worker(s, "w1")
            assert victim is not None
            victim.kill()
            await until_gone(victim)
            async with asyncio.timeout(END_S):
                while len(restarts(s, "w1")) < kills:
                    await asyncio.sleep(0.02)
        assert [end["in_s"] for end in restarts(s, "w1")] == [0.0] * 4
        assert {end["reason"] for end in restarts(s, "w1")} == {"killed by SIGKILL"}


async def test_a_worker_that_is_killed_before_it_serves_waits_longer_each_time(
    tmp_path: Path,
) -> None:
    """So does one that the kernel kills again and again for want of memory: that is SIGKILL too."""
    async with served(tmp_path) as s:
        for kills in range(1, 4):
            async with asyncio.timeout(END_S):
                while (victim := worker(s, "w1")) is None:
                    await asyncio.sleep(0.02)
                victim.kill()
                while len(restarts(s, "w1")) < kills:
                    await asyncio.sleep(0.02)
            assert (await chat(s.url, max_tokens=2))["status"] == 200
        waits = [end["in_s"] for end in restarts(s, "w1")]
        assert 0 < waits[0] <= 1 <= waits[1] <= 2 <= waits[2] <= 4
        await until_serving(s, 2)


async def test_a_model_that_cannot_start_says_why_and_takes_no_other_one_down(
    tmp_path: Path,
) -> None:
    bad: dict[str, Any] = {
        "model_loading_config": {
            "model_id": "bad",
            "model_source": str(tmp_path / "no-such-model"),
        },
        "engine_kwargs": {"max_model_len": 512, "dtype": "float32", "enforce_eager": True},
        "deployment_config": {"num_replicas": 1},
    }
    asleep = {
        **bad,
        "model_loading_config": {**bad["model_loading_config"], "model_id": "asleep"},
        "deployment_config": {"autoscaling_config": {"min_replicas": 0, "upscale_delay_s": 0.1}},
    }
    async with served(tmp_path, more=[bad, asleep]) as s:
        assert (await ready(s))["models"]["asleep"]["ready"]  # a request would start it
        async with asyncio.timeout(END_S):
            for _ in range(2):  # the first waits until it is known, the second does not wait
                told = await chat(s.url, "asleep", max_tokens=1)
                assert told["status"] == 503 and "no-such-model" in told["error"]["message"], told
        said = (await ready(s))["models"]["asleep"]
        assert not said["ready"] and "no-such-model" in said["reason"]
        told = await chat(s.url, "bad", max_tokens=1)
        assert told["status"] == 503 and told["error"]["code"] == "model_unavailable", told
        assert "no-such-model" in told["error"]["message"]
        said = (await ready(s))["models"]
        assert said["sim"]["ready"] and not said["bad"]["ready"]
        for _ in range(10):
            assert (await chat(s.url, max_tokens=2))["status"] == 200
        assert s.process.returncode is None


def held_by(folder: Path) -> list[Path]:
    return list(folder.iterdir())


async def test_a_killed_serve_leaves_nothing_and_one_that_is_told_twice_to_end_cuts_no_stream(
    tmp_path: Path, monkeypatch: Any
) -> None:
    temporary = Path(tempfile.mkdtemp(prefix="s-"))  # a socket's path must be short
    monkeypatch.setenv("TMPDIR", str(temporary))
    async with served(tmp_path) as s:
        family = s.family()
        (first,) = (path for path in held_by(temporary) if path.name.startswith(PREFIX))
        s.process.send_signal(signal.SIGKILL)
        assert not await still_alive(family, END_S)
        assert first.exists()
    async with served(tmp_path) as s:
        assert not first.exists()
        async with streaming(s) as streams, asyncio.timeout(END_S):
            s.process.send_signal(signal.SIGTERM)
            while "draining" not in s.log.read_text():
                await asyncio.sleep(0.01)
            s.process.send_signal(signal.SIGTERM)
            assert check_whole_or_failed(await asyncio.gather(*streams), TOKENS) == 0
        assert await s.process.wait() == 0
    assert held_by(temporary) == []
    shutil.rmtree(temporary)
