"""Shell. `python -m bench.gateways` (`make bench`): what this gateway and others cost.

All have the same engine and the same load, and are measured in turns.

    python -m bench.gateways
        # all gateways, 3 repetitions
    python -m bench.gateways --peers nginx,loraplex --quick

The other gateways are the peers. Each is installed once, into an environment of its own below
.cache/peers. All are measured within each repetition, so a machine that becomes slower does so for
all of them. The cost of a gateway is the CPU time of its processes, per request or per streamed
token.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from bench import ROOT
from bench.gateways.measured import GatewayCost, line, measured, nothing
from bench.gateways.peers import PEERS, AnyPeer
from bench.gateways.peers.comparison import (
    QUICK,
    SCENARIOS,
    SCHEMA,
    GatewayScenario,
    Result,
    summary,
    table,
)
from bench.gateways.peers.loraplex import Loraplex
from bench.gateways.peers.peer import PeerPlace, PeerSkipped, Running
from bench.gateways.peers.picture import draw
from bench.gateways.peers.routers import KEY, KEY_ENV
from bench.load.__main__ import CannotRun, measure, raise_open_files_limit
from bench.load.options import parse
from bench.load.report import document
from bench.process import (
    NotStarted,
    Process,
    free_ports,
    spent_s,
    until_answers,
)
from bench.provenance import RESULTS, commit

CACHE = ROOT / ".cache" / "peers"
DIRECT = "direct"
"""The mock engine without a gateway. The others are compared with its TTFT."""
RUN_BOUND_S = 45.0
REQUEST_TIMEOUT_S = 30.0
SETTLE_S = 0.3
"""The wait between a warm-up and its run, so that the rest of the warm-up is not counted."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 if nothing could be compared."""
    flags = _flags(arguments)
    os.environ.setdefault(KEY_ENV, KEY)
    raise_open_files_limit()
    peers, facts = _prepare(
        flags.peers.split(",") if flags.peers else list(PEERS), install=flags.install
    )
    for folder in flags.also:
        other = Loraplex(name=f"loraplex at {folder.name}", root=folder.resolve())
        peers.insert(len(peers) and 1, other)
        facts[other.name] = {"version": commit(other.root)}
    if flags.prepare:
        return 0
    scenarios = [
        s
        for s in (QUICK if flags.quick else SCENARIOS)
        if not flags.scenarios or s.name in flags.scenarios.split(",")
    ]
    if not peers or not scenarios:
        print("bench.gateways: nothing to compare", file=sys.stderr)
        return 2
    started_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    load_before = os.getloadavg()
    results, host = uvloop.run(
        compare(
            peers,
            scenarios,
            flags.repetitions or (1 if flags.quick else 3),
            flags.heavy_repetitions,
        )
    )
    made = {
        "schema": SCHEMA,
        "started_at": started_at,
        "command": [
            "python",
            "-m",
            "bench.gateways",
            *(sys.argv[1:] if arguments is None else arguments),
        ],
        "commit": commit(),
        "host": {**host, "loadavg_before": load_before, "loadavg_after": os.getloadavg()},
        "repetitions": max((r["repetition"] for r in results), default=0) + 1,
        "scenarios": {s.name: msgspec.to_builtins(s) for s in scenarios},
        "peers": facts,
        "summary": summary(results, [p.name for p in peers], DIRECT),
        "results": results,
    }
    _publish(made, flags)
    return 0


def _flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gateways", description="What this gateway and others cost."
    )
    parser.add_argument(
        "--peers", default="", help=f"comma-separated, of: {','.join(PEERS)} (default: all)"
    )
    parser.add_argument(
        "--scenarios", default="", help=f"of: {','.join(s.name for s in SCENARIOS)} (default: all)"
    )
    parser.add_argument(
        "--repetitions", type=int, default=0, metavar="N", help="default 3, or 1 with --quick"
    )
    parser.add_argument(
        "--heavy-repetitions",
        type=int,
        default=1,
        metavar="N",
        help="of peers that use CPU while idle (default %(default)s)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a tenth of the load: does everything work?"
    )
    parser.add_argument(
        "--install",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="install peers that are missing",
    )
    parser.add_argument(
        "--also",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="this project's gateway from another checkout",
    )
    parser.add_argument("--prepare", action="store_true", help="install and end")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="default bench/results, none with --quick"
    )
    return parser.parse_args(arguments)


