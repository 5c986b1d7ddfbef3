"""Shell. The three parts of `python -m bench.engine.cold`, each with the bound that it is compared
with.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import os
import re
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from bench.cluster import until
from bench.engine.bucket import LocalBucket, behind_line, open_bucket
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
from bench.gateways.growth import write_adapters
from bench.load.client import LoadClient
from bench.load.measure import percentile
from bench.process import NotStarted
from shared.stores import open_store

FACTOR, SLACK_S = 1.2, 0.020
"""The first token of a cold adapter may take FACTOR times the transfer, the load, and SLACK_S."""
MANY_FACTOR = 1.3
"""Many cold adapters at once may take so many times the largest bound."""
TOKENS, WARM_ASKS = 8, 5
WORKERS, MANY_SLOTS, FIRST_SLOTS = ("w0", "w1"), 8, 4
BEFORE_S = 8.0  # the warm adapter is measured alone for so long
WARM_STREAMS = 2
ASKS_FOR_MODELS = 300
TIMEOUT_S = 120.0
ColdFigures: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Warm:
    """One request of the adapter that is warm all the time."""

    began_s: float
    ttft_s: float
    queued_s: float


# ---- one after another ---------------------------------------------------------------------------


async def first(folder: Path, flags: argparse.Namespace) -> ColdFigures:
    """Asks for one cold adapter after the other, and for each a few times more once it is warm."""
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
                # measured anew each time, because a shared machine is not always equally fast
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
) -> ColdFigures:
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
    """How many seconds the store takes for a complete listing, and for a look-up by name."""
    async with open_store(line.url, line.options) as store:
        await store.find(name)
        began = time.perf_counter()
        async for _ in store.list():
            pass
        listed = time.perf_counter()
        await store.find(name)
        return listed - began, time.perf_counter() - listed


# ---- all at once ---------------------------------------------------------------------------------


async def many(folder: Path, flags: argparse.Namespace) -> ColdFigures:
    """Asks for `--many` cold adapters in the same moment, and for a warm one all the time."""
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
    """The least time that each of three limits allows, and how long each load took. The limits are
    the line, a worker that loads one adapter at a time, and slots that are taken until their
    requests end.
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
    """Returns the time of day at which the answer ended."""
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


async def catalog(folder: Path, flags: argparse.Namespace) -> ColdFigures:
    """Measures gateways without workers: an empty one, and one for each number of adapters."""
    rows: list[ColdFigures] = []
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


async def _catalog_of(folder: Path, bucket: LocalBucket, count: int) -> ColdFigures:
    async with cluster(folder, bucket) as c:
        listed = functools.partial(c.events, "gateway", "adapters listed")
        await until(listed, c.gateway, BOOT_S, "the gateway's listing")
        await asyncio.sleep(1.0)  # until what the listing needed is freed
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


def _spread(times: Sequence[float]) -> ColdFigures:
    ordered = sorted(times) or [0.0]
    return {
        "count": len(times),
        "p50_s": percentile(ordered, 0.5),
        "p99_s": percentile(ordered, 0.99),
        "max_s": ordered[-1],
    }


PARTS: dict[str, Callable[[Path, argparse.Namespace], Awaitable[ColdFigures]]] = {
    "first": first,
    "many": many,
    "catalog": catalog,
}
