"""Shell. `python -m bench.fleet` (`make bench-fleet`): one gateway with a worker for each GPU, for
example on 2, 4 and 8 GPUs. With the simulated engine it needs none.

    python -m bench.fleet --engine vllm --workers 2,4,8 --budget 560 --parts scale,policies
    python -m bench.fleet --engine vllm --workers 2,4,8 --budget 560 --parts base,kill
    python -m bench.fleet --engine vllm --workers 8 --budget 560 --parts mixed
    python -m bench.fleet --engine vllm --workers 4 --budget 560 --parts policies --rps 8,10
        # a load whose adapters all fit into the slots
    python -m bench.fleet --engine vllm --workers 2 --share-gpu --parts policies \
        --policies expected-ttft,ray --adapters 128 --slots 8 --streams 8 \
        --shares 0.7,1,1.4,2 --timeout 30
        # two workers on one GPU, with few slots: beyond what they can carry
    python -m bench.fleet --engine sim --workers 2,4,8
        # a rehearsal without a GPU

The parts are:

    scale     a closed loop over all adapters saturates a fleet of every size
    base      the same with the base model alone
    policies  each policy gets Poisson arrivals at --shares of the largest fleet's capacity, or at
              --rps requests per second and worker, in turns. Only the gateway is restarted in
              between. With as many --streams as --slots the capacity is that of the slots, one
              request in each
    kill      one worker is killed at 70% of the capacity, or at the lowest of --rps
    mixed     a worker with tensor parallel 2 and a model of its own joins the single workers

Each row is appended to a JSONL file in --out as soon as it exists, and is not measured again. So
the same command goes on after a run that was cut off, or that did not fit into --budget.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import os
import platform
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.fleet.cluster import FleetCluster
from bench.fleet.figures import RecordedRow, line, table
from bench.fleet.flags import SIM_SEQUENCES, VLLM_STREAMS, read_flags
from bench.fleet.plan import FleetPlan, FleetRow, FleetTimes, fit, rows, with_capacity
from bench.fleet.run import Runner, Volume, read
from bench.fleet.served import PAIR, Served, real, simulated
from bench.load.__main__ import raise_open_files_limit
from bench.process import NotStarted
from bench.provenance import commit, cpu_model, gpu_names, versions
from shared.runtime.process import count_gpus

SCHEMA = "loraplex.bench.fleet/1"
STARTED = time.monotonic()
WORKERS_PER_GATEWAY_PROCESS = 4
"""One gateway process forwards at least 60,000 tokens/s. Four H200 make 35,000."""
WORKERS_PER_GENERATOR = 2
BOOT_S = {"sim": 60.0, "vllm": 420.0}
SERVE_AGAIN_S = {"sim": 10.0, "vllm": 200.0}
SIM_CROWD = 1.5
"""So many streams are open for each sequence of the simulated engine. If there were only as many
streams as places, some places would be empty.
"""
HEAT_STREAMS = 64
"""At least, for each worker: beyond the capacity more requests run at once than in a closed loop of
few streams.
"""
RESERVE_S = 10.0  # to end everything and draw
LEAST_MEASURE_S = 8.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 if rows are left for another call, 2 if it could not run."""
    flags = read_flags(arguments, __doc__ or "")
    raise_open_files_limit()
    gpus = count_gpus() if flags.engine == "vllm" else 0
    out: Path = flags.out / f"{flags.name or _name(flags)}.jsonl"
    flags.out.mkdir(parents=True, exist_ok=True)
    flags.work.mkdir(parents=True, exist_ok=True)
    done = read(out)
    try:
        wanted = with_capacity(
            rows(
                flags.parts,
                flags.workers,
                flags.policies,
                flags.repetitions,
                flags.rps,
                flags.shares,
            ),
            {row["key"] for row in done},
        )
        skipped = asyncio.run(_measure(flags, gpus, wanted, done, out)) if wanted else []
    except NotStarted as exc:
        print(f"bench.fleet: {exc}", file=sys.stderr)
        return 2
    _publish(out)
    for row in skipped:
        print(f"not run, no time left: {row.key} (call again to go on)")
    return 1 if skipped else 0


