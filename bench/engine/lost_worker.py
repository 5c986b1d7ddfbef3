"""Shell. `python -m bench.engine.lost_worker`: two workers on one GPU, one killed under load.

    python -m bench.engine.lost_worker --out results              the shape of Llama-3.1-8B
    python -m bench.engine.lost_worker --shape tiny --streams 8   tries this program out on a CPU

`loraplex serve` runs two workers, each with less than half of the GPU. Streams over 16 adapters run
while the worker is killed with SIGKILL. Every answer is read to its end and counted. Printed: what
became of the answers, when the loss was noticed, how long streams stood still, and when the worker
served again, with the stages of its boot from the engine's log.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import uvloop

from bench import ROOT
from bench.engine.gpu_servers import (
    SHAPES,
    engine_arguments,
    gpu,
    make_adapters,
    make_model,
    shared_gpu,
)
from bench.process import Process, free_ports, tree

ADAPTERS, SLOTS = 16, 16
TOKENS = 400
WORKERS = 2
LOOK_S = 0.05
BOOT_S = 480.0
BACK_S = 300.0
BEFORE_S, AFTER_S = 6.0, 12.0
"""Of load before the kill and after it."""
MOVED = b": continued"
STAGES = re.compile(
    r"(Loading weights took|Model loading took|torch\.compile took|Compiling a graph|"
    r"Directly load|Graph capturing finished|init engine|Initializing a V1 LLM engine|"
    r"GPU KV cache size|serving|starting|Available KV cache)",
)


@dataclass
class AnswersSeen:
    """What became of the answers. Times in seconds since the kill."""

    ended: Counter[str] = field(default_factory=Counter)
    moved: int = 0
    gaps_s: list[float] = field(default_factory=list)
    first_moved_s: float | None = None
    examples: list[str] = field(default_factory=list)


@dataclass
class Load:
    """Streams one after the other, `streams` at a time, until `stop`."""

    url: str
    streams: int
    seen: AnswersSeen = field(default_factory=AnswersSeen)
    killed_at: float = float("inf")
    stopping: bool = False

    async def run(self, http: aiohttp.ClientSession) -> None:
        await asyncio.gather(*(self._lane(http, n) for n in range(self.streams)))

    async def _lane(self, http: aiohttp.ClientSession, number: int) -> None:
        turn = number
        while not self.stopping:
            body = {
                "model": f"m:a{turn % ADAPTERS:03d}",
                "prompt": f"the {number} " * 32,
                "max_tokens": TOKENS,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            outcome = await self._stream(http, body)
            self.seen.ended[outcome] += 1
            if outcome != "whole" and len(self.seen.examples) < 5:
                self.seen.examples.append(outcome)
            turn += self.streams

    async def _stream(self, http: aiohttp.ClientSession, body: dict[str, Any]) -> str:
        moved = False
        last = time.monotonic()
        usage = done = 0
        try:
            async with http.post(self.url + "/v1/completions", json=body) as answer:
                if answer.status != 200:
                    return f"status {answer.status}: {(await answer.text())[:120]}"
                async for line in answer.content:
                    now = time.monotonic()
                    if line.startswith(MOVED):
                        moved = True
                        since = now - self.killed_at
                        self.seen.first_moved_s = min(self.seen.first_moved_s or since, since)
                    if not line.startswith(b"data: "):
                        continue
                    if last <= self.killed_at + 1.0 and now >= self.killed_at:
                        self.seen.gaps_s.append(now - last)
                    last = now
                    if line.startswith(b"data: [DONE]"):
                        done += 1
                        continue
                    event = json.loads(line[6:])
                    if "error" in event:
                        return f"error: {event['error']['message'][:120]}"
                    usage = (event.get("usage") or {}).get("completion_tokens", usage)
        except (aiohttp.ClientError, TimeoutError) as exc:
            return f"cut: {exc!r}"[:120]
        finally:
            self.seen.moved += moved
        return "whole" if (done, usage) == (1, TOKENS) else f"{done} ends, {usage} tokens"


def _config(work: Path, shape: str, memory: int, port: int, graphs: Sequence[int]) -> Path:
    arguments = engine_arguments(shape, SLOTS, defaults=False)
    arguments |= shared_gpu(memory, None)
    if graphs:
        arguments["cudagraph_capture_sizes"] = list(graphs)
    config = {
        "llm_configs": [
            {
                "model_loading_config": {
                    "model_id": "m",
                    "model_source": str(make_model(work / "model", shape)),
                },
                "lora_config": {
                    "dynamic_lora_loading_path": str(
                        make_adapters(work / "adapters", ADAPTERS, shape, cold=0)
                    ),
                    "max_num_adapters_per_replica": SLOTS,
                },
                "engine_kwargs": arguments,
                "deployment_config": {"num_replicas": WORKERS},
            }
        ],
        "gateway": {"port": port, "state_dir": str(work / "state")},
    }
    path = work / "loraplex.yaml"
    path.write_text(json.dumps(config))
    return path


@contextlib.asynccontextmanager
async def _served(
    work: Path, shape: str, memory: int, graphs: Sequence[int]
) -> AsyncIterator[tuple[Process, str]]:
    port = free_ports(1)[0]
    # two names of one device: `serve` gives each worker a GPU of its own
    env = {"CUDA_VISIBLE_DEVICES": "0,00", "VLLM_LOGGING_LEVEL": "INFO"} if memory else {}
    argv = [sys.executable, "-m", "loraplex", "serve"]
    argv += [str(_config(work, shape, memory, port, graphs))]
    process = Process(argv, work / "serve.log", env, ROOT)
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.stop()


async def _serving(http: aiohttp.ClientSession, url: str) -> int:
    with contextlib.suppress(aiohttp.ClientError, TimeoutError, KeyError, ValueError):
        async with http.get(url + "/ready", timeout=aiohttp.ClientTimeout(2)) as answer:
            return int((await answer.json())["workers"]["m"])
    return 0


async def _until(
    http: aiohttp.ClientSession, url: str, process: Process, workers: int, within_s: float
) -> float:
    """Seconds until so many workers serve. Raises SystemExit."""
    started = time.monotonic()
    say_at = 30.0
    while await _serving(http, url) < workers:
        after = time.monotonic() - started
        if not process.running or after > within_s:
            raise SystemExit(f"{workers} workers do not serve: {process.last_words()[-3000:]}")
        if after > say_at:
            say_at += 30.0
            print(f"  waiting {after:.0f} s", flush=True)
        await asyncio.sleep(LOOK_S)
    return time.monotonic() - started


async def measure(
    work: Path, shape: str, streams: int, kills: Sequence[str], graphs: Sequence[int]
) -> dict[str, Any]:
    name, memory = gpu()
    facts: dict[str, Any] = {"gpu": name or "none", "shape": shape, "streams": streams}
    async with (
        _served(work, shape, memory, graphs) as (process, url),
        aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
        ) as http,
    ):
        facts["boot_s"] = await _until(http, url, process, WORKERS, BOOT_S)
        print(f"both serve after {facts['boot_s']:.0f} s", flush=True)
        facts["kills"] = []
        for kind in kills:
            row = await _one_kill(http, url, process, streams, kind)
            facts["kills"].append(row)
            print(json.dumps(row), flush=True)
    return facts


async def _one_kill(
    http: aiohttp.ClientSession, url: str, process: Process, streams: int, kind: str
) -> dict[str, Any]:
    load = Load(url, streams)
    running = asyncio.create_task(load.run(http))
    await asyncio.sleep(BEFORE_S)
    victim = _victim(process, kind)
    load.killed_at = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    noticed_s = await _until_fewer(http, url)
    stop = asyncio.get_running_loop().call_later(AFTER_S, setattr, load, "stopping", True)
    back_s = await _until(http, url, process, WORKERS, BACK_S)
    stop.cancel()
    load.stopping = True
    await running
    seen = load.seen
    return {
        "killed": kind,
        "answers": dict(seen.ended),
        "moved": seen.moved,
        "noticed_s": round(noticed_s, 2),
        "first_moved_s": round(seen.first_moved_s or 0.0, 2),
        "longest_gap_s": round(max(seen.gaps_s, default=0.0), 2),
        "serves_again_s": round(noticed_s + back_s, 1),
        "examples": seen.examples,
    }


def _victim(process: Process, kind: str) -> int:
    """The first worker, or its engine's process."""
    family = tree(process.pid)
    workers = [pid for pid in family if b"--worker" in _command(pid)]
    # those that the zygote forked have its command line, and it comes first
    worker = (workers or [pid for pid in family if b"zygote" in _command(pid)][1:])[0]
    if kind == "worker":
        return worker
    return next(pid for pid in tree(worker)[1:] if b"EngineCore" in _command(pid))