def _prepare(names: Iterable[str], *, install: bool) -> tuple[list[AnyPeer], dict[str, Any]]:
    """Returns the peers that can take part, and for each its version or why it is skipped."""
    CACHE.mkdir(parents=True, exist_ok=True)
    peers: list[AnyPeer] = []
    facts: dict[str, Any] = {}
    for name in names:
        if name not in PEERS:
            raise SystemExit(
                f"bench.gateways: there is no peer {name!r} (there are {', '.join(PEERS)})"
            )
        try:
            facts[name] = {"version": PEERS[name].install(CACHE, install)}
            peers.append(PEERS[name])
        except PeerSkipped as exc:
            facts[name] = {"skipped": str(exc)}
            _say(f"{name} is skipped: {exc}")
    return peers, facts


async def compare(
    peers: Sequence[AnyPeer],
    scenarios: Sequence[GatewayScenario],
    repetitions: int,
    heavy_repetitions: int = 1,
) -> tuple[list[Result], dict[str, Any]]:
    """Returns the rows of all runs, and the facts of the machine. Heavy peers, which are slower
    by a factor of ten or more, are run less often.
    """
    results: list[Result] = []
    broken: set[tuple[str, str]] = set()
    host: dict[str, Any] = {}
    for repetition in range(repetitions):
        groups: list[list[AnyPeer]] = [
            [p for p in peers if not p.heavy],
            *([p] for p in peers if p.heavy and repetition < heavy_repetitions),
        ]
        for group in groups:
            async with contextlib.AsyncExitStack() as stack:
                engine, up = await start(group, stack, results, repetition)
                for scenario in scenarios:
                    runners = (
                        {DIRECT: up[DIRECT]} if scenario.name == "E" and group is groups[0] else {}
                    )
                    for name, running in (
                        runners | {n: r for n, r in up.items() if n != DIRECT}
                    ).items():
                        if (name, scenario.name) in broken:
                            continue
                        result, host = await run(name, running, engine, scenario, repetition, host)
                        results.append(result)
                        if result["note"]:
                            broken.add((name, scenario.name))
                        _say(line(result))
    return results, host


async def start(
    group: Sequence[AnyPeer],
    stack: contextlib.AsyncExitStack,
    results: list[Result],
    repetition: int,
) -> tuple[Process, dict[str, Running]]:
    """The mock engine and every peer of the group, up to the end of `stack`."""
    engine_port, *ports = free_ports(len(group) + 1)
    folder = Path(
        stack.enter_context(
            tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True)
        )
    )
    engine = Process(
        [sys.executable, "-m", "bench.gateways.mock_engine", "http", str(engine_port)],
        folder / "engine.log",
        cwd=ROOT,
    )
    stack.callback(engine.stop)
    await until_answers(engine_port, "/v1/models", engine, 30.0)
    up = {DIRECT: Running(f"http://127.0.0.1:{engine_port}", ())}
    for peer, port in zip(group, ports, strict=True):
        place = PeerPlace(CACHE, folder / peer.name, port, engine_port)
        place.folder.mkdir()
        try:
            up[peer.name] = await stack.enter_async_context(peer.running(place))
        except NotStarted as exc:
            results.append(nothing(peer.name, "start", repetition, f"did not start: {exc}"))
            _say(f"{peer.name} did not start: {exc}")
    return engine, up


