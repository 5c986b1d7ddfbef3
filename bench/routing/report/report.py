"""Pure. From the answers of a study to the JSON document and to tables for people.

The document of one scenario; every figure is {median, min, max} over the seeds:

    scenario    the situation: workers, adapters, mix, lengths, window, the worker's facts and the
                table of timings
    rate_rps    the common rate of the comparison;  rate_is: how it was chosen
    policies    {name: {capacity_rps (null while not known), ttft_p50_s, ttft_p99_s,
                loads_per_request, hit_rate, jain}}
    more        {name: {requests, cold_loads_per_request, completed_rps, served_jain, failed}}
    flash       {name: {others_with_s, others_without_s, rise, copies, hot_p99_s}}
                scenario flash only
    overload    {name: {capacity_rps, offered: {times: {completed_over_capacity, served_jain,
                failed, ...}}}}
    growth      {of, points, rates_rps, adapters, policies: {name: [{figure: ...} by point]}}
    event       {what, at_s, rate_rps, policies: {name: [{at_s, ttft_p50_s, ttft_p99_s, loads,
                failed}]}}

What each figure is: bench/routing/report/figures.py. `clairvoyant` is a bound, not a policy:
bench/routing/sim/clairvoyant.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from bench.routing.report.figures import Figures, Flash, Moment, SeedSpread, spread
from bench.routing.study.runs import (
    CLAIRVOYANT,
    ONE_POOL,
    OURS,
    REFERENCE,
    CompareAnswer,
    EventAnswer,
    GrowAnswer,
    OverloadAnswer,
)

MAIN = ("capacity_rps", "ttft_p50_s", "ttft_p99_s", "loads_per_request", "hit_rate", "jain")
MORE = ("requests", "cold_loads_per_request", "completed_rps", "served_jain", "failed")


def comparison_document(made: CompareAnswer) -> dict[str, Any]:
    spreads = {policy: made.spreads(policy) for policy in made.figures}

    def part(names: Sequence[str]) -> dict[str, Any]:
        return {
            policy: {name: plain(of.get(name)) for name in names} for policy, of in spreads.items()
        }

    document: dict[str, Any] = {
        "rate_rps": made.rate_rps,
        "rate_is": made.rate_is,
        "policies": part(MAIN),
        "more": part(MORE),
    }
    if made.flashes:
        document["flash"] = {policy: _flash(rows) for policy, rows in made.flashes.items()}
    return document


def plain(of: SeedSpread | None) -> dict[str, float] | None:
    """As the document has it."""
    return None if of is None else asdict(of)


def _flash(rows: Sequence[Flash]) -> dict[str, Any]:
    names = [*(field.name for field in fields(Flash)), "rise"]
    return {name: asdict(spread([getattr(row, name) for row in rows])) for name in names}


def growth_document(made: GrowAnswer) -> dict[str, Any]:
    policies = {
        policy: [_figures(rows) for rows in points] for policy, points in made.figures.items()
    }
    return {
        "of": made.of,
        "points": made.points,
        "rates_rps": made.rates_rps,
        "adapters": made.adapters,
        "policies": policies,
    }


def _figures(rows: Sequence[Figures]) -> dict[str, Any]:
    return {
        field.name: asdict(spread([getattr(row, field.name) for row in rows]))
        for field in fields(Figures)
    }


def event_document(made: EventAnswer) -> dict[str, Any]:
    names = [field.name for field in fields(Moment) if field.name != "at_s"]
    policies = {
        policy: [
            {
                "at_s": moments[0].at_s,
                **{
                    name: asdict(spread([getattr(moment, name) for moment in moments]))
                    for name in names
                },
            }
            for moments in zip(*lines, strict=True)
        ]
        for policy, lines in made.timelines.items()
    }
    return {"what": made.what, "at_s": made.at_s, "rate_rps": made.rate_rps, "policies": policies}


def overload_document(made: OverloadAnswer) -> dict[str, Any]:
    return {
        policy: {
            "capacity_rps": made.capacities[policy],
            "offered": {
                f"{times:g}": {
                    **_figures(rows),
                    "completed_over_capacity": asdict(
                        spread([row.completed_rps / made.capacities[policy] for row in rows])
                    ),
                }
                for times, rows in offered.items()
            },
        }
        for policy, offered in made.figures.items()
    }


# ---- tables --------------------------------------------------------------------------------------


def comparison_table(name: str, what: str, document: Mapping[str, Any], seeds: int) -> str:
    """All of one scenario's document that fits into a terminal: medians, with the range over the
    seeds for the capacity.
    """
    policies: Mapping[str, Any] = document["policies"]
    lines = [
        f"{name}: {what}",
        f"figures at {document['rate_rps']:.1f} requests/s, {document['rate_is']}; "
        f"medians of {seeds} seeds",
    ]
    head = f"{'policy':<16}{'capacity/s':>11}{'range':>15}{'vs ' + REFERENCE:>15}"
    head += f"{'p50 TTFT':>11}{'p99 TTFT':>11}"
    lines.append(head + f"{'loads/req':>11}{'cold':>7}{'hits':>7}{'Jain':>7}{'failed':>8}")
    reference = (policies.get(REFERENCE) or {}).get("capacity_rps")
    for policy, of in policies.items():
        at, more = of["capacity_rps"], document["more"][policy]
        capacity = f"{at['median']:>11.1f}{_range(at):>15}" if at else f"{'-':>11}{'-':>15}"
        ratio = (
            f"{at['median'] / reference['median']:>14.2f}x"
            if at and reference and reference["median"]
            else f"{'-':>15}"
        )
        if of["ttft_p99_s"] is None:
            lines.append(f"{policy:<16}{capacity}{ratio}  (no figures yet)")
            continue
        lines.append(
            f"{policy:<16}{capacity}{ratio}"
            f"{_ms(of['ttft_p50_s']):>11}{_ms(of['ttft_p99_s']):>11}"
            f"{of['loads_per_request']['median']:>11.3f}"
            f"{more['cold_loads_per_request']['median']:>7.3f}"
            f"{of['hit_rate']['median']:>7.1%}{of['jain']['median']:>7.3f}"
            f"{more['failed']['median']:>8.0f}"
        )
    if CLAIRVOYANT in policies:
        lines.append(
            f"{CLAIRVOYANT}: a bound (no waiting at all, Belady on the slots of the "
            "whole fleet), not a policy"
        )
    if ONE_POOL in policies:
        lines.append(
            f"{ONE_POOL}: the run of {OURS} had all slots of the fleet been one "
            "worker's, and evictions Belady's"
        )
    for policy, crowd in document.get("flash", {}).items():
        lines.append(
            f"flash crowd, {policy}: p99 of all others "
            f"{_ms(crowd['others_without_s'])} -> {_ms(crowd['others_with_s'])} "
            f"({crowd['rise']['median']:+.0%}), hot adapter on "
            f"{crowd['copies']['median']:.0f} workers, its p99 {_ms(crowd['hot_p99_s'])}"
        )
    return "\n".join(lines)


def overload_table(document: Mapping[str, Any]) -> str:
    lines = [
        f"{'overload':<16}{'offered':>9}{'completed/capacity':>20}{'refused':>9}"
        f"{'p99 TTFT':>12}{'Jain of fair shares':>21}"
    ]
    for policy, of in document.items():
        for times, row in of["offered"].items():
            refused = row["failed"]["median"] / row["requests"]["median"]
            lines.append(
                f"{policy:<16}{times + 'x':>9}"
                f"{row['completed_over_capacity']['median']:>20.2f}{refused:>9.1%}"
                f"{_ms(row['ttft_p99_s']):>12}"
                f"{row['served_jain']['median']:>21.3f}"
            )
    return "\n".join(lines)


def growth_table(document: Mapping[str, Any]) -> str:
    lines = [
        f"{document['of']:>9}{'rate':>8}  "
        f"{'policy':<16}{'p50 TTFT':>11}{'p99 TTFT':>11}{'loads/req':>11}{'hits':>7}{'Jain':>7}"
    ]
    for nth, point in enumerate(document["points"]):
        for policy, rows in document["policies"].items():
            row = rows[nth]
            lines.append(
                f"{point:>9,}{document['rates_rps'][nth]:>8.0f}  "
                f"{policy:<16}{_ms(row['ttft_p50_s']):>11}{_ms(row['ttft_p99_s']):>11}"
                f"{row['loads_per_request']['median']:>11.3f}"
                f"{row['hit_rate']['median']:>7.1%}{row['jain']['median']:>7.3f}"
            )
    return "\n".join(lines)


def event_table(document: Mapping[str, Any]) -> str:
    """Before, the ten seconds after, and later: the worst p99 of a bin in each."""
    after_s = document["at_s"] + 10.0
    lines = [
        f"{document['what']} at {document['at_s']:.0f} s, {document['rate_rps']:.1f} "
        "requests/s: worst p99 TTFT of a bin"
    ]
    lines.append(f"{'policy':<16}{'before':>11}{'10 s after':>11}{'later':>11}{'failed':>8}")
    for policy, rows in document["policies"].items():
        before = [row for row in rows if row["at_s"] < document["at_s"]]
        after = [row for row in rows if document["at_s"] <= row["at_s"] < after_s]
        later = [row for row in rows if row["at_s"] >= after_s]
        worst = [
            max((row["ttft_p99_s"]["median"] for row in part), default=0.0) * 1e3
            for part in (before, after, later)
        ]
        failed = sum(row["failed"]["median"] for row in rows)
        lines.append(
            f"{policy:<16}" + "".join(f"{ms:>8,.0f} ms" for ms in worst) + f"{failed:>8.0f}"
        )
    return "\n".join(lines)


def _ms(of: Mapping[str, float]) -> str:
    return f"{of['median'] * 1e3:,.0f} ms"


def _range(of: Mapping[str, float]) -> str:
    return f"{of['min']:.1f}-{of['max']:.1f}"
