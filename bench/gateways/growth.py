"""Shell. `python -m bench.gateways.growth`: how the gateway's cost grows with streams, workers,
known adapters and gateway processes.

    python -m bench.gateways.growth [--parts streams,workers,adapters,processes] [--quick]

Each part is a row of runs of this project alone, against mock workers, and a plot in bench/results.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import os
import struct
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import aiohttp
import msgspec
import uvloop

from bench.gateways.__main__ import one_peer
from bench.gateways.peers.loraplex import Loraplex
from bench.gateways.peers.peer import Running
from bench.load.__main__ import measure, raise_open_files_limit
from bench.load.options import parse
from bench.load.report import document
from bench.process import ProcessUsage, spent_s
from bench.provenance import RESULTS, commit

GrowthRow: TypeAlias = dict[str, Any]

STREAMS = (1, 4, 16, 64, 256, 1_000, 2_000, 4_000)
WORKERS = (1, 10, 50, 100, 200)
ADAPTERS = (10, 100, 1_000, 10_000, 100_000)
PROCESSES = (1, 2, 3, 4)
MOST_TOKENS_PER_S = 20_000  # more than that, two cores that also hold the load generator cannot do
FASTEST_PACE_MS = 20
TOKENS = 50  # of every stream: each token carries a fiftieth of what its request cost
HOT_ADAPTERS = 16
IDLE_S = 3.0
MODELS_ASKED = 200
LOOK_AGAIN_S = 0.5
RANK, WIDTH = 8, 16


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gateways.growth")
    parser.add_argument("--parts", default=",".join(PARTS), help="default %(default)s")
    parser.add_argument(
        "--quick", action="store_true", help="the two smallest of each: does everything work?"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        metavar="DIR",
        help="default bench/results, none with --quick",
    )
    flags = parser.parse_args(arguments)
    raise_open_files_limit()
    out: Path | None = flags.out or (None if flags.quick else RESULTS)
    for name in flags.parts.split(","):
        levels, one, axes = PARTS[name]
        rows = uvloop.run(_rows(name, levels[:2] if flags.quick else levels, one))
        text = _table(rows)
        print(f"{name}\n\n{text}\n")
        if out is not None:
            _write(out, name, rows, text, axes, sys.argv[1:] if arguments is None else arguments)
    return 0


async def _rows(
    name: str, levels: Sequence[int], one: Callable[[int], Awaitable[GrowthRow]]
) -> list[GrowthRow]:
    rows = []
    for level in levels:
        rows.append({name: level, **await one(level)})
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


# ---- the parts -----------------------------------------------------------------------------------


async def with_streams(streams: int) -> GrowthRow:
    """So many streams at once, as fast as two cores allow."""
    async with one_peer(Loraplex()) as (running, _):
        pace_ms = max(FASTEST_PACE_MS, streams * 1_000 // MOST_TOKENS_PER_S)
        return {"pace_ms": pace_ms, **await _streams(running, streams, TOKENS, pace_ms)}


async def with_workers(workers: int) -> GrowthRow:
    """So many workers, each with its heartbeats ten times a second."""
    async with one_peer(Loraplex(workers=workers)) as (running, _):
        return {
            **await _idle(running),
            **await _whole_answers(running),
            **await _streams(running, 256, TOKENS, FASTEST_PACE_MS),
        }


async def with_adapters(adapters: int) -> GrowthRow:
    """The store has so many adapters. Requests go to a few of them."""
    with tempfile.TemporaryDirectory(prefix="bench-adapters-") as folder:
        await asyncio.to_thread(write_adapters, Path(folder), adapters)
        async with one_peer(Loraplex(adapters=Path(folder))) as (running, _):
            hot = ",".join(
                adapter_name(i * adapters // min(HOT_ADAPTERS, adapters))
                for i in range(min(HOT_ADAPTERS, adapters))
            )
            to_adapters = [f"--adapters={hot}", "--mix=uniform"]
            await _load(
                running,
                ["--requests=64", "--concurrency=4", "--output-tokens=2", *to_adapters],
                stream=True,
                pace_ms=0,
            )
            models = await _models(running, adapters)
            return {**await _idle(running), **await _whole_answers(running, to_adapters), **models}


async def with_processes(processes: int) -> GrowthRow:
    """So many gateway processes behind one port."""
    async with one_peer(Loraplex(processes=processes)) as (running, _):
        return {
            **await _whole_answers(running),
            **await _streams(running, 256, TOKENS, FASTEST_PACE_MS),
        }


# ---- what is measured ----------------------------------------------------------------------------


async def _streams(running: Running, streams: int, tokens: int, pace_ms: int) -> GrowthRow:
    flags = [
        f"--concurrency={streams}",
        f"--requests={streams if streams >= 1_000 else 2 * streams}",
        f"--output-tokens={tokens}",
    ]
    made, cpu_s = await _load(running, flags, stream=True, pace_ms=pace_ms)
    sent = made["throughput"]["output_tokens"]
    return {
        "us_per_token": round(cpu_s / sent * 1e6, 2) if sent else None,
        "ttft_p50_ms": round(made["ttft"]["p50"] * 1e3, 2) if made["ttft"] else None,
        "ttft_p99_ms": round(made["ttft"]["p99"] * 1e3, 2) if made["ttft"] else None,
        "stream_errors": made["requests"]["failed"],
        "rss_mb": round(sum(u.rss_bytes for u in _usage(running)) / 1e6, 1),
    }


async def _whole_answers(running: Running, more: Sequence[str] = ()) -> GrowthRow:
    flags = ["--concurrency=64", "--requests=4000", "--duration=4", "--output-tokens=64", *more]
    made, cpu_s = await _load(running, flags, stream=False, pace_ms=0)
    good = made["requests"]["succeeded"]
    return {
        "us_per_request": round(cpu_s / good * 1e6, 1) if good else None,
        "requests_per_s": round(made["throughput"]["requests_per_s"]),
        "request_errors": made["requests"]["failed"],
        "rss_mb": round(sum(u.rss_bytes for u in _usage(running)) / 1e6, 1),
    }


async def _idle(running: Running) -> GrowthRow:
    """CPU of a gateway that has nothing to do but to hear its workers, as a share of one core."""
    before = _usage(running)
    await asyncio.sleep(IDLE_S)
    return {"idle_core_share": round(_spent_s(before, _usage(running)) / IDLE_S, 4)}


async def _models(running: Running, adapters: int) -> GrowthRow:
    """`GET /v1/models`, one after another, once the store's listing is known."""
    took: list[float] = []
    async with aiohttp.ClientSession() as client:
        known = 0
        while known <= adapters:  # and the base model
            async with client.get(running.url + "/v1/models") as answer:
                known = (await answer.read()).count(b'"id":')
            await asyncio.sleep(LOOK_AGAIN_S)
        for _ in range(MODELS_ASKED):
            began = time.perf_counter()
            async with client.get(running.url + "/v1/models") as answer:
                await answer.read()
            took.append((time.perf_counter() - began) * 1e3)
    took.sort()
    return {
        "models_p50_ms": round(took[len(took) // 2], 2),
        "models_p99_ms": round(took[len(took) * 99 // 100], 2),
    }


async def _load(
    running: Running, flags: Sequence[str], *, stream: bool, pace_ms: int
) -> tuple[dict[str, Any], float]:
    """What the load saw, and the CPU seconds of all gateway processes."""
    common = [
        f"--url={running.url}",
        "--model=base",
        "--quiet",
        "--timeout=60",
        f'--extra-body={{"seed": {pace_ms}}}',
    ]
    options = parse([*common, *flags, "--no-usage", *([] if stream else ["--no-stream"])])
    before = _usage(running)
    seen = await measure(options)
    return document(seen), _spent_s(before, _usage(running))


def _usage(running: Running) -> list[ProcessUsage]:
    return [gateway.usage() for gateway in running.gateway]


def _spent_s(before: Sequence[ProcessUsage], after: Sequence[ProcessUsage]) -> float:
    return sum(spent_s(b, a) for b, a in zip(before, after, strict=True))


# ---- adapters on disk ----------------------------------------------------------------------------


def adapter_name(number: int) -> str:
    return f"adapter-{number:06d}"


def write_adapters(root: Path, count: int) -> None:
    """The smallest adapters that pass validation."""
    for number in range(count):
        write_adapter(root / adapter_name(number))


def write_adapter(folder: Path, weight: float = 0.0) -> None:
    """All its weights are `weight`: another number makes another version of it."""
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    half = RANK * WIDTH * 4
    tensors = {
        f"{name}A.weight": {"dtype": "F32", "shape": [RANK, WIDTH], "data_offsets": [0, half]},
        f"{name}B.weight": {
            "dtype": "F32",
            "shape": [WIDTH, RANK],
            "data_offsets": [half, 2 * half],
        },
    }
    header = json.dumps(tensors).encode()
    header += b" " * (-len(header) % 8)
    weights = struct.pack(f"<{2 * RANK * WIDTH}f", *[weight] * (2 * RANK * WIDTH))
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 16,
        "target_modules": ["q_proj"],
        "task_type": "CAUSAL_LM",
    }
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(
        struct.pack("<Q", len(header)) + header + weights
    )


# ---- results -------------------------------------------------------------------------------------

Axes: TypeAlias = tuple[tuple[str, str], ...]
"""What is drawn: (key of a row, label)."""

PARTS: dict[str, tuple[Sequence[int], Callable[[int], Awaitable[GrowthRow]], Axes]] = {
    "streams": (
        STREAMS,
        with_streams,
        (("us_per_token", "CPU per token, us"), ("rss_mb", "memory, MB")),
    ),
    "workers": (
        WORKERS,
        with_workers,
        (("us_per_request", "CPU per request, us"), ("idle_core_share", "idle, share of a core")),
    ),
    "adapters": (
        ADAPTERS,
        with_adapters,
        (("us_per_request", "CPU per request, us"), ("rss_mb", "memory, MB")),
    ),
    "processes": (
        PROCESSES,
        with_processes,
        (("us_per_request", "CPU per request, us"), ("us_per_token", "CPU per token, us")),
    ),
}


def _table(rows: Sequence[GrowthRow]) -> str:
    heads = list(rows[0])
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return "\n".join(
        [
            *lines,
            *(
                "| "
                + " | ".join(f"{row[h]:,}" if row[h] is not None else "-" for h in heads)
                + " |"
                for row in rows
            ),
        ]
    )


def _write(
    out: Path, name: str, rows: Sequence[GrowthRow], text: str, axes: Axes, arguments: Sequence[str]
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    stem = out / f"growth-{name}-{at[:10]}"
    made: dict[str, Any] = {
        "schema": "loraplex.bench.growth/1",
        "started_at": at,
        "command": ["python", "-m", "bench.gateways.growth", *arguments],
        "commit": commit(),
        "cores": os.cpu_count(),
        "loadavg": os.getloadavg(),
        "rows": rows,
    }
    stem.with_suffix(".json").write_bytes(
        msgspec.json.format(msgspec.json.encode(made), indent=1) + b"\n"
    )
    stem.with_suffix(".md").write_text(
        f"`{' '.join(made['command'])}`, {at}, {os.cpu_count()} cores, commit "
        f"{made['commit'][:13]}\n\n{text}\n"
    )
    _draw(stem.with_suffix(".png"), name, rows, axes)


def _draw(path: Path, name: str, rows: Sequence[GrowthRow], axes: Axes) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained", dpi=110)
    for panel, (key, label) in zip(figure.subplots(1, len(axes)), axes, strict=True):
        points = [(row[name], row[key]) for row in rows if row.get(key) is not None]
        panel.plot([x for x, _ in points], [y for _, y in points], "o-", color="tab:blue")
        if len(points) > 1 and points[-1][0] > 20 * points[0][0]:
            panel.set_xscale("log")
        panel.set(
            xlabel=name, ylabel=label, ylim=(0, max((y for _, y in points), default=1) * 1.15)
        )
        panel.grid(alpha=0.3)
    figure.suptitle(f"Growth with {name}", fontsize=10)
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
