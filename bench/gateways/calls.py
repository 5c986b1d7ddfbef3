"""Shell. `python -m bench.gateways.calls`: what the gateway's own code does for an answer and for a
token, without sockets. Calls and instructions are exact, and the same on a busy machine.

    python -m bench.gateways.calls [--also CHECKOUT ...] [--rounds 40]
    python -m bench.gateways.calls --list whole      # which functions are called for it

Times are CPU microseconds. With `--also`, checkouts take turns within each round, and the ratio is
the median of the rounds: how much less or more this checkout spends than that one.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import msgspec

from bench import ROOT
from bench.gateways.in_process import Cost, Measurement

SCRIPT = ROOT / "bench" / "gateways" / "in_process.py"
WARM_UP, COUNTED = 5, 4
"""Rounds."""
SCENARIOS = {
    "whole": Measurement(adapter=False),
    "whole, adapter": Measurement(),
    "begin and end of a stream": Measurement(tokens=2, adapter=False),
    "stream of 16": Measurement(tokens=16, adapter=False),
    "whole, limits": Measurement(adapter=False, limited=True),
    "stream of 16, limits": Measurement(tokens=16, adapter=False, limited=True),
    "stream of 200": Measurement(tokens=200, adapter=False, rounds=2),
    "stream of 200, limits": Measurement(tokens=200, adapter=False, limited=True, rounds=2),
}
TOKENS = {
    "a token, 256 streams": (256, 2, 34),
    "a token, 8 streams": (8, 2, 130),
}
"""Clients, and the lengths of two streams whose difference is meant."""


@dataclass(slots=True)
class Checkout:
    """A checkout's gateway, in a process of its own that waits for measurements."""

    root: Path
    process: subprocess.Popen[str]
    found: dict[str, list[float]] = field(default_factory=dict)

    def cost(self, wanted: Measurement) -> Cost:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(msgspec.json.encode(wanted).decode(), file=self.process.stdin, flush=True)
        return msgspec.json.decode(self.process.stdout.readline(), type=Cost)

    def spent(self, name: str) -> float:
        """CPU microseconds of one round."""
        if name in SCENARIOS:
            return self.cost(SCENARIOS[name]).cpu_us
        short, long = (self.cost(m).cpu_us for m in _two(name))
        return (long - short) / _apart(name)

    def counted(self, name: str) -> tuple[float, ...]:
        """The calls of Python functions and of functions in C, and the instructions."""
        if name in SCENARIOS:
            return _counts(self.cost(_counted(SCENARIOS[name])))
        short, long = (_counts(self.cost(_counted(m))) for m in _two(name))
        return tuple((b - a) / _apart(name) for a, b in zip(short, long, strict=True))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gateways.calls")
    parser.add_argument("--also", type=Path, action="append", default=[], metavar="CHECKOUT")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--list", choices=SCENARIOS, help="the functions that are called for it")
    flags = parser.parse_args(arguments)
    with contextlib.ExitStack() as stack:
        checkouts = [_start(root.resolve(), SCRIPT, stack) for root in (ROOT, *flags.also)]
        if flags.list:
            _show_calls(checkouts[0].cost(_counted(SCENARIOS[flags.list])))
        else:
            compare(checkouts, flags.rounds)
    return 0


def compare(checkouts: Sequence[Checkout], rounds: int) -> None:
    names = [*SCENARIOS, *TOKENS]
    for number in range(-WARM_UP, rounds):
        for name in names:
            for checkout in checkouts:
                cpu_us = checkout.spent(name)
                if number >= 0:
                    checkout.found.setdefault(name, []).append(cpu_us)
    first, *others = checkouts
    heads = [f"{c.root.name}: calls | in C | instructions | us" for c in checkouts]
    heads += [f"time to {c.root.name}" for c in others]
    columns = 4 * len(checkouts) + len(others)
    print("| | " + " | ".join(heads) + " |\n|---" + "|---:" * columns + "|")
    for name in names:
        cells = []
        for checkout in checkouts:
            calls, c_calls, instructions = checkout.counted(name)
            spent_us = median(checkout.found[name])
            cells.append(f"{calls:.1f} | {c_calls:.1f} | {instructions:.0f} | {spent_us:.2f}")
        for other in others:
            pairs = zip(first.found[name], other.found[name], strict=True)
            cells.append(f"{median(a / b for a, b in pairs):.3f}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    for without in SCENARIOS:
        limited = f"{without}, limits"
        if limited in SCENARIOS:
            pairs = zip(first.found[limited], first.found[without], strict=True)
            print(f"{limited}: {median(a / b for a, b in pairs):.3f} of the time without")


def _start(root: Path, script: Path, stack: contextlib.ExitStack) -> Checkout:
    process = subprocess.Popen(
        [sys.executable, str(script)],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    stack.callback(process.wait)
    assert process.stdin is not None
    stack.callback(process.stdin.close)
    return Checkout(root, process)


def _counts(cost: Cost) -> tuple[float, float, float]:
    return cost.all_calls, cost.c_calls, cost.instructions


def _counted(wanted: Measurement) -> Measurement:
    return msgspec.structs.replace(wanted, counted=True, rounds=COUNTED)


def _two(name: str) -> list[Measurement]:
    clients, *lengths = TOKENS[name]
    return [
        Measurement(clients=clients, tokens=n, adapter=False, rounds=max(1, 256 // clients // 4))
        for n in lengths
    ]


def _apart(name: str) -> int:
    _, short, long = TOKENS[name]
    return long - short


def _show_calls(cost: Cost) -> None:
    for name, calls in sorted(cost.calls.items(), key=lambda item: (-item[1], item[0])):
        print(f"{calls:8.2f}  {name}")
    print(f"{cost.all_calls:8.2f}  in all, and {cost.c_calls:.2f} of functions in C")
    print(f"{cost.instructions:8.2f}  instructions")


if __name__ == "__main__":
    sys.exit(main())