def _command(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


async def _until_fewer(http: aiohttp.ClientSession, url: str) -> float:
    started = time.monotonic()
    # another process changes it
    until = started + 60
    while await _serving(http, url) >= WORKERS and time.monotonic() < until:  # noqa: ASYNC110
        await asyncio.sleep(LOOK_S / 5)
    return time.monotonic() - started


def _stages(log: Path) -> list[str]:
    return [line[:220] for line in log.read_text().splitlines() if STAGES.search(line)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.engine.lost_worker")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument(
        "--kill", default="worker,engine", help="one after the other: worker, engine"
    )
    parser.add_argument("--graphs", help="batch sizes to capture, with commas (default: vLLM's)")
    parser.add_argument("--work", type=Path, help="keep logs and model here")
    parser.add_argument("--out", type=Path)
    flags = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="lost-", ignore_cleanup_errors=True) as folder:
        work = flags.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        graphs = [int(size) for size in flags.graphs.split(",")] if flags.graphs else []
        try:
            facts = uvloop.run(
                measure(work, flags.shape, flags.streams, flags.kill.split(","), graphs)
            )
        finally:
            log = work / "serve.log"
            if flags.out is not None and log.exists():
                flags.out.mkdir(parents=True, exist_ok=True)
                (flags.out / "serve.log").write_bytes(log.read_bytes()[-4_000_000:])
        facts["stages"] = _stages(log)
        print("\n".join(facts["stages"][-80:]))
        if flags.out is not None:
            (flags.out / "lost_worker.json").write_text(json.dumps(facts, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
