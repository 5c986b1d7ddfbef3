"""Shell. The process that test_disk_cache_kill.py kills. In each round it forks a child that
fetches, verifies and swaps adapters until it dies.

    python cache_victim.py CACHE STORE BUDGET_BYTES

It reads one line with a seed from stdin per round, and answers with the child's pid once the child
is at work. It forks, because importing takes a hundred times as long as a round.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import sys
import threading
import traceback
from pathlib import Path

from shared.adapters.checks import AdapterFacts
from shared.adapters.identity import AdapterRef
from shared.errors import AdapterNotFound, StoreUnavailable
from shared.stores import transfer
from shared.stores.local import LocalStore
from tests.unit.worker.disk.whole_check import WholeCheck
from worker.disk.cache import DiskCache

NAMES = ("a", "b", "c", "team/d")
PART_BYTES = 32 * 1024
MAX_PARTS = 12
WEIGHTS = "adapter_model.safetensors"
BAD = 42
"""Exit status of a child that was served corrupt data."""


def weights(name: str, rng: random.Random) -> bytes:
    """Bytes that prove themselves: a hash of the name and the rest, and then the rest."""
    rest = rng.randbytes(rng.randrange(1, MAX_PARTS * PART_BYTES))
    return hashlib.sha256(name.encode() + rest).digest() + rest


def proves_itself(name: str, folder: Path) -> bool:
    data = (folder / WEIGHTS).read_bytes()
    return (
        hashlib.sha256(name.encode() + data[32:]).digest() == data[:32]
        and (folder / "adapter_config.json").read_bytes() == b"{}"
    )


def _check(folder: Path) -> AdapterFacts:
    return AdapterFacts(8, 0, ())


check = WholeCheck(_check)


def publish(store: Path, name: str, rng: random.Random) -> None:
    folder = store / name
    folder.mkdir(parents=True, exist_ok=True)
    for file, data in (("adapter_config.json", b"{}"), (WEIGHTS, weights(name, rng))):
        aside = store / f".{os.getpid()}-{threading.get_ident()}"
        aside.write_bytes(data)
        aside.rename(folder / file)


async def work(
    cache: DiskCache,
    store: LocalStore,
    folder: Path,
    rng: random.Random,
    using: dict[int, AdapterRef],
    task: int,
) -> None:
    """One of several tasks. It takes an adapter and uses it. Now and then it lets it go, or puts a
    new version into the store.
    """
    while True:
        name = rng.choice(NAMES)
        if rng.random() < 0.3:
            await asyncio.to_thread(publish, folder, name, rng)
        stored = await store.find(name)
        if stored is None:
            continue
        using[task] = ref = AdapterRef("base", name, stored.digest)
        try:
            cached = await cache.fetch(ref, stored, store, check)
        except (AdapterNotFound, StoreUnavailable):
            # the version has changed meanwhile, or all adapters that would have to leave are in use
            del using[task]
            cache.keep(using.values())
            continue
        if not await asyncio.to_thread(proves_itself, name, cached.folder):
            os._exit(BAD)
        cache.keep(using.values())


async def live(root: Path, folder: Path, budget_bytes: int, seed: int) -> None:
    rng = random.Random(seed)
    cache, store = DiskCache(root, budget_bytes), LocalStore(str(folder))
    print(os.getpid(), flush=True)
    async with asyncio.TaskGroup() as group:
        using: dict[int, AdapterRef] = {}
        for task in range(3):
            group.create_task(work(cache, store, folder, random.Random(rng.random()), using, task))


def main() -> None:
    root, folder, budget_bytes = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    transfer.PART_BYTES = PART_BYTES
    for line in sys.stdin:
        if os.fork() == 0:
            try:
                asyncio.run(live(root, folder, budget_bytes, int(line)))
            except BaseException:
                traceback.print_exc()
                raise
            finally:
                os._exit(1)
        _, status = os.wait()
        print(f"ended {os.waitstatus_to_exitcode(status)}", flush=True)


if __name__ == "__main__":
    main()
