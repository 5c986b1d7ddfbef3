"""Shell. `python -m bench.micro.peers`: what it costs to get an adapter from another host's worker,
beside getting it from S3 (moto's server).

Rounds take turns. The giver is a process of its own whose event loop notes how late it is woken
meanwhile: what its streams would feel. CPU is that of giver and asker together (moto's own is not
counted), per GiB.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import uvloop

from bench.engine.bucket import CREDENTIALS, LocalBucket, open_bucket
from bench.process import usage
from shared.adapters.checks import AdapterFacts
from shared.adapters.identity import AdapterRef, StoredAdapter
from shared.link.sockets import open_context
from shared.stores import AdapterStore, open_store
from shared.stores.transfer import FilePart, TransferRetries
from worker.disk.cache import DiskCache
from worker.peers.client import Peers
from worker.peers.server import open_peer_server

SECRET = "the secret of this benchmark"
TICK_S = 0.001
MIB, GIB = 1 << 20, 1 << 30
PACE = TransferRetries(30.0, 1)


class NoCheck:
    """Validation costs the same wherever the bytes came from."""

    rules = ""

    def begin(self, folder: Path) -> NoCheck:
        return self

    def look(self, part: FilePart) -> None: ...

    def facts(self) -> AdapterFacts:
        return AdapterFacts(8, 0, ())


async def give(root: Path, bucket: LocalBucket) -> None:
    """The giver: fetches the adapter from the store, serves it, and answers each line on stdin with
    the lateness of its loop since the last.
    """
    cache, late = DiskCache(root, 0, PACE), list[float]()
    context = open_context()
    async with open_store(bucket.url, bucket.options) as store:
        await cache.fetch(*await look_up(store), store, NoCheck())
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(lines), sys.stdin
    )
    async with open_peer_server(
        context,
        "tcp://127.0.0.1:0",
        cache,
        secret=SECRET,
        insecure=False,
        named=None,
        gateway="ipc://",
    ) as where:
        watching = asyncio.create_task(watch(late), name="watch")
        print(where, flush=True)
        while await lines.readline():
            late.append(0.0)
            late.sort()
            print(
                json.dumps(
                    [1e3 * late[int(len(late) * share)] for share in (0.5, 0.99)] + [1e3 * late[-1]]
                ),
                flush=True,
            )
            late.clear()
        watching.cancel()


async def watch(late: list[float]) -> None:
    while True:
        began = time.perf_counter()
        await asyncio.sleep(TICK_S)
        late.append(time.perf_counter() - began - TICK_S)


async def look_up(store: AdapterStore) -> tuple[AdapterRef, StoredAdapter]:
    stored = await store.find("a")
    assert stored is not None
    return AdapterRef("base", "a", stored.digest), stored


async def measure(size_bytes: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory(prefix="bench-peers-") as name:
        folder = Path(name)
        async with open_bucket(folder) as bucket, open_store(bucket.url, bucket.options) as store:
            await asyncio.to_thread(
                bucket.put,
                {
                    "a/adapter_config.json": b"{}",
                    "a/adapter_model.safetensors": os.urandom(size_bytes),
                },
            )
            argv = ["-m", "bench.micro.peers", "--give", str(folder / "giver"), bucket.endpoint]
            giver = await asyncio.create_subprocess_exec(
                sys.executable, *argv, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
            )
            try:
                await compare(folder, store, giver, size_bytes, rounds)
            finally:
                giver.kill()
                await giver.wait()


async def compare(
    folder: Path,
    store: AdapterStore,
    giver: asyncio.subprocess.Process,
    size_bytes: int,
    rounds: int,
) -> None:
    assert giver.stdin is not None and giver.stdout is not None
    endpoint = (await giver.stdout.readline()).decode().strip()
    context = open_context()
    peers = Peers(context, "asker", 1, SECRET, PACE)
    seen: dict[str, list[tuple[float, float, list[float]]]] = {"peer": [], "S3": []}
    for _ in range(rounds):
        for kind, rows in seen.items():
            giver.stdin.write(b"\n")
            await giver.stdout.readline()
            cpu_s = time.process_time() + usage(giver.pid).scheduled_s
            root = folder / "asker"
            cache, (ref, stored) = DiskCache(root, 0, PACE), await look_up(store)
            cached = await cache.fetch(
                ref,
                stored,
                store,
                NoCheck(),
                peers.sources(ref, [endpoint]) if kind == "peer" else (),
            )
            took_s = cached.times.peer_s or cached.times.download_s
            assert bool(cached.peer_bytes) == (kind == "peer"), (
                "the bytes did not come from where they should"
            )
            spent_s = time.process_time() + usage(giver.pid).scheduled_s - cpu_s
            giver.stdin.write(b"\n")
            late_ms = json.loads(await giver.stdout.readline())
            rows.append((size_bytes / MIB / took_s, spent_s / size_bytes * GIB, late_ms))
            cache.close()
            shutil.rmtree(root)
    peers.close()
    context.term()
    print(f"{size_bytes / MIB:.0f} MiB, {rounds} interleaved rounds, medians (least to most)\n")
    print(
        "| from | MiB/s | CPU s per GiB | giver's loop late ms: p50 | p99 | most "
        "|\n|---|---|---|---|---|---|"
    )
    for kind, rows in seen.items():
        speed, cpu = [row[0] for row in rows], [row[1] for row in rows]
        p50, p99, latest = (statistics.median(row[2][n] for row in rows) for n in range(3))
        print(
            f"| {kind} | {statistics.median(speed):,.0f} ({min(speed):,.0f} to {max(speed):,.0f}) "
            f"| {statistics.median(cpu):.2f} ({min(cpu):.2f} to {max(cpu):.2f}) | "
            f"{p50:.2f} | {p99:.2f} | {latest:.1f} |"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.micro.peers", description="An adapter from a peer and from S3."
    )
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--give", nargs=2, metavar=("ROOT", "STORE"), help=argparse.SUPPRESS)
    flags = parser.parse_args(arguments)
    os.environ.update(CREDENTIALS)
    if flags.give:
        uvloop.run(give(Path(flags.give[0]), LocalBucket("bench", flags.give[1])))
    else:
        uvloop.run(measure(flags.mib * MIB, flags.rounds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
