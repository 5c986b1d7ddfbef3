"""Shell. The process that forks CPU workers, killed under a running `serve`."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import psutil

from tests.harness import ROOT


async def test_a_serve_whose_zygote_is_killed_says_so_ends_and_leaves_nothing_behind(tmp_path: Path) -> None:
    argv = [str(Path(sys.executable).parent / "loraplex"), "serve", str(ROOT / "examples" / "demo.yaml"), "--port", "0", "--workers", "1"]
    log = tmp_path / "serve.log"
    env = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
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
        assert "worker.zygote) has ended" in log.read_text() and "Traceback" not in log.read_text()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
