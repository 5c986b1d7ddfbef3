"""Shell. `python -m bench.steps`: load steps 1x -> 4x -> 1x -> 0 -> 1x on `loraplex serve` with
real processes. Says what became of the requests, when capacity came, and what it cost.

    python -m bench.steps                          # four simulated workers at most, five minutes
    python -m bench.steps --engine vllm            # 1 -> 2 -> 1 -> 0 -> 1 with the demo model

A step is a number of clients, each with one stream at a time. Every stream is read to its end: it
must have all its tokens. The schedule that the cost is compared with knows the load. It wants the
same number of requests per worker, and its workers take as long to start as ours did. But it starts
them so early that they serve when a step begins, and ends them the moment a step ends, without any
delay.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import uvloop

from bench import ROOT
from gateway.supervisor.background_server import BackgroundServer
from shared.config.settings_file import load_settings

TARGET = 2
"""Requests per worker; 1x is as many clients."""
LOOK_S = 0.05
"""Between two looks at the fleet; the supervisor decides every 0.1 s."""
LOOK_BACK_S, UP_S, DOWN_S = 1.5, 2.0, 4.0
MOST_RATIO = 1.15
START_S = 120.0
DEMO = ROOT / "examples/demo"
ADAPTERS = DEMO / "adapters"
"""The first client asks for the base model, each further one for an adapter of its own."""
TOKENS = {"sim": 100, "vllm": 200}
"""Of every stream: it takes about two seconds."""


@dataclass(frozen=True, slots=True)
class FleetLook:
    """The fleet at one moment. `present` are processes, those that leave too."""

    at_s: float
    wanted: int
    serving: int
    present: int


@dataclass(slots=True)
class StepRun:
    """What was seen. `begins_s` are the moments of the steps, and of the end."""

    looks: list[FleetLook] = field(default_factory=list)
    begins_s: list[float] = field(default_factory=list)
    ttfts_s: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def first_s(self, step: int, workers: int, what: str) -> float | None:
        """Seconds from a step's begin until so many workers are `wanted` or `serving`."""
        begin, end = self.begins_s[step : step + 2]
        found = (k for k in self.looks if begin <= k.at_s < end and getattr(k, what) == workers)
        look = next(found, None)
        return None if look is None else look.at_s - begin

    def worker_s(self) -> float:
        """Seconds of all worker processes together, from the first step to the end."""
        looks = [k for k in self.looks if k.at_s >= self.begins_s[0]]
        return sum(a.present * (b.at_s - a.at_s) for a, b in itertools.pairwise(looks))


def clairvoyant_s(needed: Sequence[int], begins_s: Sequence[float], start_s: float) -> float:
    """Seconds of all workers of the schedule that knows the load. The workers of the first step
    serve when it begins, as ours do; each later one also costs its start.
    """
    lengths = [b - a for a, b in itertools.pairwise(begins_s)]
    rises = sum(max(0, b - a) for a, b in itertools.pairwise(needed))
    return sum(n * s for n, s in zip(needed, lengths, strict=True)) + rises * start_s


