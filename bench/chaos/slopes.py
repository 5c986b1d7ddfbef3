"""Pure. What grows: a line through the measured values of each quantity after the warm-up."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import msgspec

UNIT_S = 600.0
"""A slope is told per ten minutes."""
MAX_RSS_SLOPE_MB = 1.0
MAX_COUNT_SLOPE = 1.0
"""Of files, sockets, threads and tasks: they go up and down, and a leak of one per ten minutes is
one.
"""
MB = float(1 << 20)
RSS = "RSS, MB"

Quantity = tuple[str, str]
"""Of which process, and which of its numbers."""
Values = Mapping[Quantity, float]


class SoakSample(msgspec.Struct, frozen=True):
    at_s: float
    values: dict[Quantity, float]


class Slope(msgspec.Struct, frozen=True):
    """From the end of the warm-up on. `per_unit`: growth in ten minutes."""

    quantity: Quantity
    first: float
    last: float
    per_unit: float

    @property
    def flat(self) -> bool:
        most = MAX_RSS_SLOPE_MB if self.quantity[1] == RSS else MAX_COUNT_SLOPE
        return self.per_unit < most


def slopes(samples: Sequence[SoakSample], warm_s: float) -> list[Slope]:
    """Of every quantity that all samples after the warm-up have. None with fewer than three."""
    kept = [sample for sample in samples if sample.at_s >= warm_s]
    if len(kept) < 3:
        return []
    at = [sample.at_s for sample in kept]
    shared = [q for q in kept[0].values if all(q in sample.values for sample in kept)]
    found = []
    for quantity in shared:
        values = [sample.values[quantity] for sample in kept]
        slope = statistics.linear_regression(at, values).slope * UNIT_S
        edge = max(1, len(values) // 5)
        first, last = statistics.fmean(values[:edge]), statistics.fmean(values[-edge:])
        found.append(Slope(quantity, first, last, slope))
    return found


def slope_table(found: Sequence[Slope]) -> str:
    """Markdown: a line per process and quantity."""
    lines = ["| process | what | at first | at last | per 10 minutes |", "|---|---|---|---|---|"]
    for slope in found:
        process, name = slope.quantity
        lines.append(
            f"| {process} | {name} | {slope.first:.1f} | {slope.last:.1f} | {slope.per_unit:+.2f} |"
        )
    return "\n".join(lines)


class SoakReport(msgspec.Struct, frozen=True, kw_only=True):
    """`left` are clients that left during an answer. `changes` are adapters that were added.
    `failures`: answers that failed or were wrong, and what was left when all had ended.
    """

    seconds: float
    answers: int
    left: int
    changes: int
    faults: int
    failures: list[str]
    slopes: list[Slope]

    @property
    def growing(self) -> list[str]:
        return [" ".join(slope.quantity) for slope in self.slopes if not slope.flat]

    @property
    def holds(self) -> bool:
        return bool(self.slopes) and not self.failures and not self.growing

    def text(self) -> str:
        """Markdown: a line per process and quantity, and what does not hold."""
        said = "holds" if self.holds else "DOES NOT HOLD"
        return "\n".join(
            [
                slope_table(self.slopes),
                "",
                *self.failures,
                *(f"grows: {quantity}" for quantity in self.growing),
                f"{said}: {self.seconds / 60:g} minutes, {self.answers} answers, {self.left} "
                f"clients left in the middle, {self.changes} adapters came and went, "
                f"{self.faults} faults",
            ]
        )
