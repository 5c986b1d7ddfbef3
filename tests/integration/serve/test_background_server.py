"""Shell. `run(app, blocking=False)` of the Python surface: what becomes of the server when the
thread that started it ends, when its start is interrupted, and when nobody keeps its object.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
from asyncio.subprocess import Process
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import ROOT
from tests.processes import family_of, kill_with_family, lives

APP = """
import gc, threading, time, urllib.request
from loraplex import LLMConfig, build_openai_app, run

app = build_openai_app({{
    "llm_configs": [LLMConfig(
        model_loading_config={{"model_id": "sim"}},
        llm_engine="sim",
        deployment_config={{"num_replicas": {workers}}},
    )],
    "gateway": {{"port": 0, "state_dir": "{folder}/state"}},
}})

def answers(url):
    return urllib.request.urlopen(url + "/models").status
"""
FROM_A_THREAD = """
servers = []
thread = threading.Thread(target=lambda: servers.append(run(app)))
thread.start()
thread.join()
# the kernel tells of a thread's end when it is gone, and a server needs a moment to stop
for _ in range(20):
    time.sleep(0.05)
    print(answers(servers[0].url))
"""
FROM_NOBODY = """
url = run(app).url
gc.collect()
print(answers(url), len(list(__import__("pathlib").Path("{folder}/tmp").glob("loraplex-*"))))
"""
INTERRUPTED = """
try:
    run(app)
except KeyboardInterrupt:
    print("interrupted", flush=True)
    time.sleep(600)  # as a notebook does
"""
START_S = 90.0


@pytest.fixture
def folder() -> Iterator[Path]:
    """Its name is short: a server leaves a temporary folder whose name is too long for sockets."""
    with tempfile.TemporaryDirectory(dir="/tmp") as made:
        yield Path(made)


async def script(folder: Path, what: str, workers: int = 1) -> Process:
    (folder / "tmp").mkdir()
    text = (APP + what).format(folder=folder, workers=workers)
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", text),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(folder / "tmp")},
    )


def left_in(folder: Path) -> list[str]:
    return os.listdir(folder / "tmp")


async def test_a_server_outlives_the_thread_that_started_it(folder: Path) -> None:
    process = await script(folder, FROM_A_THREAD)
    async with asyncio.timeout(START_S):
        out, said = await process.communicate()
    assert out.split() == [b"200"] * 20, said.decode()


async def test_a_server_whose_object_nobody_keeps_goes_on_and_its_files_go_with_the_process(
    folder: Path,
) -> None:
    process = await script(folder, FROM_NOBODY)
    async with asyncio.timeout(START_S):
        out, said = await process.communicate()
        assert out.split() == [b"200", b"2"], said.decode()
        while left_in(folder):  # the server ends with its parent, a little later
            await asyncio.sleep(0.02)


async def test_a_start_that_is_interrupted_leaves_no_process_and_no_file(folder: Path) -> None:
    process = await script(folder, INTERRUPTED, workers=8)
    assert process.stdout is not None and process.stderr is not None
    try:
        async with asyncio.timeout(START_S):
            assert b"starting the gateway" in await process.stderr.readline()
            started = family_of(process.pid)
            assert started
            process.send_signal(signal.SIGINT)
            drained = asyncio.create_task(process.stderr.read())
            assert await process.stdout.readline() == b"interrupted\n"
            assert not [p for p in started if lives(p)] and left_in(folder) == []
    finally:
        await kill_with_family(process)
    await drained