class StepClients:
    """As many streams at a time as `wanted` says."""

    def __init__(
        self, http: aiohttp.ClientSession, url: str, names: Sequence[str], run: StepRun, tokens: int
    ) -> None:
        self._http, self._url, self._names, self._run = http, url, names, run
        self._body = {
            "prompt": "A step",
            "max_tokens": tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._wanted = 0

    def change(self, wanted: int) -> None:
        """Clients above the number end after their stream."""
        self._wanted = wanted
        for n in range(wanted):
            if n not in self._tasks or self._tasks[n].done():
                self._tasks[n] = asyncio.create_task(self._client(n))

    async def ended(self) -> None:
        await asyncio.gather(*self._tasks.values())

    async def _client(self, number: int) -> None:
        body = {**self._body, "model": self._names[number % len(self._names)]}
        while number < self._wanted:
            try:
                await self._stream(body)
            except (aiohttp.ClientError, TimeoutError) as exc:
                self._run.failures.append(repr(exc))

    async def _stream(self, body: dict[str, Any]) -> None:
        began, first_s, usage, last = time.monotonic(), None, b"", b""
        async with self._http.post(self._url, json=body) as answer:
            if answer.status != 200:
                self._run.failures.append(f"{answer.status}: {(await answer.text())[:200]}")
                return
            async for line in answer.content:
                if b'"text":' in line and first_s is None:
                    first_s = time.monotonic() - began
                if b'"completion_tokens":' in line:
                    usage = line
                last = line.strip() or last
        whole = b'"completion_tokens":%d' % body["max_tokens"] in usage.replace(b" ", b"")
        if last != b"data: [DONE]" or first_s is None or not whole:
            self._run.failures.append(f"cut: {usage!r} {last[:200]!r}")
            return
        self._run.ttfts_s.append(first_s)


async def _watch(http: aiohttp.ClientSession, url: str, model: str, run: StepRun) -> None:
    while True:
        async with http.get(url) as answer:
            told = (await answer.json())["models"][model]
        present = told["serving"] + told["starting"] + told["draining"]
        run.looks.append(FleetLook(time.monotonic(), told["wanted"], told["serving"], present))
        await asyncio.sleep(LOOK_S)


async def play(url: str, model: str, flags: argparse.Namespace) -> StepRun:
    """All steps, one after the other. `url` ends in /v1."""
    names = [model, *(f"{model}:{folder.name}" for folder in sorted(ADAPTERS.iterdir()))]
    run, root = StepRun(), url.removesuffix("/v1")
    timeout, connector = aiohttp.ClientTimeout(total=600), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as http:
        watch = asyncio.create_task(_watch(http, f"{root}/admin/autoscale", model, run))
        clients = StepClients(http, f"{url}/completions", names, run, TOKENS[flags.engine])
        for multiple in flags.steps:
            run.begins_s.append(time.monotonic())
            clients.change(multiple * TARGET)
            await asyncio.sleep(flags.step_s)
        run.begins_s.append(time.monotonic())
        clients.change(0)
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
        await clients.ended()
    return run


def _config(flags: argparse.Namespace, state: Path) -> tuple[str, dict[str, Any]]:
    """(model, config)."""
    scaling = {
        "min_replicas": 0,
        "initial_replicas": 1,
        "max_replicas": max(flags.steps),
        "target_ongoing_requests": TARGET,
        "upscale_delay_s": UP_S,
        "downscale_delay_s": DOWN_S,
        "look_back_period_s": LOOK_BACK_S,
        "metrics_interval_s": 0.5,
    }
    name = "sim" if flags.engine == "sim" else "demo"
    engine: dict[str, Any] = {"enable_lora": True, "max_loras": 4, "max_lora_rank": 16}
    if name == "sim":
        engine["sim"] = {"itl_ms": 20}
    else:
        engine |= {"dtype": "float32", "max_model_len": 1024, "enforce_eager": True}
        engine["kv_cache_memory_bytes"] = 64 << 20
    model = {
        "model_loading_config": {"model_id": name, "model_source": str(DEMO / "model")},
        "llm_engine": "sim" if name == "sim" else "vLLM",
        "engine_kwargs": engine,
        "lora_config": {"dynamic_lora_loading_path": str(ADAPTERS)},
        "deployment_config": {"autoscaling_config": scaling},
    }
    gateway = {"port": 0, "state_dir": str(state), "log_level": "error"}
    return name, {"llm_configs": [model], "gateway": gateway}


def report(run: StepRun, steps: Sequence[int]) -> Iterator[str]:
    """The tables of docs/SCALING.md, line by line."""
    yield "| step | wanted after | capacity after | so its start took |"
    yield "|---|---|---|---|"
    starts: list[float] = []
    for n, (before, now) in enumerate(itertools.pairwise(steps), 1):
        wanted, served = (run.first_s(n, now, what) for what in ("wanted", "serving"))
        start = None if wanted is None or served is None or now < before else served - wanted
        starts += [] if start is None else [start]
        yield f"| {before}x -> {now}x | {_s(wanted)} | {_s(served)} | {_s(start)} |"
    start_s = statistics.mean(starts) if starts else 0.0
    ours_s, known_s = run.worker_s(), clairvoyant_s(steps, run.begins_s, start_s)
    p99 = sorted(run.ttfts_s)[math.ceil(0.99 * len(run.ttfts_s)) - 1] if run.ttfts_s else math.inf
    yield ""
    yield (
        f"{len(run.ttfts_s)} whole streams, {len(run.failures)} failed or cut; first token: median "
        f"{1e3 * statistics.median(run.ttfts_s or [math.inf]):.0f} ms, p99 {p99:.1f} s"
    )
    yield (
        f"worker seconds {ours_s:.0f}, of the schedule that knows the load {known_s:.0f}: "
        f"{ours_s / known_s:.3f}"
    )


def passes(run: StepRun, steps: Sequence[int]) -> bool:
    """Every step had its capacity before it ended, nothing failed, and the cost is within
    MOST_RATIO, even beside a schedule whose workers start at once.
    """
    served = all(run.first_s(n, now, "serving") is not None for n, now in enumerate(steps))
    return (
        served
        and not run.failures
        and run.worker_s() <= MOST_RATIO * clairvoyant_s(steps, run.begins_s, 0.0)
    )


def _s(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.1f} s"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.steps")
    parser.add_argument("--engine", choices=["sim", "vllm"], default="sim")
    parser.add_argument("--steps", help="multiples of the load, by default 1,4,1,0,1")
    parser.add_argument("--step-s", type=float, default=60.0, help="how long each lasts")
    flags = parser.parse_args()
    steps = flags.steps or ("1,4,1,0,1" if flags.engine == "sim" else "1,2,1,0,1")
    flags.steps = [int(n) for n in steps.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        model, config = _config(flags, Path(folder) / "state")
        path = Path(folder) / "config.yaml"
        path.write_text(json.dumps(config))  # JSON is YAML
        with BackgroundServer.start(load_settings(str(path))) as server:
            run = uvloop.run(play(server.url, model, flags))
    for line in report(run, flags.steps):
        print(line)
    for failure in run.failures[:10]:
        print(failure, file=sys.stderr)
    return 0 if passes(run, flags.steps) else 1


if __name__ == "__main__":
    raise SystemExit(main())
