"""Shell. `loraplex advise`: slots, workers and pins for the traffic of a running gateway, or of an
access log. With `--simulate` the simulator looks at it too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from gateway.advisor.advice import FleetSize, Goal, advise
from gateway.advisor.question import (
    SimulatorAnswer,
    SimulatorQuestion,
    decode_answer,
    encode,
)
from gateway.advisor.traffic import Traffic, from_access_log
from gateway.cli.client import (
    CommandFailed,
    GatewayClient,
    gateway_flags,
    read_key,
    show_table,
)
from loraplex.start import command
from shared.option_numbers import count, seconds, some_share

COMPARED = ("model", "", "simulator", "formulas", "error of the formulas")
COLUMNS = ("model", "adapters", "in flight", "slots", "slots wanted", "workers", "workers wanted")


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "advise",
        help="how many slots and workers the traffic needs, and which adapters to pin",
        description="Slots, workers and pins for a wanted share of misses and a wanted time to the "
        "first token, by closed forms (docs/SCALING.md says how exact they are).",
    )
    gateway_flags(parser)
    parser.add_argument(
        "--from",
        dest="log",
        type=Path,
        metavar="ACCESS_LOG",
        help="a gateway's log in JSON lines instead of a running gateway; of several, put together",
    )
    parser.add_argument(
        "--miss-rate",
        type=some_share,
        default=Goal().miss_rate,
        help="wanted (default %(default)s)",
    )
    parser.add_argument("--ttft-p99", type=seconds, metavar="SECONDS", help="wanted")
    for name, default in (("workers", 1), ("slots", 16), ("capacity", 256)):
        text = "of the fleet" if name == "workers" else "of one worker"
        parser.add_argument(
            f"--{name}",
            type=count,
            default=default,
            help=f"{text}, with --from (default {default})",
        )
    parser.add_argument(
        "--simulate",
        action="store_true",
        help="also run the gateway's own code in virtual time, with this traffic and fleets of "
        "several sizes; takes up to a minute or two of one core",
    )
    parser.add_argument("--json", action="store_true", help="print everything, as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    try:
        models, seen = _of_log(args) if args.log is not None else _of_gateway(args)
        if args.simulate:
            for name, model in models.items():
                goal = Goal(args.miss_rate, args.ttft_p99)
                model["simulated"] = msgspec.to_builtins(_simulated(model, seen[name], goal))
    except (CommandFailed, OSError) as exc:
        print(f"loraplex advise: {exc}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(models))
        return 0
    show_table(COLUMNS, [_row(name, model) for name, model in models.items()])
    if args.simulate:
        print()
        show_table(
            COMPARED, [row for name, model in models.items() for row in _errors(name, model)]
        )
        print()
    for name, model in models.items():
        for sentence in model["words"]:
            print(f"{name}: {sentence}")
    return 0


def _of_log(args: argparse.Namespace) -> tuple[dict[str, Any], Mapping[str, Traffic]]:
    """Advice and traffic of each model. Raises OSError, CommandFailed."""
    fleet = FleetSize(args.workers, args.slots, args.capacity)
    goal = Goal(args.miss_rate, args.ttft_p99)
    with args.log.open("rb") as lines:
        found, unreadable = from_access_log(lines)
    if unreadable:
        print(
            f"{unreadable} line(s) of {args.log} cannot be read and do not count", file=sys.stderr
        )
    if not found:
        raise CommandFailed(f"{args.log} has no lines of requests in JSON (is it unpacked?)")
    advices = {
        base: msgspec.to_builtins(advise(traffic, fleet, goal)) for base, traffic in found.items()
    }
    return advices, found


def _of_gateway(args: argparse.Namespace) -> tuple[dict[str, Any], Mapping[str, Traffic]]:
    """Advice of each model, and its traffic where it is needed. Raises CommandFailed."""
    query = {"miss_rate": str(args.miss_rate)}
    if args.ttft_p99 is not None:
        query["ttft_p99_s"] = str(args.ttft_p99)
    if args.simulate:
        query["traffic"] = "1"
    gateway = GatewayClient(args.url, read_key(args.key_file))
    status, answer = gateway.call("GET", "/admin/advise", query)
    if status != 200:
        raise CommandFailed(f"{args.url} answered {status}")
    models: dict[str, Any] = answer["models"]
    return models, msgspec.convert(answer.get("traffic", {}), dict[str, Traffic])


def _simulated(model: dict[str, Any], traffic: Traffic, goal: Goal) -> SimulatorAnswer | None:
    """What the simulator finds. It is a program of its own: it is a benchmark, and the product
    imports none. None: there is no traffic, or no worker whose size is known.

    Raises CommandFailed.
    """
    fleet = msgspec.convert(model["fleet"], FleetSize)
    if not traffic.requests or not fleet.slots:
        return None
    question = encode(SimulatorQuestion(traffic, fleet, goal, model["workers"]))
    done = subprocess.run(
        command("bench.what_if"), input=question, stdout=subprocess.PIPE, check=False
    )
    if done.returncode:
        raise CommandFailed(f"the simulator ended with status {done.returncode}; see above")
    return decode_answer(done.stdout)


def _errors(name: str, model: dict[str, Any]) -> list[tuple[str, ...]]:
    """What the simulator found beside the formulas, for what both know."""
    found = model["simulated"]
    if found is None:
        return [(name, "nothing to simulate", "-", "-", "-")]
    fleets = {}
    if found["workers"] == model["workers"]:  # else the formulas told of another number
        fleets[found["workers"]] = (found["then"], model["then"])
    fleets[model["fleet"]["workers"]] = (found["now"], model["now"])
    rows: list[tuple[str, ...]] = []
    for workers, (theirs, ours) in fleets.items():
        if theirs is None or ours is None:
            continue
        a, b = theirs["miss_rate"], ours["miss_rate"]
        text = f"{100 * (b - a):+.1f} points"
        rows.append((name, f"misses with {workers} worker(s)", f"{a:.1%}", f"{b:.1%}", text))
        a, b = theirs["ttft_p99_s"], ours["ttft_p99_s"]
        text = f"{b / a - 1:+.0%}" if a and b else "-"
        rows.append((name, f"first token p99 with {workers}", _time(a), _time(b), text))
    wanted = _shown(found["workers"]), _shown(model["workers"])
    both = found["workers"] is not None and model["workers"] is not None
    text = f"{model['workers'] - found['workers']:+d}" if both else "-"
    return [*rows, (name, "workers wanted", *wanted, text)]


def _time(seconds: float | None) -> str:
    return "cannot keep up" if seconds is None else f"{1e3 * seconds:.0f} ms"


def _row(name: str, model: dict[str, Any]) -> tuple[str, ...]:
    fleet = model["fleet"]
    return (
        name,
        str(model["adapters"]),
        f"{model['in_flight']:.1f}",
        str(fleet["workers"] * fleet["slots"]),
        _shown(model["slots"]),
        str(fleet["workers"]),
        _shown(model["workers"]),
    )


def _shown(count: int | None) -> str:
    return "-" if count is None else str(count)
