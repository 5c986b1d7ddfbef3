"""Shell. The picture of a comparison: four panels of bars in one PNG."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PANELS = (
    ("c256_us_per_token", "256 streams, 20 ms: CPU per token, us"),
    ("d_us_per_token", "1,000 streams, 50 ms: CPU per token, us"),
    ("a64_us_per_request", "whole answers, 64 clients: CPU per request, us"),
    ("added_ttft_ms", "time to first token added, one client, ms"),
)


def draw(made: Mapping[str, Any], path: str) -> None:
    """Raises: ImportError without matplotlib, OSError if the file cannot be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained", dpi=110)
    axes = figure.subplots(2, 2)
    host = made["host"]
    figure.suptitle(
        "CPU of the gateway's processes; median, least and most of "
        f"{made['repetitions']} interleaved repetitions\n"
        f"{host['cpu_model']}, {host['cores']} cores, {made['started_at']}, {made['commit'][:12]}",
        fontsize=10,
    )
    for panel, (key, title) in zip(axes.flat, PANELS, strict=True):
        _bars(
            panel,
            {peer: row[key] for peer, row in made["summary"].items() if row[key] is not None},
            title,
        )
    figure.savefig(path)


def _bars(panel: Any, values: Mapping[str, Mapping[str, float]], title: str) -> None:
    names = list(values)
    panel.set_visible(bool(names))  # a load that was not asked for
    middles = [values[n]["median"] for n in names]
    errors = [
        [values[n]["median"] - values[n]["least"] for n in names],
        [values[n]["most"] - values[n]["median"] for n in names],
    ]
    colours = ["tab:blue" if n == "loraplex" else "tab:gray" for n in names]
    panel.barh(names, middles, xerr=errors, color=colours, ecolor="black", capsize=2)
    for index, middle in enumerate(middles):
        panel.text(
            values[names[index]]["most"],
            index,
            "  " + (f"{middle:,.0f}" if middle >= 100 else f"{middle:.3g}"),
            va="center",
            fontsize=8,
        )
    panel.invert_yaxis()
    panel.set_title(title, fontsize=10)
    panel.grid(alpha=0.3, axis="x")
    if middles and max(middles) > 20 * max(min(middles), 1e-9) > 0:
        panel.set_xscale("log")
        # room for the longest label
        panel.set_xlim(right=max(v["most"] for v in values.values()) * 5)
    panel.margins(x=0.18)
