"""Shell. `python -m bench.fleet` (`make bench-fleet`): one gateway and a worker per GPU, on 2, 4
and 8 of them, or with the simulated engine.

    python -m bench.fleet --engine vllm --workers 2,4,8 --budget 560 --parts scale,policies
    python -m bench.fleet --engine vllm --workers 2,4,8 --budget 560 --parts base,kill
    python -m bench.fleet --engine vllm --workers 8 --budget 560 --parts mixed
    python -m bench.fleet --engine vllm --workers 4 --budget 560 --parts policies --rps 8,10
        # a load that the slots hold
    python -m bench.fleet --engine sim --workers 2,4,8
        # the rehearsal, no GPU

Parts: `scale` saturates every size of fleet in a closed loop over all adapters, `base` with the
base model alone; `policies` sends Poisson arrivals at 70% and 95% of the largest one's capacity (or
--rps requests/s a worker) to each policy, only the gateway being started again between them; `kill`
kills a worker at 70% (or the lowest of --rps); `mixed` puts a worker with tensor parallel 2 and a
model of its own beside the single ones. Every row is appended to a JSONL file in --out as soon as
it exists and not measured again, so a run that was cut off, or did not fit into --budget, goes on
where it stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.fleet.cluster import FleetCluster
from bench.fleet.figures import RecordedRow, line, table
from bench.fleet.plan import PARTS, POLICIES, FleetRow, FleetTimes, Plan, fit, rows, with_capacity
from bench.fleet.run import Runner, Volume, read
from bench.fleet.served import PAIR, Served, real, simulated
from bench.gateways.__main__ import RESULTS, commit
from bench.load.__main__ import raise_open_files_limit
from bench.process import NotStarted
from shared.runtime.process import count_gpus

SCHEMA = "loraplex.bench.fleet/1"
STARTED = time.monotonic()
WORKERS_PER_GATEWAY_PROCESS = 4
"""A process takes some 60,000 tokens/s at the least; 4 H200 make 35,000. The rest is room."""
WORKERS_PER_GENERATOR = 2
BOOT_S = {"sim": 60.0, "vllm": 420.0}
SERVE_AGAIN_S = {"sim": 10.0, "vllm": 200.0}
HEAT_S = {"sim": 0.0, "vllm": 20.0}
SIM_SEQUENCES = 32
SIM_CROWD = 1.5
"""Streams per sequence of the simulated engine: a fleet that has just as many streams as places
leaves some places empty.
"""
VLLM_STREAMS = 256
RESERVE_S = 10.0  # to end everything and draw
LEAST_MEASURE_S = 8.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 if rows are left for another call, 2 if it could not run."""
    flags = _flags(arguments)
    raise_open_files_limit()
    gpus = count_gpus() if flags.engine == "vllm" else 0
    out: Path = flags.out / f"{flags.name or _name(flags)}.jsonl"
    flags.out.mkdir(parents=True, exist_ok=True)
    flags.work.mkdir(parents=True, exist_ok=True)
    done = read(out)
    try:
        wanted = with_capacity(
            rows(flags.parts, flags.workers, flags.policies, flags.repetitions, flags.rps),
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
    if (gpus and gpus < most) or ("mixed" in flags.parts and not singles):
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
            await Runner(
                cluster, _volume(flags, most), Plan((), _times(flags)), lambda: None, ()
            ).heat(most, flags.heat)
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
    return real(flags.work, flags.adapters, flags.slots, flags.shape)


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


def _say(plan: Plan) -> None:
    print(
        f"{len(plan.rows)} rows, {plan.times.warm_s:g} + {plan.times.measure_s:.1f} s of load each",
        flush=True,
    )
    for row in plan.left_out:
        print(f"does not fit into the time: {row.key}", flush=True)


def _common(flags: argparse.Namespace, served: Served, plan: Plan) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "run": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": ["python", "-m", "bench.fleet", *sys.argv[1:]],
        "commit": commit(),
        "versions": {
            name: _version(name) for name in ("loraplex", "vllm", "torch", "uvloop", "pyzmq")
        }
        | {"python": platform.python_version()},
        "hardware": {
            "gpus": _gpu_names(),
            "cores": os.cpu_count(),
            "cpu_model": _cpu_model(),
            "platform": platform.platform(),
        },
        "served": served.facts,
        "output_tokens": flags.output_tokens,
        "warm_s": plan.times.warm_s,
        "measure_s": plan.times.measure_s,
    }


