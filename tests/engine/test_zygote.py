"""Shell. The process that forks CPU workers, killed under a running `serve`."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
from pathlib import Path

import psutil

from tests.harness import ROOT


def sockets(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_socket()]


async def test_a_serve_whose_zygote_is_killed_says_so_ends_and_leaves_nothing_behind(
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
    env = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "TMPDIR": str(temporary)}
    with log.open("wb") as stderr:
        process = await asyncio.create_subprocess_exec(
            *argv, stdout=asyncio.subprocess.PIPE, stderr=stderr, env=env, start_new_session=True
        )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(120):
            while b"serves at" not in (line := await process.stdout.readline()):
                assert line, log.read_text()
            family = psutil.Process(process.pid).children(recursive=True)
            next(p for p in family if "worker.zygote" in p.cmdline()).kill()
            assert await process.wait() == 2
        _, alive = await asyncio.to_thread(psutil.wait_procs, family, 20)
        assert not alive
        assert not sockets(temporary)
        assert "worker.zygote) has ended" in log.read_text() and "Traceback" not in log.read_text()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        shutil.rmtree(temporary)
