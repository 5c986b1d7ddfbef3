"""Shell. Processes that may open or write no more files. What is there is served, the rest is
refused with a reason, and all is well once there is room again.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import resource
import signal
from pathlib import Path

import aiohttp

from bench.chaos.fleets import ClusterShape, DisturbedFleet, served
from tests.harness import cluster, sim_config

CONNECTIONS = 20
END_S = 60.0


async def ask(http: aiohttp.ClientSession, fleet: DisturbedFleet, model: str) -> tuple[int, str]:
    body = {"model": model, "prompt": "a b", "max_tokens": 4}
    async with http.post(fleet.url + "/v1/completions", json=body) as answer:
        text = await answer.text()
        assert "Traceback" not in text
        return answer.status, text


async def until_served(http: aiohttp.ClientSession, fleet: DisturbedFleet, model: str) -> None:
    while (await ask(http, fleet, model))[0] != 200:
        await asyncio.sleep(0.1)


async def test_a_full_disk_and_a_lack_of_descriptors_stop_nothing_that_is_served(
    tmp_path: Path,
) -> None:
    async with (
        served(ClusterShape("sim", workers=1), tmp_path, {}) as fleet,
        aiohttp.ClientSession() as http,
        asyncio.timeout(END_S),
    ):
        known, new = fleet.shape.models[:2]
        assert (await ask(http, fleet, known))[0] == 200
        worker, gateway = fleet.worker("w0"), fleet.gateways()[0]
        for pid in (worker, gateway):  # no byte of any file can be written
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        assert (await ask(http, fleet, known))[0] == 200
        status, text = await ask(http, fleet, new)
        assert status == 503 and "store_unavailable" in text, text
        for pid in (worker, gateway):
            resource.prlimit(
                pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            )
        await until_served(http, fleet, new)

        before = resource.prlimit(gateway, resource.RLIMIT_NOFILE)
        held = len(os.listdir(f"/proc/{gateway}/fd"))
        resource.prlimit(gateway, resource.RLIMIT_NOFILE, (held + 2, before[1]))
        port = int(fleet.url.rpartition(":")[2])
        opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(CONNECTIONS)]
        assert (await ask(http, fleet, known))[0] == 200  # on a connection that was open
        for _, writer in opened:
            writer.close()
        resource.prlimit(gateway, resource.RLIMIT_NOFILE, before)
        async with aiohttp.ClientSession() as another:
            await until_served(another, fleet, new)


async def test_serve_without_room_goes_on_and_starts_workers_once_there_is_some(
    tmp_path: Path,
) -> None:
    async with (
        served(ClusterShape("sim", workers=2), tmp_path, {}) as fleet,
        aiohttp.ClientSession() as http,
        asyncio.timeout(END_S),
    ):
        known, serve = fleet.shape.models[0], fleet.processes[0].pid

        async def said(words: str, without_descriptors: int = 0) -> None:
            while words not in (tmp_path / "serve.log").read_text():
                await asyncio.sleep(0.1)
                if without_descriptors:  # one that was in use just then may be free by now
                    _no_more_descriptors(without_descriptors)

        resource.prlimit(serve, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        fleet.configure(resume_max_tokens=100_001)
        await said("settings.json: cannot be written: File too large")
        resource.prlimit(
            serve, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        )

        pid = fleet.worker("w0")
        before = _no_more_descriptors(serve)
        os.kill(pid, signal.SIGKILL)
        await said("no process can be started: Too many open files", serve)
        assert (await ask(http, fleet, known))[0] == 200
        resource.prlimit(serve, resource.RLIMIT_NOFILE, before)
        await fleet.until_serving(2)
        assert (await ask(http, fleet, known))[0] == 200


async def test_a_gateway_that_keeps_files_outlives_a_full_disk_and_a_lack_of_descriptors(
    tmp_path: Path, adapters: Path
) -> None:
    async with cluster(sim_config(adapters), tmp_path) as c, asyncio.timeout(END_S):
        await c.start_worker("w0")
        assert c.gateway is not None

        async def upload() -> tuple[int, str]:
            form = aiohttp.FormData({"purpose": "batch"})
            form.add_field("file", b"{}", filename="lines.jsonl")
            async with c.http.post(c.url + "/v1/files", data=form) as answer:
                return answer.status, await answer.text()

        assert (await upload())[0] == 200
        pid, unlimited = c.gateway.pid, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        status, text = await upload()
        assert status == 503 and "File too large" in text, text
        resource.prlimit(pid, resource.RLIMIT_FSIZE, unlimited)
        assert (await upload())[0] == 200

        await _all_connected(pid)
        before = _no_more_descriptors(pid)
        while "batches cannot be read" not in c.gateway.output():
            await asyncio.sleep(0.1)
            _no_more_descriptors(pid)  # one that was in use just then may be free by now
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        assert (await c.chat("sim"))[0] == 200
        assert c.gateway.waiter.returncode is None


async def _all_connected(gateway: int) -> None:
    """Its worker's third connection, of the thread that watches the loop, comes a heartbeat after
    the others. ZeroMQ ends a process that cannot accept one.
    """
    seen = [-1] * 10
    while len(set(seen)) > 1 or seen[0] < 0:
        await asyncio.sleep(0.05)
        seen = [*seen[1:], len(os.listdir(f"/proc/{gateway}/fd"))]


def _no_more_descriptors(pid: int) -> tuple[int, int]:
    """The process can open nothing more. Returns what it could before."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    held = {int(fd) for fd in os.listdir(f"/proc/{pid}/fd")}
    free = next(fd for fd in itertools.count() if fd not in held)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (free, before[1]))
    return before