async def _measure(
    flags: argparse.Namespace,
    gpus: int,
    wanted: Sequence[FleetRow],
    done: Sequence[RecordedRow],
    out: Path,
) -> list[FleetRow]:
    most = max(row.workers for row in wanted)
    singles = max(0, gpus - 2) if gpus else most
    if (gpus and gpus < most and not flags.share_gpu) or ("mixed" in flags.parts and not singles):
        raise NotStarted(
            f"{most} workers{' and a pair' if 'mixed' in flags.parts else ''} need "
            f"more GPUs than the {gpus} found"
        )
    served = _served(flags)
    cluster = FleetCluster(
        served=served,
        work=flags.work / "logs",
        sizes=flags.workers,
        mixed_singles=min(singles, most) if "mixed" in flags.parts else 0,
        gateway_processes=flags.gateway_processes
        or max(1, most // WORKERS_PER_GATEWAY_PROCESS if (os.cpu_count() or 1) > most else 1),
        boot_s=BOOT_S[flags.engine],
        gpus=gpus,
        share_gpu=flags.share_gpu,
    )
    try:
        first = most if any(row.part != "mixed" for row in wanted) else cluster.mixed_singles
        for index in range(first):
            cluster.start_worker(f"w{index}")
        if all(row.part == "mixed" for row in wanted):
            cluster.start_worker(cluster.pair, PAIR)
        for name in list(cluster.workers):
            await cluster.until_serving(name)
        print(
            f"{len(cluster.workers)} workers serve after {time.monotonic() - STARTED:.0f} s",
            flush=True,
        )
        if flags.heat and any(row.part != "mixed" for row in wanted):
            volume = _volume(flags, most)
            volume = replace(volume, streams=max(volume.streams, HEAT_STREAMS))
            await Runner(cluster, volume, FleetPlan((), _times(flags)), lambda: None, ()).heat(
                most, flags.heat
            )
        plan = fit(wanted, _times(flags), _left_s(flags))
        _say(plan)
        runner = Runner(cluster, _volume(flags, most), plan, lambda: _left_s(flags), done)
        common = _common(flags, served, plan)

        def record(row: FleetRow, made: dict[str, Any]) -> RecordedRow:
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            whole = {
                **common,
                "at": now,
                "key": row.key,
                **{name: getattr(row, name) for name in FleetRow.__slots__},
                **made,
            }
            whole["load_average"] = os.getloadavg()[0]
            with out.open("a") as file:
                file.write(json.dumps(whole) + "\n")
            print(line(whole), flush=True)
            return whole

        return [*await runner.run(record), *plan.left_out]
    finally:
        cluster.stop()


def _left_s(flags: argparse.Namespace) -> float | None:
    return None if flags.budget is None else flags.budget - RESERVE_S - (time.monotonic() - STARTED)


def _served(flags: argparse.Namespace) -> Served:
    if flags.engine == "sim":
        return simulated(
            flags.work, flags.adapters, flags.slots, flags.slow, flags.streams or SIM_SEQUENCES
        )
    sharing = max(flags.workers) if flags.share_gpu else 1
    return real(flags.work, flags.adapters, flags.slots, flags.shape, sharing)


def _volume(flags: argparse.Namespace, most: int) -> Volume:
    streams = (
        int((flags.streams or SIM_SEQUENCES) * SIM_CROWD)
        if flags.engine == "sim"
        else flags.streams or VLLM_STREAMS
    )
    spare = (os.cpu_count() or 1) > 2 * most
    return Volume(
        streams,
        flags.output_tokens,
        flags.generators or (max(1, most // WORKERS_PER_GENERATOR) if spare else 1),
        flags.timeout,
    )


def _times(flags: argparse.Namespace) -> FleetTimes:
    slow = flags.slow if flags.engine == "sim" else 1.0
    tail_s = 4.0 * slow
    return FleetTimes(
        flags.warm,
        flags.seconds,
        tail_s,
        flags.adapters * 0.015 * slow,
        SERVE_AGAIN_S[flags.engine],
        min(LEAST_MEASURE_S, flags.seconds),
    )


def _say(plan: FleetPlan) -> None:
    print(
        f"{len(plan.rows)} rows, {plan.times.warm_s:g} + {plan.times.measure_s:.1f} s of load each",
        flush=True,
    )
    for row in plan.left_out:
        print(f"does not fit into the time: {row.key}", flush=True)


def _common(flags: argparse.Namespace, served: Served, plan: FleetPlan) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "run": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": ["python", "-m", "bench.fleet", *sys.argv[1:]],
        "commit": commit(),
        "versions": versions(("loraplex", "vllm", "torch", "uvloop", "pyzmq")),
        "hardware": {
            "gpus": gpu_names(),
            "cores": os.cpu_count(),
            "cpu_model": cpu_model(),
            "platform": platform.platform(),
        },
        "served": served.facts,
        "output_tokens": flags.output_tokens,
        "warm_s": plan.times.warm_s,
        "measure_s": plan.times.measure_s,
    }


def _name(flags: argparse.Namespace) -> str:
    """The name holds the engine, the hardware and the day. So a call on another day begins a new
    file, unless --name names the old one.
    """
    gpus = gpu_names() if flags.engine == "vllm" else []
    kind = (
        re.sub(r"[^a-z0-9]+", "-", gpus[0].lower().replace("nvidia", "")).strip("-") if gpus else ""
    )
    hardware = f"{len(gpus)}x-{kind}" if gpus else f"{os.cpu_count()}cores"
    return f"fleet-{flags.engine}-{hardware}-{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"


def _publish(out: Path) -> None:
    made = read(out)
    if not made:
        return
    text = table(made)
    print(f"\n{text}")
    last = made[-1]
    hardware = last["hardware"]
    machine = (
        f"{len(hardware['gpus'])} x {hardware['gpus'][0]}"
        if hardware["gpus"]
        else f"{hardware['cores']} cores, {hardware['cpu_model']}"
    )
    calls = dict.fromkeys((" ".join(row["command"]), row["commit"][:13]) for row in made)
    head = "".join(f"`{command}` at commit {at}\n\n" for command, at in calls)
    head += f"{machine}, {last['at']}, {json.dumps(last['served'])}\n\n"
    out.with_suffix(".md").write_text(head + text + "\n")
    try:
        from bench.fleet.picture import draw

        draw(
            made,
            out.with_suffix(".png"),
            f"bench.fleet, {last['served']['engine']}, {machine}, {last['at'][:10]}",
        )
    except ImportError as exc:
        print(f"no picture: {exc}", file=sys.stderr)
    print(f"\nwritten: {out}, .md, .png")


if __name__ == "__main__":
    sys.exit(main())
