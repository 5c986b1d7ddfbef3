"""Shell. The pictures of a simulation: policies side by side, growth, events. Imports matplotlib
only when it draws.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

COLOURS = {
    "round-robin": "#bdbdbd",
    "random": "#969696",
    "least-loaded": "#525252",
    "p2c": "#9ecae1",
    "residency-p2c": "#3182bd",
    "ray-strict": "#fdae6b",
    "ray": "#e6550d",
    "expected-ttft": "#31a354",
    "one-pool": "#f7b6d2",
    "clairvoyant": "#c51b8a",
}
OTHER = "#756bb1"
PANELS = (
    ("capacity_rps", "Capacity (p99 TTFT at most 0.5 s), requests/s: more is better", 1.0, False),
    ("ttft_p99_s", "p99 TTFT at the common rate, ms (log): less is better", 1e3, True),
    ("ttft_p50_s", "p50 TTFT at the common rate, ms (log): less is better", 1e3, True),
    ("loads_per_request", "Adapter loads per request: less is better", 1.0, False),
    ("hit_rate", "Share of requests that find their adapter in a slot: more is better", 1.0, False),
    ("jain", "Fairness: Jain's index over adapters' mean TTFT: more is better", 1.0, False),
)
GROWTH_PANELS = tuple(panel for panel in PANELS if panel[0] != "capacity_rps")
WHISKER = {"linewidth": 0.8, "capsize": 1.5, "ecolor": "#333333"}
MANY_GROUPS = 1
COLUMNS_PER_INCH = 11
FLOOR_MS = 10.0
"""Half of what a warm request takes on an idle worker: where logarithmic axes begin."""


def plot_comparison(documents: Mapping[str, Mapping[str, Any]], path: str, title: str) -> None:
    """One panel per figure; in it a group of bars per scenario, a bar per policy; whiskers from the
    least to the most over the seeds.
    """
    figure, axes = _figure(3, 2, title, (15, 11) if len(documents) > MANY_GROUPS else (13, 10))
    policies = list(
        dict.fromkeys(policy for document in documents.values() for policy in document["policies"])
    )
    for axis, (name, label, scale, log) in zip(axes, PANELS, strict=True):
        for nth, policy in enumerate(policies):
            _bars(
                axis,
                documents,
                policy,
                nth,
                len(policies),
                (name, scale),
                label_values=len(documents) == 1,
            )
        axis.set_title(label, fontsize=10)
        axis.grid(axis="y", alpha=0.3)
        if log:
            _log_ms(axis)
        elif axis.get_ylim()[1] > 0:
            axis.set_ylim(0, axis.get_ylim()[1] * 1.08)
        axis.set_xticks(range(len(documents)))
        axis.set_xticklabels(list(documents) if len(documents) > 1 else [""])
    _legend(figure, axes[1], len(policies))  # one-pool has no capacity
    figure.savefig(path)


def _bars(
    axis: Any,
    documents: Mapping[str, Mapping[str, Any]],
    policy: str,
    nth: int,
    of: int,
    what: tuple[str, float],
    *,
    label_values: bool,
) -> None:
    name, scale = what
    width = 0.84 / of
    places, values, below, above = [], [], [], []
    for group, document in enumerate(documents.values()):
        spread = document["policies"].get(policy, {}).get(name)
        if spread is None:
            continue
        places.append(group - 0.42 + width * (nth + 0.5))
        values.append(spread["median"] * scale)
        below.append((spread["median"] - spread["min"]) * scale)
        above.append((spread["max"] - spread["median"]) * scale)
    if not places:
        return
    hatch = "//" if policy in ("clairvoyant", "one-pool") else None
    bars = axis.bar(
        places,
        values,
        width * 0.94,
        yerr=(below, above),
        color=COLOURS.get(policy, OTHER),
        label=policy,
        hatch=hatch,
        edgecolor="white",
        linewidth=0.3,
        error_kw=WHISKER,
    )
    if label_values:
        axis.bar_label(
            bars,
            fmt=lambda value: f"{value:,.3g}" if value < 100 else f"{value:,.0f}",
            fontsize=8,
            padding=2,
        )


def plot_growth(document: Mapping[str, Any], path: str, title: str) -> None:
    """Each figure against the number of adapters or workers, a line per policy, a band from the
    least to the most over the seeds.
    """
    figure, axes = _figure(3, 2, title, (13, 11))
    for axis, (name, label, scale, log) in zip(axes, GROWTH_PANELS, strict=False):
        for policy, rows in document["policies"].items():
            colour = COLOURS.get(policy, OTHER)
            points = document["points"]
            axis.plot(
                points,
                [row[name]["median"] * scale for row in rows],
                "o-",
                color=colour,
                label=policy,
                markersize=3.5,
            )
            axis.fill_between(
                points,
                [row[name]["min"] * scale for row in rows],
                [row[name]["max"] * scale for row in rows],
                color=colour,
                alpha=0.15,
            )
        axis.set_xscale("log")
        axis.set_xticks(document["points"])
        axis.set_xticklabels([f"{point:,}" for point in document["points"]], fontsize=8)
        axis.minorticks_off()
        axis.set_xlabel(document["of"])
        axis.set_title(label, fontsize=10)
        axis.grid(alpha=0.3)
        if log:
            _log_ms(axis)
        else:
            axis.set_ylim(bottom=0)
    axes[-1].axis("off")
    _legend(figure, axes[0], len(document["policies"]))
    figure.savefig(path)


def plot_event(document: Mapping[str, Any], path: str, title: str) -> None:
    """p99 TTFT and loads over time, a line per policy."""
    figure, axes = _figure(2, 1, title, (12, 8))
    for axis, (name, label, scale) in zip(
        axes,
        (
            ("ttft_p99_s", "p99 TTFT of requests by arrival, ms (log)", 1e3),
            ("loads", "Adapter loads per bin", 1.0),
        ),
        strict=True,
    ):
        for policy, rows in document["policies"].items():
            times = [row["at_s"] for row in rows]
            axis.plot(
                times,
                [row[name]["median"] * scale for row in rows],
                color=COLOURS.get(policy, OTHER),
                label=policy,
            )
        axis.axvline(document["at_s"], color="black", linestyle="--", linewidth=1)
        axis.set_title(label, fontsize=10)
        axis.grid(alpha=0.3)
        axis.set_xlabel("seconds")
        if name != "loads":
            _log_ms(axis)
        else:
            axis.set_ylim(bottom=0)
    _legend(figure, axes[0], len(document["policies"]))
    figure.savefig(path)


def plot_study(document: Mapping[str, Any], path: str) -> None:
    """All pictures of a study, each in PATH-WHAT.png."""
    for what in ("scenarios", "fleets"):
        several = {name: of for name, of in document[what].items() if "policies" in of}
        if several:
            title = "; ".join(
                f"{name}: {of['scenario']['what']}, {of['rate_rps']:.0f}/s"
                for name, of in several.items()
            )
            plot_comparison(
                several,
                f"{path}-{what}.png",
                f"{title}; medians, whiskers: least and most over the seeds",
            )
    for what, event in document["events"].items():
        plot_event(
            event,
            f"{path}-{what}.png",
            f"A quarter of the workers: {what}, {event['rate_rps']:.0f} requests/s; "
            "medians over the seeds",
        )
    for of, growth in document["growth"].items():
        per = (
            growth["rates_rps"][0]
            if of == "adapters"
            else growth["rates_rps"][0] / growth["points"][0]
        )
        rate = f"{per:.0f} requests/s" + (" per worker" if of == "workers" else "")
        seeds = ", ".join(str(number) for number in growth["seeds"])
        plot_growth(
            growth,
            f"{path}-growth-{of}.png",
            f"Growth in {of}, {rate}; seeds by point: {seeds}; bands: least and most",
        )


def _figure(
    rows: int, columns: int, title: str, size: tuple[float, float]
) -> tuple[Any, Sequence[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", dpi=110)
    lines = [
        part
        for line in title.splitlines()
        for part in textwrap.wrap(line, round(size[0] * COLUMNS_PER_INCH))
    ]
    figure.suptitle("\n".join(lines), fontsize=10)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _log_ms(axis: Any) -> None:
    from matplotlib.ticker import LogLocator

    axis.set_yscale("log")
    axis.set_ylim(FLOOR_MS, max(axis.get_ylim()[1], 10 * FLOOR_MS) * 1.5)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axis.yaxis.set_major_formatter("{x:,g}")
    axis.yaxis.set_minor_formatter("")


def _legend(figure: Any, axis: Any, entries: int) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(entries, 9), fontsize=9)
