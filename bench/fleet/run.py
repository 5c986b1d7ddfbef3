"""Shell. The rows, one after another: gateways are started and ended, loads driven, a worker
killed, every row recorded as soon as it exists.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.fleet import figures as fig
from bench.fleet.cluster import MIXED, FleetCluster, FleetGateway, cpu_s, load
from bench.fleet.plan import OURS, FleetPlan, FleetRow, gateways
from bench.fleet.served import MODEL, PAIR
from bench.load.measure import BIN_S
from bench.process import NotStarted
from bench.routing.predicted import KEPT, predictions, quartiles

RESTART_AFTER_S = 1.0  # as `loraplex serve` does
SEED = 7
FLUSH_AT_ONCE = 4  # requests per worker
LEAST_RATIOS = 4


@dataclass(frozen=True, slots=True)
class Volume:
    """Of every load. `streams` are per worker, in a closed loop; `generators` processes drive it. A
    request that has not ended after `timeout_s` is given up.
    """

    streams: int
    output_tokens: int
    generators: int
    timeout_s: float


class Runner:
    """`left_s` says how many seconds there are, None for no bound."""

    def __init__(
        self,
        cluster: FleetCluster,
        volume: Volume,
        plan: FleetPlan,
        left_s: Callable[[], float | None],
        done: Sequence[fig.RecordedRow],
    ) -> None:
        self._cluster, self._volume, self._plan, self._left_s = cluster, volume, plan, left_s
        self.recorded: list[fig.RecordedRow] = list(done)

    async def heat(self, workers: int, seconds: float) -> None:
        """The first loads of an engine pay for the tuning of its kernels, and the first requests of
        an adapter for its way to this host.
        """
        async with self._cluster.gateway(workers, OURS) as gateway:
            await self._flush(gateway, workers)
            async with load(
                self._cluster.work, self._paced(FleetRow("heat", workers), gateway, seconds)
            ) as going:
                await going.seen()

    async def run(
        self, record: Callable[[FleetRow, dict[str, Any]], fig.RecordedRow]
    ) -> list[FleetRow]:
        """All rows of the plan. Returns those for which no time was left."""
        skipped: list[FleetRow] = []
        stack = contextlib.AsyncExitStack()
        gateway: FleetGateway | None = None
        try:
            for row, first in gateways(self._plan.rows):
                left_s = self._left_s()
                if left_s is not None and left_s < self._plan.times.of(row, first_of_gateway=first):
                    skipped.append(row)
                    continue
                if row.part == "mixed":
                    await stack.aclose()  # its gateway has the port
                    made = await self._mixed(row)
                else:
                    if first or gateway is None:
                        await stack.aclose()
                        gateway = await stack.enter_async_context(
                            self._cluster.gateway(row.workers, row.policy)
                        )
                        await self._flush(gateway, row.workers)
                    made = await (
                        self._kill(row, gateway) if row.part == "kill" else self._load(row, gateway)
                    )
                self.recorded.append(record(row, made))
        finally:
            await stack.aclose()
        return skipped

    # ---- one load --------------------------------------------------------------------------------

    async def _flush(self, gateway: FleetGateway, workers: int) -> None:
        """Every adapter once, the popular ones first: whatever the gateway before left in the slots
        is as good as gone.
        """
        adapters = self._cluster.served.adapters
        flags = self._flags(gateway, MODEL, output_tokens=1, seed=0)
        flags += [
            "--mix=distinct",
            f"--requests={len(adapters)}",
            f"--concurrency={FLUSH_AT_ONCE * workers}",
        ]
        async with load(self._cluster.work, [flags]) as going:
            seen = await going.seen()
        failed = fig.failures(seen.outcomes)
        if len(seen.outcomes) and failed["failed_before_first_byte"] == len(seen.outcomes):
            raise NotStarted(f"no request is answered: {failed['samples']}")

    async def _load(self, row: FleetRow, gateway: FleetGateway) -> dict[str, Any]:
        times = self._plan.times
        began, before, begun_at = time.time(), gateway.usage(), time.perf_counter()
        async with load(
            self._cluster.work, self._paced(row, gateway, times.warm_s + times.measure_s)
        ) as going:
            seen = await going.seen()
        from_s, until_s = times.warm_s, times.warm_s + times.measure_s
        made = self._figures(
            row, gateway, seen, (from_s, until_s), (began, begun_at), cpu_s(before, gateway.usage())
        )
        if row.policy == OURS and not row.saturated:
            made |= await asyncio.to_thread(_predicted, gateway.url, made["figures"]["requests"])
        return made

    def _figures(
        self,
        row: FleetRow,
        gateway: FleetGateway,
        seen: fig.Seen,
        window: tuple[float, float],
        began: tuple[float, float],
        gateway_s: float,
    ) -> dict[str, Any]:
        """`began` is one moment on the wall clock and on the generators' clock."""
        made = fig.figures(seen, *window)
        tokens = sum(o.output_tokens for o in seen.outcomes)
        wall_s = max((o.ended_s for o in seen.outcomes), default=0.0)
        zero = began[0] + seen.start_s - began[1]
        loads = self._cluster.loads(zero + window[0], zero + window[1])
        due = made["requests"]["due"]
        return {
            "rate_rps": self._rate(row),
            "figures": made,
            "loads": {
                "count": len(loads),
                "from": {
                    tier: sum(e["from"] == tier for e in loads)
                    for tier in sorted({e["from"] for e in loads})
                },
                "per_1000_requests": 1e3 * len(loads) / due if due else 0.0,
            },
            "gateway": {
                "processes": len(gateway.processes),
                "cpu_s": gateway_s,
                "us_per_token": gateway_s / tokens * 1e6 if tokens else None,
                "cores": gateway_s / wall_s if wall_s else 0.0,
            },
        }

    def _rate(self, row: FleetRow) -> float | None:
        """Requests/s of an open loop. Raises NotStarted if the capacity is not known."""
        if row.rps is not None:
            return row.rps * row.workers
        if row.share is None:
            return None
        capacity = fig.scale(self.recorded).get(row.workers)
        if not capacity:
            raise NotStarted(
                f"the capacity of {row.workers} workers is not known: run the part `scale` first"
            )
        return row.share * capacity / self._volume.output_tokens

    def _paced(self, row: FleetRow, gateway: FleetGateway, duration_s: float) -> list[list[str]]:
        """Flags for every generator: each has its share of the streams or of the rate, and draws
        requests of its own.
        """
        count, rate = self._volume.generators, self._rate(row)
        made = []
        for index in range(count):
            flags = self._flags(
                gateway,
                MODEL,
                output_tokens=self._volume.output_tokens,
                seed=SEED + 100 * row.repetition + index,
            )
            streams = max(1, row.workers * self._volume.streams // count)
            pace = f"--concurrency={streams}" if rate is None else f"--rate={rate / count}"
            mix = ["--mix=base"] if row.part == "base" else ["--mix=zipf", "--alpha=1.0"]
            made.append([*flags, *mix, f"--duration={duration_s}", pace])
        return made

    def _flags(
        self, gateway: FleetGateway, model: str, *, output_tokens: int, seed: int
    ) -> list[str]:
        served = self._cluster.served
        return [
            f"--url={gateway.url}",
            f"--model={model}",
            f"--adapters={','.join(served.adapters)}",
            f"--prompt-tokens={served.prompt_words}",
            f"--output-tokens={output_tokens}",
            f"--seed={seed}",
            f"--timeout={self._volume.timeout_s}",
            "--ignore-eos",
        ]

    # ---- a worker dies ---------------------------------------------------------------------------

    async def _kill(self, row: FleetRow, gateway: FleetGateway) -> dict[str, Any]:
        times, victim = self._plan.times, f"w{row.workers - 1}"
        served = self._cluster.times_served(victim)
        left_s = self._left_s()
        bound_s = (
            times.serve_again_s
            if left_s is None
            else max(0.0, left_s - 2 * times.warm_s - times.measure_s - times.tail_s)
        )
        # what a load needs to settle, it needs to settle again
        after_s = times.warm_s + fig.HOLD_S + 1.0
        whole_s = times.warm_s + times.measure_s + bound_s + after_s
        wall, clock, before = time.time(), time.perf_counter(), gateway.usage()
        async with load(self._cluster.work, self._paced(row, gateway, whole_s)) as going:
            await asyncio.sleep(times.warm_s + times.measure_s)
            killed_at, killed_wall = time.perf_counter(), time.time()
            family = self._cluster.family(victim)
            self._cluster.kill(victim)
            orphans = await self._cluster.bury(victim, family[1:])
            await asyncio.sleep(max(0.0, RESTART_AFTER_S - (time.perf_counter() - killed_at)))
            restarted_at = time.perf_counter()
            self._cluster.start_worker(victim)
            serves = await self._serves_within(victim, served + 1, bound_s)
            await asyncio.sleep(after_s if serves else 0.0)
            going.end()
            seen = await going.seen()
        at_s = killed_at - seen.start_s
        made = self._figures(
            row, gateway, seen, (times.warm_s, at_s), (wall, clock), cpu_s(before, gateway.usage())
        )
        bins = [
            seen.tokens_by_bin.get(index, 0)
            for index in range(int((time.perf_counter() - seen.start_s) / BIN_S))
        ]
        # what ends after the sending says nothing
        sending = bins[: int(max((o.scheduled_s for o in seen.outcomes), default=0.0) / BIN_S)]
        lost = self._cluster.lost(gateway, victim)
        again_s = fig.served_again_s(seen.outcomes, victim, restarted_at - seen.start_s)
        made["kill"] = {
            "worker": victim,
            "orphans": orphans,
            "noticed_s": None if lost is None else lost["ts"] - killed_wall,
            "in_flight": 0 if lost is None else lost["requests"],
            **fig.failures(seen.outcomes),
            "throughput_back_s": fig.recovery_s(sending, BIN_S, at_s, times.warm_s),
            "lowest_second": fig.lowest_share(sending, BIN_S, at_s, times.warm_s),
            "worker_serves_again_s": None if again_s is None else again_s - at_s,
            "watched_s": len(sending) * BIN_S - at_s,
            "tokens_by_bin": bins,
            "bin_s": BIN_S,
            "killed_at_s": at_s,
        }
        return made

    async def _serves_within(self, worker: str, times: int, bound_s: float) -> bool:
        try:
            async with asyncio.timeout(bound_s):
                await self._cluster.until_serving(worker, times)
        except (TimeoutError, NotStarted) as exc:
            print(f"{worker} does not serve again within {bound_s:.0f} s: {exc}", file=sys.stderr)
            return False
        return True

    # ---- two models ------------------------------------------------------------------------------

    async def _mixed(self, row: FleetRow) -> dict[str, Any]:
        """The last two GPUs go to one worker of another model with tensor parallel 2. Both models
        get load at once.
        """
        cluster, times = self._cluster, self._plan.times
        if cluster.models.get(cluster.pair) != PAIR:
            for name in [
                name for name in cluster.workers if int(name[1:]) >= cluster.mixed_singles
            ]:
                cluster.workers.pop(name).stop()
            served = cluster.times_served(cluster.pair)  # its name was another's before
            cluster.start_worker(cluster.pair, PAIR)
            await cluster.until_serving(cluster.pair, times=served + 1)
        began, clock = time.time(), time.perf_counter()
        async with cluster.gateway(MIXED, row.policy) as gateway:
            before = gateway.usage()
            flags = []
            for model, workers in ((MODEL, cluster.mixed_singles), (PAIR, 1)):
                mine = self._flags(
                    gateway, model, output_tokens=self._volume.output_tokens, seed=SEED
                )
                streams = max(1, workers * self._volume.streams // 2)
                mine += [
                    "--mix=zipf",
                    "--alpha=1.0",
                    f"--duration={times.warm_s + times.measure_s}",
                    f"--concurrency={streams}",
                ]
                flags.append(mine)
            async with load(cluster.work, flags) as going:
                both = await going.each()
            window = (times.warm_s, times.warm_s + times.measure_s)
            seen = fig.together(both)
            made = self._figures(
                row, gateway, seen, window, (began, clock), cpu_s(before, gateway.usage())
            )
        made["models"] = {
            model: fig.figures(one, *window) for model, one in zip((MODEL, PAIR), both, strict=True)
        }
        return made


def _predicted(url: str, requests: Mapping[str, Any]) -> dict[str, Any]:
    """The first tokens' times that routing expected over those that they took, of the row's last
    requests.
    """
    ratios = [p.ratio for p in predictions(url, min(KEPT, requests["due"]))]
    if len(ratios) < LEAST_RATIOS:
        return {}
    first, middle, third = quartiles(ratios)
    found = {"count": len(ratios), "p25": first, "p50": middle, "p75": third}
    return {"expected_over_actual": found}


def read(path: Path) -> list[Mapping[str, Any]]:
    """Rows of an earlier call. A line that was cut off is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            print(
                f"bench.fleet: {path} has a line that is no JSON; it is left out", file=sys.stderr
            )
    return rows
