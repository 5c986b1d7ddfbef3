"""Shell. `python -m bench.gateways.limits`: what keys, limits and the usage ledger add to the cost
of a request.

    python -m bench.gateways.limits [--pairs 12] [--rounds 15] [--requests 640]

Two gateways with a simulated worker each: one without keys, one with a keys file, every limit set
and the ledger on. The same requests go to both in turn: whole answers of one token, the least that
a request can cost, and streams of 16. A gateway's CPU time per request in its least disturbed round
is the figure: what disturbs only adds.

One process is up to a tenth dearer than another one of the same code, for its whole life. So there
are several pairs of gateways, and the geometric mean of their ratios, with its 95% interval.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from bench.cluster import SimulatedCluster, simulated_cluster
from bench.process import spent_s
from gateway.accounts.account import AccountLimits
from gateway.accounts.key_file import KeyEntry, LimitsEntry, to_text
from gateway.accounts.key_ring import digest_of

TIMING = {"ttft_ms": 0, "itl_ms": 0.1, "prefill_tokens_per_s": 1e6}
CONNECTIONS = 16
KEY = "a-key-of-the-benchmark"
STREAMED_TOKENS = 16
PLENTY = 1_000_000_000


@dataclass(frozen=True, slots=True)
class LimitCosts:
    """CPU microseconds per request, by round."""

    without: list[float]
    limited: list[float]

    @property
    def ratio(self) -> float:
        return min(self.limited) / min(self.without)


async def limit_costs(rounds: int, requests: int, tokens: int) -> LimitCosts:
    """For streams of so many tokens. One token means whole answers."""
    costs = LimitCosts([], [])
    with tempfile.TemporaryDirectory(prefix="bench-limits-") as folder:
        async with (
            simulated_cluster(Path(folder) / "without", TIMING, usage_months=0) as without,
            simulated_cluster(Path(folder) / "limited", TIMING, **_keys(Path(folder))) as limited,
        ):
            for number in range(rounds + 1):
                for cluster, found in ((without, costs.without), (limited, costs.limited)):
                    cpu_us = await _round(cluster, requests, tokens)
                    if number:  # the first one warms both
                        found.append(cpu_us)
    return costs


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gateways.limits")
    parser.add_argument("--pairs", type=int, default=12, help="of gateways; two at least")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--requests", type=int, default=640)
    flags = parser.parse_args(arguments)
    if flags.pairs < 2:
        parser.error("--pairs: two at least, or there is no interval")
    print(f"{'tokens':>8} {'without, us':>12} {'limited, us':>12} {'ratio':>8} {'95%':>16}")
    for tokens in (1, STREAMED_TOKENS):
        pairs = [
            uvloop.run(limit_costs(flags.rounds, flags.requests, tokens))
            for _ in range(flags.pairs)
        ]
        without, limited = (
            statistics.mean(min(getattr(pair, kind)) for pair in pairs)
            for kind in ("without", "limited")
        )
        logs = [math.log(pair.ratio) for pair in pairs]
        mean, spread = statistics.mean(logs), statistics.stdev(logs) / math.sqrt(len(logs))
        low, high = math.exp(mean - 2 * spread), math.exp(mean + 2 * spread)
        ratio = f"{math.exp(mean):8.3f} {low:8.3f}{high:8.3f}"
        print(f"{tokens:8} {without:12.1f} {limited:12.1f} {ratio}", flush=True)
    return 0


# ---- inside --------------------------------------------------------------------------------------


def _keys(folder: Path) -> dict[str, Any]:
    limits = LimitsEntry(**dict.fromkeys(AccountLimits.__struct_fields__, PLENTY))
    file = folder / "keys.yaml"
    file.write_text(to_text([KeyEntry(name="one", sha256=digest_of(KEY).hex(), limits=limits)]))
    return {"keys_file": str(file)}


async def _round(cluster: SimulatedCluster, requests: int, tokens: int) -> float:
    before = cluster.gateway.usage()
    each = requests // CONNECTIONS
    request = _request(cluster.port, tokens)
    end = b"\r\n0\r\n\r\n" if tokens > 1 else b"}}"
    await asyncio.gather(*(_client(cluster.port, request, end, each) for _ in range(CONNECTIONS)))
    return spent_s(before, cluster.gateway.usage()) / (each * CONNECTIONS) * 1e6


def _request(port: int, tokens: int) -> bytes:
    said = {"role": "user", "content": "hi"}
    asked = {"model": "sim", "max_tokens": tokens, "stream": tokens > 1, "messages": [said]}
    body = json.dumps(asked).encode()
    lines = (
        "POST /v1/chat/completions HTTP/1.1",
        f"Host: 127.0.0.1:{port}",
        f"Authorization: Bearer {KEY}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    )
    return "\r\n".join((*lines, "", "")).encode() + body


async def _client(port: int, request: bytes, end: bytes, requests: int) -> None:
    """Asks again as soon as it has its answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for _ in range(requests):
            writer.write(request)
            answer = await reader.readuntil(end)
            assert answer.startswith(b"HTTP/1.1 200"), answer
    finally:
        writer.close()


if __name__ == "__main__":
    raise SystemExit(main())
