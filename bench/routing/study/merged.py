"""Pure. From a study's results to one document, tables and titles of pictures: what there is, and
in words what is missing.

    schema, plan, processor_s, missing [str]
    scenarios   {name: the document of bench/routing/report/report.py, with `overload` where asked
                for, and `ratios`}
    fleets      {"64 workers": the same}
    events      {what: event};  growth {of: growth}

`ratios`: of the default policy's capacity over each other's, seed by seed (all policies see the
same arrivals), {median, min, max}.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.routing.report import report
from bench.routing.report.figures import Figures, Flash, Moment, spread
from bench.routing.sim.scenarios import WORKERS
from bench.routing.study.item import Item, Results, case_of, with_seed
from bench.routing.study.plan import (
    CompareQuestion,
    EventQuestion,
    GrowQuestion,
    OverloadQuestion,
    Plan,
    capacities,
    capacity,
    common_rate,
    compared_runs,
    event_runs,
    grow_runs,
    median_capacity,
    overload_runs,
    rehearse,
)
from bench.routing.study.runs import (
    CLAIRVOYANT,
    COMMON_P99_S,
    COMMON_SHARE,
    ONE_POOL,
    OURS,
    REFERENCE,
    CompareAnswer,
    EventAnswer,
    GrowAnswer,
    OverloadAnswer,
    facts_of,
)

SCHEMA = "loraplex.bench.study/1"


@dataclass(slots=True)
class Merged:
    """`tables` by heading, in the order of the plan."""

    document: dict[str, Any]
    tables: dict[str, str] = field(default_factory=dict)


def merge(plan: Plan, results: Results) -> Merged:
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "missing": missing(plan, results),
        "scenarios": {},
        "fleets": {},
        "events": {},
        "growth": {},
    }
    merged = Merged(document)
    for question in plan:
        match question:
            case CompareQuestion():
                for scenario in question.scenarios:
                    _compare(question, scenario, results, merged)
            case OverloadQuestion():
                _overload(question, results, merged)
            case EventQuestion():
                _event(question, results, merged)
            case GrowQuestion():
                _grow(question, results, merged)
    return merged


def missing(plan: Plan, results: Results) -> list[str]:
    """By question: how many runs, of which policies."""
    found = []
    for question, runs in zip(plan, rehearse(plan, results.copy()), strict=True):
        if runs:
            of = ", ".join(dict.fromkeys(run.policy for run in runs))
            found.append(f"{question.name}: about {len(runs)} runs are missing, of {of}")
    return found


def _rows(runs: list[Item], results: Results) -> list[Figures]:
    return [
        Figures(**result["figures"]) for run in runs if (result := results.get(run)) is not None
    ]


# ---- comparisons ---------------------------------------------------------------------------------


def _compare(question: CompareQuestion, scenario: str, results: Results, merged: Merged) -> None:
    found = {
        policy: capacities(question.item("keeps", policy, scenario, 0), question.seeds, results)
        for policy in question.policies
    }
    rate = common_rate(question, scenario, results)
    figures: dict[str, list[Figures]] = {policy: [] for policy in question.policies}
    flashes: dict[str, list[Flash]] = {}
    if rate:
        for seed in range(question.seeds):
            for run in compared_runs(question, scenario, seed, rate):
                result = results.get(run)
                if result is None:
                    continue
                figures.setdefault(run.policy, []).append(Figures(**result["figures"]))
                if result.get("flash"):
                    flashes.setdefault(run.policy, []).append(Flash(**result["flash"]))
                if run.policy == CLAIRVOYANT:
                    found.setdefault(CLAIRVOYANT, []).append(result["capacity_rps"])
    if not any(found.values()) and not any(figures.values()):
        return
    case = case_of(question.item("figures", question.policies[0], scenario, 0))
    made = CompareAnswer(
        case.scenario, rate or 0.0, _rate_is(question, rate), found, figures, flashes
    )
    document = {
        "scenario": facts_of(case),
        **report.comparison_document(made),
        "ratios": _ratios(question, scenario, results),
    }
    name = scenario if question.workers == WORKERS else f"{question.workers} workers"
    where = "scenarios" if question.workers == WORKERS else "fleets"
    merged.document[where][name] = document
    what = (
        f"{case.scenario.what}; {question.workers} workers, {case.scenario.all_adapters:,} adapters"
    )
    merged.tables[f"{scenario}, {question.workers} workers"] = report.comparison_table(
        scenario, what, document, question.seeds
    )


def _rate_is(question: CompareQuestion, rate: float | None) -> str:
    if rate is None:
        return "not known yet"
    if question.common == "reference":
        return f"where p99 TTFT of {REFERENCE} reaches {COMMON_P99_S:g} s (median over seeds)"
    return f"{COMMON_SHARE:g} x the best policy's median capacity"


def _ratios(question: CompareQuestion, scenario: str, results: Results) -> dict[str, Any]:
    """Seed by seed, where both are known."""
    ratios: dict[str, Any] = {}
    for policy in question.policies:
        pairs = []
        for seed in range(question.seeds if OURS in question.policies else 0):
            ours, theirs = (
                capacity(with_seed(question.item("keeps", name, scenario, 0), seed), results)
                for name in (OURS, policy)
            )
            if ours and theirs:
                pairs.append(ours / theirs)
        if pairs and policy != OURS:
            ratios[policy] = report.plain(spread(pairs))
    return ratios


# ---- the others ----------------------------------------------------------------------------------


def _overload(question: OverloadQuestion, results: Results, merged: Merged) -> None:
    medians: dict[str, float] = {}
    figures: dict[str, dict[float, list[Figures]]] = {}
    for policy in question.policies:
        rows = {
            times: _rows(overload_runs(question, policy, times, results), results)
            for times in question.times
        }
        if all(rows.values()):
            medians[policy] = (
                median_capacity(
                    question.item("keeps", policy, question.scenario, 0), question.seeds, results
                )
                or 0.0
            )
            figures[policy] = rows
    if figures:
        document = report.overload_document(OverloadAnswer(medians, figures))
        merged.document["scenarios"].setdefault(question.scenario, {})["overload"] = document
        merged.tables[f"{question.scenario}, overload"] = report.overload_table(document)


def _event(question: EventQuestion, results: Results, merged: Merged) -> None:
    timelines: dict[str, list[list[Moment]]] = {}
    for seed in range(question.seeds):
        for run in event_runs(question, seed):
            if (result := results.get(run)) is not None:
                timelines.setdefault(run.policy, []).append(
                    [Moment(**moment) for moment in result["moments"]]
                )
    if timelines:
        case = case_of(question.item(question.what, question.policies[0], question.scenario, 0))
        ordered = {policy: timelines[policy] for policy in question.policies if policy in timelines}
        document = report.event_document(
            EventAnswer(question.what, case.window.flash_s, question.rate_rps, ordered)
        )
        merged.document["events"][question.what] = document
        merged.tables[f"{question.scenario}, {question.what}"] = report.event_table(document)


def _grow(question: GrowQuestion, results: Results, merged: Merged) -> None:
    """Only the points that every policy has something of."""
    complete: list[tuple[int, Item, dict[str, list[Figures]]]] = []
    for point in question.points:
        runs = grow_runs(question, point)
        rows = {
            policy: _rows([run for run in runs if run.policy == policy], results)
            for policy in question.policies
        }
        if all(rows.values()):
            complete.append((point.at, runs[0], rows))
    if complete:
        made = GrowAnswer(
            question.of,
            tuple(point for point, _, _ in complete),
            tuple(run.rate_rps for _, run, _ in complete),
            tuple(run.adapters for _, run, _ in complete),
            {policy: [rows[policy] for _, _, rows in complete] for policy in question.policies},
        )
        document = report.growth_document(made) | {
            "seeds": [len(rows[question.policies[0]]) for _, _, rows in complete]
        }
        merged.document["growth"][question.of] = document
        merged.tables[f"growth in {question.of}"] = report.growth_table(document)


# ---- words ---------------------------------------------------------------------------------------


def markdown(merged: Merged, command: str) -> str:
    document = merged.document
    lines = [f"`{command}`", ""]
    lines += (
        [*(f"- missing: {what}" for what in document["missing"]), ""] if document["missing"] else []
    )
    several = {**document["scenarios"], **document["fleets"]}
    policies = list(
        dict.fromkeys(
            policy
            for of in several.values()
            for policy in of.get("policies", {})
            if policy != ONE_POOL
        )
    )
    lines += [
        "Capacity, requests/s (median, least and most over the seeds):",
        "",
        _row(["", *policies]),
        _row(["---", *["---:"] * len(policies)]),
    ]
    lines += [
        _row([name, *(_capacity(of, policy) for policy in policies)])
        for name, of in several.items()
        if "policies" in of
    ]
    others = [policy for policy in policies if policy not in (OURS, CLAIRVOYANT)]
    lines += [
        "",
        f"Capacity of {OURS} over that of others, seed by seed:",
        "",
        _row(["", *others]),
        _row(["---", *["---:"] * len(others)]),
    ]
    lines += [
        _row([name, *(_spread(of["ratios"].get(policy), 2) for policy in others)])
        for name, of in several.items()
        if "ratios" in of
    ]
    for heading, table in merged.tables.items():
        lines += ["", f"### {heading}", "", "```", table, "```"]
    return "\n".join(lines) + "\n"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _capacity(of: Mapping[str, Any], policy: str) -> str:
    return _spread((of["policies"].get(policy) or {}).get("capacity_rps"), 0)


def _spread(of: Mapping[str, float] | None, digits: int) -> str:
    return (
        "-"
        if of is None
        else f"{of['median']:.{digits}f} ({of['min']:.{digits}f}-{of['max']:.{digits}f})"
    )
