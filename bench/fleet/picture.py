"""Shell. The picture of a fleet's rows: throughput against workers, TTFT per policy, a worker's
death. Imports matplotlib only when it draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.fleet.figures import RecordedRow, medians, paces, scale
from bench.fleet.plan import POLICIES
from bench.routing.report.plot import COLOURS

WIDTH = 0.2


def draw(rows: Sequence[RecordedRow], path: Path, title: str) -> None:
    """Raises: ImportError without matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), layout="constrained", dpi=110)
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(2, 2)
    _scale(axes[0, 0], rows)
    _policies(axes[0, 1], rows, "ttft_p99", "p99 TTFT, ms (log): less is better", 1e3)
    _policies(
        axes[1, 0], rows, "loads_per_1000", "Adapter loads per 1,000 requests: less is better", 1.0
    )
    _kill(axes[1, 1], rows)
    figure.savefig(path)


def _scale(axes: Any, rows: Sequence[RecordedRow]) -> None:
    axes.set(
        title="Output tokens/s against workers (dashed: linear)",
        xlabel="workers",
        ylabel="output tokens/s",
    )
    for part, label, colour in (
        ("scale", "adapters", "tab:blue"),
        ("base", "base model", "tab:gray"),
    ):
        made = sorted(scale(rows, part).items())
        if made:
            counts = [n for n, _ in made]
            each = made[0][1] / made[0][0]
            axes.plot(counts, [n * each for n in counts], "--", color=colour, alpha=0.6)
            axes.plot(counts, [tokens for _, tokens in made], "o-", color=colour, label=label)
            axes.set_xticks(counts)
            axes.legend()
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def _policies(
    axes: Any, rows: Sequence[RecordedRow], figure: str, title: str, factor: float
) -> None:
    cells, loads = medians(rows), paces(rows)
    shown = [policy for policy in POLICIES if any((policy, at) in cells for at in loads)]
    for nth, policy in enumerate(shown):
        places = [group + (nth - (len(shown) - 1) / 2) * WIDTH for group in range(len(loads))]
        heights = [cells.get((policy, at), {}).get(figure, math.nan) * factor for at in loads]
        bars = axes.bar(places, heights, WIDTH, color=COLOURS[policy], label=policy)
        axes.bar_label(
            bars, labels=["" if math.isnan(h) else f"{h:,.0f}" for h in heights], fontsize=7
        )
    axes.set_title(title)
    axes.set_xticks(range(len(loads)))
    axes.set_xticklabels(loads)
    if figure.startswith("ttft") and cells:
        axes.set_yscale("log")
        drawn = [of[figure] * factor for of in cells.values()]
        # room for the legend
        axes.set_ylim(10 ** math.floor(math.log10(min(drawn) / 2)), 3 * max(drawn))
    axes.legend(fontsize=8)
    axes.grid(axis="y", alpha=0.3)


def _kill(axes: Any, rows: Sequence[RecordedRow]) -> None:
    killed = [row["kill"] for row in rows if row["part"] == "kill"]
    axes.set_visible(bool(killed))
    axes.set(
        title="A worker killed under load",
        xlabel="seconds since it was killed",
        ylabel="output tokens/s",
    )
    if killed:
        kill = killed[-1]
        bin_s, per_s = kill["bin_s"], round(1 / kill["bin_s"])
        whole = [
            sum(kill["tokens_by_bin"][at : at + per_s])
            for at in range(0, len(kill["tokens_by_bin"]) - per_s + 1, per_s)
        ]
        axes.step(
            [at * per_s * bin_s - kill["killed_at_s"] for at in range(len(whole))],
            whole,
            where="post",
            color="tab:blue",
        )
        axes.axvline(0, color="tab:red", label="killed")
        again_s = kill["worker_serves_again_s"]
        if again_s is not None:
            axes.axvline(again_s, color="tab:green", label="restarted worker serves")
        axes.set_ylim(bottom=0)
        axes.legend()
    axes.grid(alpha=0.3)
