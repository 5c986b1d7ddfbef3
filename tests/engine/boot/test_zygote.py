"""Shell. The process that forks CPU workers, killed under a running `serve`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import aiohttp
import psutil

from tests.harness import ROOT
from tests.processes import command_line, family_of, kill_with_family, still_alive


def sockets(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_socket()]


def zygotes(family: list[psutil.Process]) -> list[psutil.Process]:
    """Those processes of `family` that fork workers, without the workers that were forked from
    them.
    """
    own = {p.pid for p in family if "worker.zygote" in command_line(p)}
    return [p for p in family if p.pid in own and p.ppid() not in own]


async def answered(url: str) -> bool:
    body = {"model": "demo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    with contextlib.suppress(aiohttp.ClientError):
        async with (
            aiohttp.ClientSession() as http,
            http.post(f"{url}/v1/chat/completions", json=body) as answer,
        ):
            return answer.status == 200
    return False


async def test_a_zygote_that_is_killed_is_replaced_and_serve_leaves_nothing_behind(
    tmp_path: Path,
) -> None:
    argv = [
        str(Path(sys.executable).parent / "loraplex"),
        "serve",
        str(ROOT / "examples" / "demo.yaml"),
        "--port",
        "0",
        "--workers",
        "1",
    ]
    log = tmp_path / "serve.log"
    temporary = Path(tempfile.mkdtemp())  # a socket's path must be short
    env = {
        **os.environ,
        "VLLM_LOGGING_LEVEL": "ERROR",
        "TMPDIR": str(temporary),
        "HOME": str(tmp_path),
    }
    with log.open("wb") as stderr:
        process = await asyncio.create_subprocess_exec(
            *argv, stdout=asyncio.subprocess.PIPE, stderr=stderr, env=env, start_new_session=True
        )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(180):
            while b"serves at" not in (line := await process.stdout.readline()):
                assert line, log.read_text()
            url = re.findall(r"http://[0-9.:]+", line.decode())[0]
            (first,) = zygotes(family_of(process.pid))
            first.kill()
            while not (new := zygotes(family_of(process.pid))) or new == [first]:
                await asyncio.sleep(0.1)
            while not await answered(url):
                await asyncio.sleep(0.2)
            family = family_of(process.pid)
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0
        assert not await still_alive(family, 20)
        assert not sockets(temporary)
        assert "Traceback" not in log.read_text()
    finally:
        await kill_with_family(process)
        shutil.rmtree(temporary)
