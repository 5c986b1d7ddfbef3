"""Shell. `python -m bench.overload`: whole answers in time at five times the load that is served.

    python -m bench.overload [--patience-s 5] [--round-s 20]

One gateway, and a worker with a simulated engine that serves AT_ONCE requests at a time. The peak
is what as many clients get who ask again as soon as they have their answer. Then five times as much
is asked for, by clients that ask again (closed) or come evenly (open). They wait for their answer
(patient), leave without a word (leaving), or say how long they wait (deadline).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import tempfile
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import aiohttp
import uvloop

from bench.cluster import simulated_cluster

AT_ONCE = 8
TOKENS = 20
TIMING = {"itl_ms": 25, "max_num_seqs": AT_ONCE, "ttft_ms": 1, "prefill_tokens_per_s": 100_000}
OVERLOAD = 5
GRACE_S = 0.5
"""Between a worker's last token and the client's clock."""
REFUSED_S = 0.1
"""Before a client whose request was refused asks again."""
BODY = {"model": "sim", "max_tokens": TOKENS, "messages": [{"role": "user", "content": "hi"}]}


class Patience(Enum):
    PATIENT = "patient"
    LEAVING = "leaving"
    DEADLINE = "deadline"


KINDS = tuple(f"{p.value}, {comes}" for p in Patience for comes in ("closed", "open"))


@dataclass(slots=True)
class OverloadRound:
    """Clients of one kind for `round_s`. Answers count from `warm_s` on, when the queue is as deep
    as patience lets it be.
    """

    url: str
    patience: Patience
    patience_s: float
    round_s: float
    warm_s: float
    begun: float = 0.0
    whole: int = 0

    @property
    def goodput_per_s(self) -> float:
        return self.whole / (self.round_s - self.warm_s)

    async def closed(self, clients: int) -> float:
        """Each asks again as soon as it has its answer."""

        async def one(http: aiohttp.ClientSession) -> None:
            while True:
                await self._ask(http)

        return await self._round(lambda http: asyncio.gather(*(one(http) for _ in range(clients))))

    async def open(self, per_s: float) -> float:
        """They come evenly, whatever has become of the others."""

        async def all_of_them(http: aiohttp.ClientSession) -> None:
            async with asyncio.TaskGroup() as tasks:
                for n in range(int(per_s * self.round_s)):
                    await asyncio.sleep(max(0.0, self.begun + n / per_s - time.monotonic()))
                    tasks.create_task(self._ask(http))

        return await self._round(all_of_them)

    async def _round(self, ask: Callable[[aiohttp.ClientSession], Awaitable[object]]) -> float:
        """The goodput. Who waits at the end of the round leaves: its answer would not count."""
        self.begun = time.monotonic()
        async with _session() as http:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.round_s):
                    await ask(http)
        return self.goodput_per_s

    async def _ask(self, http: aiohttp.ClientSession) -> None:
        sent, headers, patient = time.monotonic(), {}, self.patience is Patience.PATIENT
        if self.patience is Patience.DEADLINE:
            headers["x-loraplex-timeout-ms"] = str(int(self.patience_s * 1e3))
        leaves_s = self.patience_s if self.patience is Patience.LEAVING else None
        timeout = aiohttp.ClientTimeout(total=leaves_s)
        with contextlib.suppress(TimeoutError):
            async with http.post(self.url, json=BODY, headers=headers, timeout=timeout) as answer:
                await answer.read()
                now = time.monotonic()
                if answer.status != 200:
                    await asyncio.sleep(REFUSED_S)
                elif self.begun + self.warm_s < now < self.begun + self.round_s:
                    self.whole += patient or now - sent < self.patience_s + GRACE_S


async def overload(
    url: str, patience_s: float, round_s: float, kinds: Collection[str] = KINDS
) -> dict[str, float]:
    """Goodput per second by kind of clients, with `peak` before them."""
    warm_s = min(round_s / 2, 1.25 * patience_s)

    def clients(patience: Patience) -> OverloadRound:
        return OverloadRound(url, patience, patience_s, round_s, warm_s)

    found = {"peak": await clients(Patience.PATIENT).closed(AT_ONCE)}
    for kind in kinds:
        patience, _, comes = kind.partition(", ")
        some = clients(Patience(patience))
        if comes == "closed":
            found[kind] = await some.closed(OVERLOAD * AT_ONCE * 2)
        else:
            found[kind] = await some.open(OVERLOAD * found["peak"])
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.overload")
    parser.add_argument("--patience-s", type=float, default=5.0)
    parser.add_argument("--round-s", type=float, default=20.0)
    flags = parser.parse_args(arguments)
    found = uvloop.run(_measured(flags.patience_s, flags.round_s))
    print("| clients | answers in time per s | of the peak |\n|---|---|---|")
    for kind, per_s in found.items():
        print(f"| {kind} | {per_s:.1f} | {per_s / found['peak']:.0%} |")
    return 0


async def _measured(patience_s: float, round_s: float) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="bench-overload-") as folder:
        async with simulated_cluster(Path(folder) / "cluster", TIMING, AT_ONCE) as cluster:
            url = f"http://127.0.0.1:{cluster.port}/v1/chat/completions"
            return await overload(url, patience_s, round_s)


def _session() -> aiohttp.ClientSession:
    """Without a bound for connections."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))


if __name__ == "__main__":
    raise SystemExit(main())