async def run(
    name: str,
    running: Running,
    engine: Process,
    scenario: GatewayScenario,
    repetition: int,
    host: dict[str, Any],
) -> tuple[Result, dict[str, Any]]:
    """Warms up and measures one peer in one scenario."""
    behind = running.engine or engine
    try:
        async with asyncio.timeout(RUN_BOUND_S):
            await measure(parse(_load_flags(running, scenario, warm_up=True)))
        await asyncio.sleep(SETTLE_S)
        before, engine_before, start = (
            [p.usage() for p in running.gateway],
            behind.usage(),
            time.perf_counter(),
        )
        async with asyncio.timeout(RUN_BOUND_S):
            seen = await measure(parse(_load_flags(running, scenario, warm_up=False)))
    except TimeoutError:
        return nothing(
            name, scenario.name, repetition, f"not finished within {RUN_BOUND_S:g} s"
        ), host
    except CannotRun as exc:
        return nothing(name, scenario.name, repetition, f"failed: {exc}"), host
    wall_s = time.perf_counter() - start
    after, engine_after = [p.usage() for p in running.gateway], behind.usage()
    made = document(seen)
    # those of answers that failed later included: they have cost as much
    delivered = sum(seen.meter.tokens_by_bin.values())
    cost = GatewayCost(
        wall_s,
        sum(spent_s(b, a) for b, a in zip(before, after, strict=True)),
        spent_s(engine_before, engine_after),
        sum(u.rss_bytes for u in after),
        sum(u.processes for u in after),
    )
    return measured(name, scenario, repetition, made, cost, delivered), made["host"]


def _load_flags(running: Running, scenario: GatewayScenario, *, warm_up: bool) -> list[str]:
    """The flags of `bench.load`. The pace travels in `seed`."""
    tokens, pace_ms = (2, 0) if warm_up else (scenario.tokens, scenario.pace_ms or 0)
    requests = 2 * scenario.clients if warm_up else scenario.requests
    flags = [
        f"--url={running.url}",
        "--model=base",
        "--quiet",
        "--no-usage",
        f"--timeout={REQUEST_TIMEOUT_S}",
        "--prompt-tokens=256",
    ]
    flags += [
        f"--concurrency={scenario.clients}",
        f"--requests={requests}",
        f"--duration={scenario.duration_s}",
    ]
    flags += [f"--output-tokens={tokens}", f'--extra-body={{"seed": {pace_ms}}}']
    flags += [f"--ramp={scenario.ramp_s}"] if scenario.ramp_s and not warm_up else []
    flags += ["--no-stream"] if scenario.pace_ms is None else []
    return flags + ([f"--api-key-env={running.key_env}"] if running.key_env else [])


def _publish(made: dict[str, Any], flags: argparse.Namespace) -> None:
    text = table(made)
    print(text)
    out: Path | None = flags.out or (None if flags.quick else RESULTS)
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    stem = out / f"gateways-{made['started_at'][:10]}"
    stem.with_suffix(".json").write_bytes(
        msgspec.json.format(msgspec.json.encode(made), indent=1) + b"\n"
    )
    host = made["host"]
    head = (
        f"`{' '.join(made['command'])}`\n\n{made['started_at']}, {host['cpu_model']}, "
        f"{host['cores']} cores, {host['platform']}, "
        f"commit {made['commit'][:13]}, {made['repetitions']} interleaved repetitions, "
        f"load average {host['loadavg_before'][0]:.1f} before and "
        f"{host['loadavg_after'][0]:.1f} after\n\n"
    )
    stem.with_suffix(".md").write_text(head + text + "\n")
    try:
        draw(made, str(stem.with_suffix(".png")))
    except ImportError as exc:
        _say(f"no picture: {exc}")
    _say(f"written: {stem}.json, .md, .png")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.asynccontextmanager
async def one_peer(peer: AnyPeer) -> AsyncIterator[tuple[Running, Process]]:
    """A peer alone with its mock engine, for measurements of another kind."""
    async with contextlib.AsyncExitStack() as stack:
        results: list[Result] = []
        engine, up = await start([peer], stack, results, 0)
        if peer.name not in up:
            raise NotStarted(results[0]["note"])
        yield up[peer.name], engine


if __name__ == "__main__":
    sys.exit(main())
