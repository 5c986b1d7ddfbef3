"""Shell. How long running streams stand still while a cold adapter is loaded: the longest gap
between tokens, minus that of a warm request.

`streams` long answers run. Meanwhile requests for one token come, one after another. They ask for
adapters that the server has never loaded and, in between, for one that it has. Both read a prompt
of the same length, so what the cold ones add to the gap of all streams is the load.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

PAUSE_S = 0.25
SETTLE_S = 2.0
LIMIT_S = 120.0


async def stall(
    url: str, warm: str, cold: Sequence[str], *, streams: int = 32, prompt_tokens: int = 100
) -> dict[str, Any]:
    """In ms: what a cold load adds to the gap (median and greatest over the loads), the two gaps,
    and the TTFTs of both kinds.
    """
    parts = urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 80
    prompt = " ".join(["word"] * prompt_tokens)

    async def stream(model: str, tokens: int, times: list[float]) -> None:
        body = json.dumps(
            {
                "model": model,
                "prompt": prompt,
                "max_tokens": tokens,
                "ignore_eos": True,
                "stream": True,
            }
        ).encode()
        reader, writer = await asyncio.open_connection(host, port)
        try:
            head = (
                f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: "
                "application/json\r\nConnection: close\r\n"
            )
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            seen = b""
            while data := await reader.read(1 << 16):
                if b"data: " in data:
                    times.append(time.perf_counter())
                seen = (seen + data)[-512:]
                if b"[DONE]" in seen:
                    return
            raise RuntimeError(f"{model} was not answered: {seen!r}")
        finally:
            writer.close()

    running: list[list[float]] = [[] for _ in range(streams)]
    async with asyncio.timeout(LIMIT_S):
        await stream(warm, 4, [])
        tasks = [asyncio.create_task(stream(warm, 1800, times)) for times in running]
        await asyncio.sleep(SETTLE_S)
        gaps: dict[str, list[float]] = {"warm": [], "cold": []}
        ttft: dict[str, list[float]] = {"warm": [], "cold": []}
        for name in cold:
            for kind, model in (("warm", warm), ("cold", name)):
                began = time.perf_counter()
                first: list[float] = []
                await stream(model, 1, first)
                await asyncio.sleep(PAUSE_S)
                ended = time.perf_counter()
                ttft[kind].append((first[0] - began) * 1e3)
                longest = [_longest(times, began, ended) for times in running]
                gaps[kind].append(statistics.median(g for g in longest if g is not None) * 1e3)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    usual = statistics.median(gaps["warm"])
    return {
        "stall_p50_ms": statistics.median(gaps["cold"]) - usual,
        "stall_max_ms": max(gaps["cold"]) - usual,
        "gap_warm_ms": usual,
        "gap_cold_ms": statistics.median(gaps["cold"]),
        "ttft_warm_ms": statistics.median(ttft["warm"]),
        "ttft_cold_ms": statistics.median(ttft["cold"]),
        "loads": len(cold),
    }


def _longest(times: list[float], began: float, ended: float) -> float | None:
    """The longest gap that overlaps the window. None: the stream had ended."""
    return max((b - a for a, b in pairwise(times) if b >= began and a <= ended), default=None)
