"""Shell. `python -m bench.engine.cold`: what it costs to ask for a cold adapter.

The engine is real vLLM on a CPU, with the demo model. The adapters lie in S3, behind a line of
known bandwidth.

    python -m bench.engine.cold                          all three parts
    python -m bench.engine.cold --parts first --json F
        # first: cold adapters one after the other, each compared with the same adapter when warm
    python -m bench.engine.cold --parts many
        # many: many cold adapters at once on two workers, and what that does to a warm one
    python -m bench.engine.cold --parts catalog
        # catalog: a bucket of 1,000 and one of 10,000 adapters, without a worker

Each part prints a bound, and the ratio of the measured time to it. The bandwidth is measured with
plain GETs over the same line: on one connection before each single adapter, which is one part of
an upload, and on four before the many.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import sys
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import msgspec
import uvloop

from bench.engine.bucket import CREDENTIALS
from bench.engine.cold_parts import PARTS, ColdFigures
from bench.process import NotStarted
from bench.provenance import commit, cpu_model, versions


def main(arguments: Sequence[str] | None = None) -> int:
    flags = _read_flags(arguments)
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


def _read_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
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
        help=f"of {','.join(PARTS)} (default: all)",
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
    return parser.parse_args(arguments)


async def _in_folder(
    part: Callable[[Path, argparse.Namespace], Awaitable[ColdFigures]], flags: argparse.Namespace
) -> ColdFigures:
    with tempfile.TemporaryDirectory(prefix="bench-cold-", ignore_cleanup_errors=True) as folder:
        return await part(Path(folder), flags)


def table(made: ColdFigures, name: str = "") -> str:
    """Every figure has a line of its own. Seconds are shown as milliseconds."""
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


def about(arguments: Sequence[str]) -> ColdFigures:
    return {
        "schema": "loraplex.bench.cold/1",
        "started_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": ["python", "-m", "bench.engine.cold", *arguments],
        "commit": commit(),
        "versions": versions(("loraplex", "vllm", "aiobotocore", "moto")),
        "host": {
            "cores": os.cpu_count(),
            "cpu_model": cpu_model(),
            "platform": platform.platform(),
        },
        "loadavg_before": os.getloadavg(),
    }


if __name__ == "__main__":
    sys.exit(main())
