"""Shell. kill -9 at random moments of downloads, evictions and changes of version. Nothing corrupt
is ever served, and nothing is left behind.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from shared.adapters.identity import AdapterRef
from shared.stores import transfer as transfer_module
from shared.stores.local import LocalStore
from tests.fault.adapters import cache_victim as victim
from tests.harness import ROOT
from worker.disk import layout as disk_layout
from worker.disk.cache import DiskCache

ROUNDS = 100
MAX_ROUNDS = 3 * ROUNDS
"""Where the kills have hit too little, because the machine was busy."""
# less than all adapters, so that there are evictions
BUDGET_BYTES = 3 * victim.MAX_PARTS * victim.PART_BYTES
LONGEST_LIFE_S = 0.08
LONGER = 1.1
"""Children live longer after one that got nothing done: on a busy machine they do little at first.
"""


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer_module, "PART_BYTES", victim.PART_BYTES)


@asynccontextmanager
async def victims(root: Path, store: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(
            sys.executable,
            "-m",
            "tests.fault.adapters.cache_victim",
            str(root),
            str(store),
            str(BUDGET_BYTES),
        ),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )
    try:
        yield process
    finally:
        process.kill()
        await process.wait()


async def answer(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(30):
        return (await process.stdout.readline()).decode().strip()


async def live_and_die(process: asyncio.subprocess.Process, seed: int, life_s: float) -> int:
    """Runs one child and kills it after this time of its work. Returns its exit status."""
    assert process.stdin is not None
    process.stdin.write(f"{seed}\n".encode())
    pid = int(await answer(process))
    await asyncio.sleep(life_s)  # the random moment is the subject of the test
    os.kill(pid, signal.SIGKILL)
    return int((await answer(process)).removeprefix("ended "))


async def entries_are_whole(root: Path) -> int:
    """Opens every entry that the dead children left, as a new process would. Returns how many there
    were.
    """
    cache = DiskCache(root, BUDGET_BYTES)
    keys = [key for key, _ in disk_layout.keys_in(root / "entries")]
    for key in keys:
        manifest = disk_layout.read_manifest(root / "entries" / key)
        assert manifest is not None, "an entry without a manifest became visible"
        cached = await cache.open(manifest.ref, victim.check)
        assert cached is not None, "an entry became visible before it was whole"
        assert victim.proves_itself(manifest.ref.name, cached.folder)
    cache.close()
    return len(keys)


async def test_after_a_kill_at_any_moment_only_whole_entries_are_served(tmp_path: Path) -> None:
    root, store, rng = tmp_path / "cache", tmp_path / "store", random.Random(7)
    for name in victim.NAMES:
        victim.publish(store, name, rng)
    DiskCache(root, BUDGET_BYTES).close()
    seen, halves, life_s = 0, 0, LONGEST_LIFE_S
    async with victims(root, store) as process:
        for round_number in range(MAX_ROUNDS):
            if round_number >= ROUNDS and seen > ROUNDS and halves:
                break
            status = await live_and_die(process, round_number, rng.uniform(0, life_s))
            assert status == -signal.SIGKILL, (
                f"the child ended with {status} by itself (42: it was served something corrupt)"
            )
            halves += sum(1 for _ in (root / "partial").iterdir())
            found = await entries_are_whole(root)
            seen += found
            if not found:
                life_s *= LONGER
    assert seen > ROUNDS and halves > 0, "the kills hit nothing worth killing"
    await everything_works_again(root, store)


async def everything_works_again(root: Path, store_folder: Path) -> None:
    cache, store = DiskCache(root, BUDGET_BYTES), LocalStore(str(store_folder))
    for name in victim.NAMES:
        stored = await store.find(name)
        assert stored is not None
        cached = await cache.fetch(
            AdapterRef("base", name, stored.digest), stored, store, victim.check
        )
        assert victim.proves_itself(name, cached.folder)
        cache.keep(())
    assert cache._cache_folder.used_bytes() <= BUDGET_BYTES
    assert list((root / "trash").iterdir()) == []
    cache.close()
