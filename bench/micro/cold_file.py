"""Shell. `python -m bench.micro.cold_file [--dtype F16] [--busy 1.5]`: what it costs to bring an
adapter of 26 MiB from a folder to the disk cache, without an engine.

The adapter has rank 16 on q, k, v and o of an 8B model. The table has CPU and wall ms, median and
least of the rounds: all of a fetch, its phases, and each of its parts alone in one thread. On a
shared machine the CPU times count. `--busy`: of each 5 ms the loop works for so many, as that of a
worker does which streams.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from shared.adapters.checks import AdapterLimits
from shared.adapters.identity import CONFIG_FILE, WEIGHTS_FILE, AdapterRef
from shared.adapters.safetensors import VALUE_BYTES
from shared.stores.local import LocalStore
from worker.disk.cache import DiskCache
from worker.validation.validator import Validator
from worker.validation.values import read_header

LAYERS, RANK, HIDDEN = 32, 16, 4096
OUTPUTS = {"q_proj": 4096, "k_proj": 1024, "v_proj": 1024, "o_proj": 4096}
READ_BYTES = 1 << 20
STEP_S = 0.005  # of an engine with an 8B model
PAUSE_S = 0.5  # the disk writes the adapter before, which is no part of a fetch
VALUES = {"BF16": "<u2", "F16": "<f2", "F32": "<f4"}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.micro.cold_file")
    parser.add_argument("--dtype", choices=VALUES, default="BF16")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--busy", type=float, default=0.0, metavar="MS")
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's own")
    flags = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=flags.folder) as made:
        folder = Path(made)
        write_adapter(folder / "store" / "a", flags.dtype)
        print("| what | CPU ms, median and least | wall ms, median and least |\n|---|---|---|")
        asyncio.run(_fetches(folder, flags.rounds, flags.busy / 1e3))
        _parts(folder, flags.rounds)
    return 0


def write_adapter(folder: Path, dtype: str) -> None:
    folder.mkdir(parents=True)
    rng, header, values, at = np.random.default_rng(0), {}, list[bytes](), 0
    for layer in range(LAYERS):
        for module, outputs in OUTPUTS.items():
            for half, shape in (("A", [RANK, HIDDEN]), ("B", [outputs, RANK])):
                numbers = rng.normal(0, 0.01, shape).astype("<f4")
                raw = (
                    (numbers.view("<u4") >> 16).astype("<u2")
                    if dtype == "BF16"
                    else numbers.astype(VALUES[dtype])
                ).tobytes()
                name = f"base_model.model.model.layers.{layer}.self_attn.{module}.lora_{half}"
                offsets = [at, at := at + numbers.size * VALUE_BYTES[dtype]]
                header[f"{name}.weight"] = {
                    "dtype": dtype,
                    "shape": shape,
                    "data_offsets": offsets,
                }
                values.append(raw)
    text = json.dumps(header).encode()
    (folder / WEIGHTS_FILE).write_bytes(len(text).to_bytes(8, "little") + text + b"".join(values))
    config = {"r": RANK, "lora_alpha": RANK, "target_modules": list(OUTPUTS)}
    (folder / CONFIG_FILE).write_text(json.dumps(config))


async def _work(busy_s: float) -> None:
    while True:
        until = time.perf_counter() + busy_s
        while time.perf_counter() < until:
            pass
        await asyncio.sleep(STEP_S - busy_s)


async def _fetches(folder: Path, rounds: int, busy_s: float) -> None:
    work = asyncio.create_task(_work(busy_s), name="busy loop") if busy_s else None
    store, check = LocalStore(str(folder / "store")), Validator(None, RANK)
    cache = DiskCache(folder / "cache", 0)
    stored = await store.find("a")
    assert stored is not None
    cpu, wall = list[float](), list[float]()
    phases: dict[str, list[float]] = {}
    for number in range(rounds):
        ref = AdapterRef("base", f"a{number}", stored.digest)
        await asyncio.sleep(PAUSE_S)
        cpu_began, began = time.process_time(), time.perf_counter()
        cached = await cache.fetch(ref, stored, store, check)
        wall.append(time.perf_counter() - began)
        cpu.append(time.process_time() - cpu_began)
        for phase, took_s in asdict(cached.times).items():
            phases.setdefault(phase.removesuffix("_s"), []).append(took_s)
    _row("a fetch", [] if busy_s else cpu, wall)
    for phase, took in phases.items():
        _row(f"its phase {phase}", [], took)
    if work is not None:
        work.cancel()
    cache.close()


def _parts(folder: Path, rounds: int) -> None:
    path = folder / "store" / "a" / WEIGHTS_FILE
    raw, limits, check = memoryview(path.read_bytes()), AdapterLimits(), Validator(None, RANK).check
    pieces = [raw[at : at + READ_BYTES] for at in range(0, len(raw), READ_BYTES)]
    copies = (folder / f"copy-{number}" for number in range(rounds))

    def read() -> None:
        with path.open("rb", buffering=0) as f:
            while f.read(READ_BYTES):
                pass

    def digest() -> None:
        sha256 = hashlib.sha256()
        for piece in pieces:
            sha256.update(piece)

    def write() -> None:
        with next(copies).open("wb", buffering=0) as f:
            for piece in pieces:
                f.write(piece)

    parts: dict[str, Callable[[], object]] = {
        "read from the page cache": read,
        "sha256": digest,
        "write to the page cache": write,
        "header of a known recipe": lambda: read_header(path, limits),
        "look at all values": lambda: read_header(path, limits).look(0, len(raw)),
        "check of all": lambda: check(path.parent),
    }
    for name, part in parts.items():
        cpu, wall = list[float](), list[float]()
        for _ in range(rounds):
            cpu_began, began = time.thread_time(), time.perf_counter()
            part()
            wall.append(time.perf_counter() - began)
            cpu.append(time.thread_time() - cpu_began)
        _row(name, cpu, wall)


def _row(name: str, *columns: list[float]) -> None:
    shown = (
        f"{statistics.median(column) * 1e3:.1f}, {min(column) * 1e3:.1f}" if column else ""
        for column in columns
    )
    print(f"| {name} | {' | '.join(shown)} |")


if __name__ == "__main__":
    sys.exit(main())
