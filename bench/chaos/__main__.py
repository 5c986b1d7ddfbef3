"""Shell. `python -m bench.chaos` (`make chaos`): clusters under load while their processes are
killed, stopped, cut off, drained and replaced, and every token of every answer compared.

    python -m bench.chaos
        # every scenario on the simulated engine, two minutes each
    python -m bench.chaos --engine vllm --scenario kill,stop,engine-kill,engine-stop
        # real vLLM with the demo model
    python -m bench.chaos --scenario kill --seconds 20

Exit status 1 if an answer failed or was wrong, a cluster did not recover, or something was left.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from bench.chaos.figures import ChaosRow, progress, table
from bench.chaos.runner import ChaosRun, Effort
from bench.chaos.scenarios import SCENARIOS, Scenario
from bench.load.__main__ import raise_open_files_limit
from bench.process import NotStarted


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 if something does not hold, 2 if a cluster did not start."""
    flags = _flags(arguments)
    raise_open_files_limit()
    rows = []
    try:
        for scenario in flags.scenario:
            if flags.engine in scenario.engines:
                rows.append(asyncio.run(_run(scenario, flags)))
    except NotStarted as exc:
        print(f"bench.chaos: {exc}", file=sys.stderr)
        return 2
    print(f"\n{table(rows)}")
    if flags.out is not None:
        flags.out.write_bytes(msgspec.json.format(msgspec.json.encode(rows)))
    return 0 if all(row.holds for row in rows) else 1


async def _run(scenario: Scenario, flags: argparse.Namespace) -> ChaosRow:
    command = " ".join(["python -m bench.chaos", *sys.argv[1:]])
    effort = Effort(flags.engine, flags.seconds, flags.streams, flags.workers, flags.seed, command)
    row = await ChaosRun(scenario, effort, _say).run()
    print(f"{'holds' if row.holds else 'DOES NOT HOLD'}: {progress(row)}", flush=True)
    for said in [row.failure, *row.examples]:
        if said:
            print(f"    {said}", flush=True)
    return row


def _say(row: ChaosRow) -> None:
    print(progress(row), flush=True)


def _scenarios(text: str) -> list[Scenario]:
    names = text.split(",")
    unknown = [name for name in names if name not in SCENARIOS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]}: known are {', '.join(SCENARIOS)}")
    return [SCENARIOS[name] for name in names]


def _flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.chaos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--scenario",
        type=_scenarios,
        default=list(SCENARIOS.values()),
        metavar="NAME,NAME",
        help=f"of {', '.join(SCENARIOS)} (default: all)",
    )
    parser.add_argument("--engine", choices=("sim", "vllm"), default="sim")
    parser.add_argument("--seconds", type=float, default=120.0, help="of faults (%(default)g)")
    parser.add_argument("--streams", type=int, default=64, help="at a time (%(default)s)")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1, help="of what is struck and asked")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the rows as JSON")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
