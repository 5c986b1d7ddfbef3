"""Real files, and real processes that are killed in between."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from shared.errors import ConfigError
from shared.runtime.state_file import StateFile
from tests.harness import ROOT

LIMIT_S = 60


class Counts(msgspec.Struct, frozen=True):
    by: dict[str, int] = {}
    padding: str = ""


def a_file(folder: Path) -> StateFile[Counts]:
    return StateFile(folder / "deep" / "state.json", Counts)


def count(who: str) -> object:
    return lambda state: Counts({**state.by, who: state.by.get(who, 0) + 1}, state.padding)


PROGRAM = """
import sys
from pathlib import Path
from tests.integration.serve.test_state_file import Counts, a_file, count
folder, who, times = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
print("ready", flush=True)
for _ in range(times):
    a_file(folder).update(count(who))
print("done", flush=True)
"""


def counter(folder: Path, who: str, times: int) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), who, str(times)],
        stdout=subprocess.PIPE,
        text=True,
        env=env,
        cwd=ROOT,
    )


def test_a_file_that_is_not_there_reads_as_the_defaults_and_its_folder_is_made(
    tmp_path: Path,
) -> None:
    file = a_file(tmp_path)
    assert file.read() == Counts()
    assert file.update(count("me")) == Counts({"me": 1})  # type: ignore[arg-type]
    assert a_file(tmp_path).read() == Counts({"me": 1})


def test_what_the_change_raises_changes_nothing(tmp_path: Path) -> None:
    file = a_file(tmp_path)
    file.update(count("me"))  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError):
        file.update(lambda state: Counts({"me": 1 // 0}))
    assert file.read() == Counts({"me": 1})


@pytest.mark.parametrize("spoiled", [b"", b"{", b"[]", b'{"by": 5}', b"\xff\xfe"])
def test_what_somebody_spoiled_is_named_and_not_overwritten(tmp_path: Path, spoiled: bytes) -> None:
    file = a_file(tmp_path)
    file.update(count("me"))  # type: ignore[arg-type]
    file.path.write_bytes(spoiled)
    with pytest.raises(ConfigError, match=r"state\.json.*mend the file or remove it"):
        file.read()
    with pytest.raises(ConfigError):
        file.update(count("me"))  # type: ignore[arg-type]
    assert file.path.read_bytes() == spoiled


def test_two_processes_that_update_at_once_lose_nothing(tmp_path: Path) -> None:
    processes = [counter(tmp_path, who, 100) for who in ("a", "b")]
    for process in processes:
        assert process.wait(LIMIT_S) == 0
    assert a_file(tmp_path).read().by == {"a": 100, "b": 100}


def test_a_process_killed_at_any_moment_leaves_a_whole_file_and_no_lock(tmp_path: Path) -> None:
    file = a_file(tmp_path)
    # large enough for a kill to fall into a write
    file.update(lambda state: Counts({}, "x" * 300_000))
    seen = 0
    for _ in range(8):
        process = counter(tmp_path, "victim", 1_000_000)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        before = file.read().by.get("victim", 0)
        while file.read().by.get("victim", 0) < before + 2:  # it is in the middle of it
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait(LIMIT_S)
        state = file.read()
        assert state.by["victim"] > seen and len(state.padding) == 300_000
        seen = state.by["victim"]
        assert file.update(count("survivor")).by["victim"] == seen  # type: ignore[arg-type]
    assert file.read().by["survivor"] == 8
    assert len(list(file.path.parent.iterdir())) <= 3, "what the dead left behind grows"


async def test_changes_of_anybody_are_seen_and_a_spoiled_file_is_passed_over(
    tmp_path: Path,
) -> None:
    file = a_file(tmp_path)
    changes = file.changes()
    async with asyncio.timeout(LIMIT_S):
        assert await anext(changes) == Counts()
        process = counter(tmp_path, "other", 1)
        assert (await anext(changes)).by == {"other": 1}
        assert process.wait(LIMIT_S) == 0
        file.path.write_bytes(b"{")
        waiting = asyncio.ensure_future(anext(changes))
        await asyncio.sleep(0)
        aside = file.path.with_name("mended")
        aside.write_text(json.dumps({"by": {"mended": 1}}))
        aside.rename(file.path)
        assert (await waiting).by == {"mended": 1}
    await changes.aclose()


async def test_a_file_that_cannot_be_opened_ends_nobody_who_follows_it(tmp_path: Path) -> None:
    file = a_file(tmp_path)
    file.path.mkdir(parents=True)
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        file.read()
    changes = file.changes()
    waiting = asyncio.ensure_future(anext(changes))
    await asyncio.sleep(0)
    file.path.rmdir()
    async with asyncio.timeout(LIMIT_S):
        assert await waiting == Counts()
    await changes.aclose()
