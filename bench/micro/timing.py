"""Shell. Times small functions: the least of several rounds, because everything that disturbs only adds."""

from __future__ import annotations

import sys
import timeit
from collections.abc import Callable, Mapping

ROUNDS = 7
ROUND_S = 0.05


def best_us(call: Callable[[], object]) -> float:
    """Microseconds of one call."""
    timer = timeit.Timer(call)
    number, took_s = timer.autorange()
    number = max(1, round(number * ROUND_S / took_s))
    return min(timer.repeat(ROUNDS, number)) / number * 1e6


def show(title: str, calls: Mapping[str, tuple[Callable[[], object], int, str]]) -> None:
    """Prints a table; each entry is (call, how many units one call handles, the unit)."""
    out = [f"{title}\n", "| operation | us per call | us per unit |", "|---|---|---|"]
    for name, (call, units, unit) in calls.items():
        took = best_us(call)
        out.append(f"| {name} | {took:,.2f} | {took / units:.3f} per {unit} |")
    sys.stdout.write("\n".join(out) + "\n")