def _version(package: str) -> str | None:
    for name in (package, f"{package}-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _gpu_names() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    asked = subprocess.run(
        ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    return [name.strip() for name in asked.stdout.splitlines() if name.strip()]


def _cpu_model() -> str:
    found = (
        re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        if Path("/proc/cpuinfo").exists()
        else None
    )
    return found[1] if found else platform.machine()


def _name(flags: argparse.Namespace) -> str:
    """Engine, hardware and day: a call on another day begins anew, unless --name says otherwise."""
    gpus = _gpu_names() if flags.engine == "vllm" else []
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


def _flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.fleet",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--engine", choices=("sim", "vllm"), default="vllm")
    parser.add_argument(
        "--workers",
        type=_numbers,
        default=[2, 4, 8],
        metavar="N,N",
        help="sizes of the fleet (default 2,4,8)",
    )
    parser.add_argument(
        "--parts",
        type=_words(PARTS),
        default=list(PARTS[:-1]),
        help=f"of {','.join(PARTS)} (default: all but mixed)",
    )
    parser.add_argument(
        "--mixed", dest="parts", action=_Also, const="mixed", nargs=0, help="the part `mixed` too"
    )
    parser.add_argument(
        "--policies", type=_words(POLICIES), default=list(POLICIES), help="default: all three"
    )
    parser.add_argument(
        "--rps",
        type=_rates,
        default=[],
        metavar="R,R",
        help="policies and kill at so many requests/s a worker, instead of shares of the capacity",
    )
    parser.add_argument(
        "--repetitions", type=int, default=1, help="of the policies (default %(default)s)"
    )
    parser.add_argument(
        "--budget",
        type=float,
        metavar="S",
        help="the whole call, boot included; what does not fit is trimmed, then left out",
    )
    parser.add_argument(
        "--warm",
        type=float,
        default=6.0,
        metavar="S",
        help="of each load, not counted (default %(default)s)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=12.0,
        metavar="S",
        help="of each load, counted (default %(default)s)",
    )
    parser.add_argument(
        "--heat",
        type=float,
        metavar="S",
        help="of load before everything else (default 20 for vllm, 0 for sim)",
    )
    parser.add_argument(
        "--streams",
        type=int,
        metavar="N",
        help=f"per worker in a closed loop (default {VLLM_STREAMS}); sim: places ({SIM_SEQUENCES})",
    )
    parser.add_argument("--adapters", type=int, default=256)
    parser.add_argument("--slots", type=int, default=16, help="per worker (default %(default)s)")
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument(
        "--shape",
        choices=("8b", "tiny"),
        default="8b",
        help="of the model for vllm; tiny is for CPUs",
    )
    parser.add_argument(
        "--slow",
        type=float,
        default=4.0,
        metavar="F",
        help="sim: an H200's times, stretched so often (default %(default)s)",
    )
    parser.add_argument(
        "--gateway-processes",
        type=int,
        metavar="N",
        help="default one for every 4 workers where there are cores, else 1",
    )
    parser.add_argument(
        "--generators",
        type=int,
        metavar="N",
        help="default one for every 2 workers where there are cores, else 1",
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS, metavar="DIR", help="default bench/results"
    )
    parser.add_argument(
        "--name", help="of the files in --out (default: fleet-ENGINE-HARDWARE-DATE)"
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("/tmp/loraplex-fleet"),
        metavar="DIR",
        help="model, adapters, logs (default %(default)s)",
    )
    flags = parser.parse_args(arguments)
    flags.heat = HEAT_S[flags.engine] if flags.heat is None else flags.heat
    return flags


class _Also(argparse.Action):
    """Adds `const` to a list."""

    def __call__(
        self,
        parser: Any,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, [*getattr(namespace, self.dest), self.const])


def _numbers(text: str) -> list[int]:
    made = sorted({int(part) for part in text.split(",")})
    if made[0] < 1:
        raise argparse.ArgumentTypeError(f"{text}: a fleet has at least one worker")
    return made


def _rates(text: str) -> list[float]:
    made = sorted({float(part) for part in text.split(",")})
    if not 0 < made[0] <= made[-1] < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: a rate is above 0")
    return made


def _words(known: Sequence[str]) -> Any:
    def words(text: str) -> list[str]:
        made = text.split(",")
        unknown = [word for word in made if word not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: there are {', '.join(known)}")
        return made

    return words


if __name__ == "__main__":
    sys.exit(main())
