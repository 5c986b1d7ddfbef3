"""What the probes of a worker answer."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator

import pytest

from shared.errors import ConfigError
from worker import probes
from worker.probes import ProbedState, open_probes


class Probed:
    def __init__(self) -> None:
        self.state = ProbedState(False, False, "the engine boots")
        self.asked = asyncio.Event()
        self.port = 0

    def drain(self) -> None:
        self.asked.set()

    async def get(self, path: str) -> tuple[int, str]:
        def ask() -> tuple[int, str]:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", None, 10) as got:
                    return got.status, got.read().decode().strip()
            except urllib.error.HTTPError as exc:
                return exc.code, exc.read().decode().strip()

        return await asyncio.to_thread(ask)


@contextlib.asynccontextmanager
async def probed() -> AsyncIterator[Probed]:
    worker = Probed()
    async with open_probes(0, lambda: worker.state, worker.drain) as worker.port:
        yield worker


async def test_a_worker_that_boots_lives_and_one_that_serves_is_ready() -> None:
    async with probed() as worker:
        assert await worker.get("/live") == (200, "ok")
        assert await worker.get("/started") == (503, "the engine boots")
        assert await worker.get("/ready") == (503, "the engine boots")
        worker.state = ProbedState(True, True)
        assert await worker.get("/started") == await worker.get("/ready") == (200, "ok")
        worker.state = ProbedState(True, False, "draining")
        assert await worker.get("/ready") == (503, "draining")
        assert (await worker.get("/started"))[0] == (await worker.get("/live"))[0] == 200
        assert (await worker.get("/metrics"))[0] == 404


WORKER = """
import asyncio, sys
from worker.probes import ProbedState, open_probes
async def main():
    told = asyncio.Event()
    async with open_probes(0, lambda: ProbedState(True, True), told.set) as port:
        print(port, flush=True)
        await told.wait()
        print("told", flush=True)
        await asyncio.to_thread(sys.stdin.readline)  # what it still has to do
asyncio.run(main())
"""


async def test_the_command_that_drains_waits_until_the_workers_process_has_ended() -> None:
    pipe = asyncio.subprocess.PIPE
    worker = await asyncio.create_subprocess_exec(
        sys.executable, "-c", WORKER, stdin=pipe, stdout=pipe
    )
    assert worker.stdout is not None and worker.stdin is not None
    async with asyncio.timeout(20):
        port = (await worker.stdout.readline()).decode().strip()
        command = asyncio.create_task(asyncio.to_thread(probes.main, [port]))
        assert await worker.stdout.readline() == b"told\n"
        assert not command.done()
        worker.stdin.write(b"\n")
        assert await command == 0
        assert await worker.wait() == 0


async def test_the_command_that_drains_is_content_if_the_worker_has_ended() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert await asyncio.to_thread(probes.main, [str(port)]) == 0


async def test_another_host_cannot_drain_the_worker() -> None:
    async with probed() as worker:
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", worker.port, local_addr=("127.0.0.2", 0)
        )
        writer.write(b"GET /drain HTTP/1.1\r\n\r\n")
        async with asyncio.timeout(10):
            assert (await reader.readline()).startswith(b"HTTP/1.1 404")
        writer.close()
        assert not worker.asked.is_set()


@pytest.mark.parametrize("sent", [b"\r\n\r\n", b"POST /drain HTTP/1.1\r\n\r\n", b"x" * 100_000])
async def test_what_is_no_probe_changes_nothing(sent: bytes) -> None:
    async with probed() as worker:
        reader, writer = await asyncio.open_connection("127.0.0.1", worker.port)
        writer.write(sent)
        async with asyncio.timeout(10):
            with contextlib.suppress(ConnectionError):
                assert b" 200 " not in await reader.read()
        writer.close()
        assert not worker.asked.is_set() and (await worker.get("/live"))[0] == 200


async def test_a_port_that_is_taken_is_said() -> None:
    async with probed() as worker:
        with pytest.raises(ConfigError, match=f"--probe-port {worker.port}"):
            async with open_probes(worker.port, lambda: worker.state, worker.drain):
                pass
