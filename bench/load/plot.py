"""Shell. The picture of a load run: four panels in one PNG. matplotlib is imported only when it
draws.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from typing import Any

from bench.load.measure import SMALLEST_GAP_S, Histogram, LoadRun, cold_flags, percentile

TITLE_COLUMNS = 150
LEAST_BIN_SHARE = 0.2
"""The last bin of the timeline is cut off by the end of the run; a sliver of it would show as
noise.
"""


def plot(run: LoadRun, made: Mapping[str, Any], path: str, title: str) -> None:
    """Draws four panels into a PNG: TTFT by cold and warm, gaps between tokens, throughput over
    time, the hottest adapters.

    Raises: ImportError without matplotlib, OSError if the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained", dpi=110)
    axes = figure.subplots(2, 2)
    figure.suptitle(
        "\n".join(
            part for line in title.splitlines() for part in textwrap.wrap(line, TITLE_COLUMNS)
        ),
        fontsize=10,
    )
    _plot_first_tokens(axes[0, 0], run)
    _plot_gaps(axes[0, 1], run.meter.gaps)
    _plot_timeline(axes[1, 0], made["timeline"], made["duration_s"])
    _plot_adapters(axes[1, 1], made["adapters"])
    figure.savefig(path)


def _plot_first_tokens(axes: Any, run: LoadRun) -> None:
    flags = cold_flags(run.outcomes, run.warmed)
    streamed = any(outcome.ttft_s is not None for outcome in run.outcomes)
    for label, wanted, colour in (("warm", False, "tab:blue"), ("cold adapter", True, "tab:red")):
        pairs = [
            (o.ttft_s if streamed else o.e2e_s)
            for o, flag in zip(run.outcomes, flags, strict=True)
            if o.error is None and flag is wanted
        ]
        times_ms = sorted(time_s * 1e3 for time_s in pairs if time_s is not None)
        if times_ms:
            shares = [(index + 1) / len(times_ms) for index in range(len(times_ms))]
            p99 = percentile(times_ms, 0.99)
            axes.step(
                times_ms,
                shares,
                where="post",
                color=colour,
                label=f"{label}: n={len(times_ms)}, p50 {percentile(times_ms, 0.5):.1f}, p99 "
                f"{p99:.1f} ms",
            )
    _style_cdf(axes, "Time to first token" if streamed else "Time to the whole answer")


def _plot_gaps(axes: Any, gaps: Histogram) -> None:
    if gaps.count:
        times_s, shares = gaps.cdf()
        label = (
            f"n={gaps.count:,}, p50 {gaps.percentile(0.5) * 1e3:.1f}, p99 "
            f"{gaps.percentile(0.99) * 1e3:.1f} ms"
        )
        axes.step(
            [max(time_s, SMALLEST_GAP_S) * 1e3 for time_s in times_s],
            shares,
            where="post",
            color="tab:green",
            label=label,
        )
        axes.set_xlim(
            left=max(SMALLEST_GAP_S, gaps.percentile(0.01) / 2) * 1e3,
            right=max(gaps.max_s, SMALLEST_GAP_S * 2) * 1.2e3,
        )
    _style_cdf(axes, "Gap between tokens of a stream")


def _style_cdf(axes: Any, title: str) -> None:
    from matplotlib.ticker import LogLocator

    axes.set(
        title=title,
        xlabel="milliseconds (log)",
        ylabel="share of all",
        ylim=(0, 1.25),
        yticks=(0, 0.25, 0.5, 0.75, 1),
    )
    axes.grid(alpha=0.3, which="both")
    if axes.get_legend_handles_labels()[0]:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.legend(loc="upper left", fontsize=9)
    else:
        axes.text(0.5, 0.5, "nothing to show", ha="center", va="center", transform=axes.transAxes)


def _plot_timeline(axes: Any, timeline: Mapping[str, Any], duration_s: float) -> None:
    bin_s = timeline["bin_s"]
    last_s = duration_s % bin_s
    bins = len(timeline["output_tokens"]) - (
        last_s < LEAST_BIN_SHARE * bin_s and duration_s > bin_s
    )

    def per_s(name: str) -> list[float]:
        rates = [count / bin_s for count in timeline[name][:bins]]
        if bins == len(timeline[name]) and last_s > 0:
            rates[-1] *= bin_s / last_s
        return rates

    times_s = [index * bin_s for index in range(bins)]
    axes.step(
        times_s, per_s("output_tokens"), where="post", color="tab:blue", label="output tokens/s"
    )
    axes.set(
        title="Throughput over time",
        xlabel="seconds since the start",
        ylabel="output tokens/s",
        xlim=(0, max(duration_s, bin_s)),
    )
    axes.set_ylim(0, axes.get_ylim()[1] * 1.15)  # room for the legend
    axes.grid(alpha=0.3)
    requests = axes.twinx()
    requests.step(
        times_s, per_s("completed"), where="post", color="tab:gray", alpha=0.7, label="answers/s"
    )
    if any(timeline["failed"]):
        requests.step(times_s, per_s("failed"), where="post", color="tab:red", label="failures/s")
    requests.set_ylabel("requests/s")
    requests.set_ylim(0, requests.get_ylim()[1] * 1.15)
    handles = [*axes.get_legend_handles_labels()[0], *requests.get_legend_handles_labels()[0]]
    axes.legend(handles=handles, loc="upper center", ncols=3, fontsize=9)


def _plot_adapters(axes: Any, adapters: Mapping[str, Any]) -> None:
    rows = adapters["top"]
    names = [row["adapter"] or "(base)" for row in rows]
    axes.bar(names, [row["requests"] for row in rows], color="tab:blue", label="requests")
    axes.bar(names, [row["failed"] for row in rows], color="tab:red", label="failed")
    axes.set(
        title=f"The {len(rows)} models asked for most ({adapters['seen']} adapters seen)",
        ylabel="requests",
    )
    axes.tick_params(axis="x", rotation=60, labelsize=8)
    # room for the legend
    axes.set_ylim(top=max((row["requests"] for row in rows), default=1) * 1.25)
    figures = [row["ttft"] or row["e2e"] for row in rows]
    if any(figures):
        latencies = axes.twinx()
        label = "p99 TTFT" if any(row["ttft"] for row in rows) else "p99 E2E"
        latencies.plot(
            names,
            [entry["p99"] * 1e3 if entry else math.nan for entry in figures],
            "o",
            color="tab:orange",
            label=label,
        )
        latencies.set_ylabel(f"{label}, ms")
        latencies.set_ylim(0, max(entry["p99"] for entry in figures if entry) * 1.25e3)
        axes.legend(
            handles=[
                *axes.get_legend_handles_labels()[0],
                *latencies.get_legend_handles_labels()[0],
            ],
            loc="upper center",
            ncols=3,
            fontsize=9,
        )
