"""Pure. A study's plan: questions in order of importance, and which runs each still needs, given
what is known so far.

A question's later runs depend on its earlier ones (a search on what it has tried, a comparison on
the capacities that its rate comes from), so a plan is asked again after every result: `needed`
yields the runs whose inputs are known. Runs that several questions need are made once.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import msgspec

from bench.routing.sim.timing import Loader
from bench.routing.study.item import Item, Kind, Results, at, with_seed
from bench.routing.study.runs import (
    ADAPTERS_PER_WORKER,
    CAPACITY_P99_S,
    CLAIRVOYANT,
    COMMON_P99_S,
    COMMON_SHARE,
    GUESS_RPS_PER_WORKER,
    MOST_ADAPTERS,
    ONE_POOL,
    OURS,
    REFERENCE,
)
from bench.routing.study.search import found_rps, next_rung, rate_of, rung_of

STRIDE = 3
"""Rungs; two seeds of one policy are rarely further apart."""
PRETENDED: dict[str, Any] = {"figures": {}, "flash": None}


class Question(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="ask"):
    policies: tuple[str, ...]
    seeds: int
    workers: int = 8
    adapters: int = 0
    warm_up_s: float = 60.0
    duration_s: float = 60.0
    loads: Loader = "vllm"

    @property
    def name(self) -> str:
        size = f", {self.workers} workers" + (
            f", {self.adapters:,} adapters" if self.adapters else ""
        )
        loads = "" if self.loads == "vllm" else f", {self.loads} loads"
        return f"{self.words}{size}{loads}, {self.seeds} seeds"

    @property
    def words(self) -> str:
        return str(self.__struct_config__.tag)

    def item(self, kind: Kind, policy: str, scenario: str, seed: int) -> Item:
        """At rate 0."""
        p99_s = CAPACITY_P99_S if kind == "keeps" else 0.0
        return Item(
            kind,
            policy,
            scenario,
            seed,
            0.0,
            self.workers,
            self.adapters,
            self.warm_up_s,
            self.duration_s,
            p99_s,
            self.loads,
        )


class CompareQuestion(Question, frozen=True, tag="compare"):
    """Capacities, and figures of all policies and the bound at one rate: with `common` "reference"
    where p99 TTFT of ray-strict reaches 1 s, else a share of the best policy's capacity. `guesses`:
    capacities by scenario and policy where searches begin; they only save time.
    """

    scenarios: tuple[str, ...] = ("default",)
    common: Literal["reference", "share"] = "share"
    guesses: dict[str, dict[str, float]] = {}

    @property
    def words(self) -> str:
        return f"compare {', '.join(self.scenarios)}"


class OverloadQuestion(Question, frozen=True, tag="overload"):
    """So many times each policy's own capacity (the median of the same searches that `compare`
    makes), with production's queue.
    """

    scenario: str = "default"
    times: tuple[float, ...] = (1.2, 1.5, 2.0)

    @property
    def words(self) -> str:
        return f"overload of {self.scenario}"


class EventQuestion(Question, frozen=True, tag="event"):
    """A quarter of the workers is lost, or joins."""

    what: Literal["loss", "scale"] = "loss"
    rate_rps: float = 60.0
    scenario: str = "default"

    @property
    def words(self) -> str:
        return f"event {self.what}"


class Point(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One size: large fleets are watched for a shorter time, by fewer seeds."""

    at: int
    seeds: int = 0
    warm_up_s: float = 0.0
    duration_s: float = 0.0


class GrowQuestion(Question, frozen=True, tag="grow"):
    """The same load per worker at every size; with the workers the adapters grow as well, to
    MOST_ADAPTERS.
    """

    of: Literal["adapters", "workers"] = "adapters"
    points: tuple[Point, ...] = ()
    scenario: str = "default"
    rps_per_worker: float = 7.0

    @property
    def words(self) -> str:
        return f"growth in {self.of}"


AnyQuestion: TypeAlias = CompareQuestion | OverloadQuestion | EventQuestion | GrowQuestion
Plan: TypeAlias = tuple[AnyQuestion, ...]

read_plan: Callable[[bytes], Plan] = msgspec.json.Decoder(Plan).decode
"""Raises: msgspec.DecodeError that says where."""


def needed(question: AnyQuestion, results: Results) -> Iterator[Item]:
    """What it still lacks and what can be run now, first what comes first."""
    runs: Iterator[Item]
    match question:
        case CompareQuestion():
            runs = _compare(question, results)
        case OverloadQuestion():
            runs = _overload(question, results)
        case EventQuestion():
            runs = (run for seed in range(question.seeds) for run in event_runs(question, seed))
        case GrowQuestion():
            runs = (run for point in question.points for run in grow_runs(question, point))
    return (run for run in runs if run not in results)


# ---- capacities ----------------------------------------------------------------------------------


def capacity(searched: Item, results: Results) -> float | None:
    """None if the search has not ended. `searched` at rate 0."""
    tried = results.tried(searched)
    return found_rps(tried) if tried and next_rung(tried, 0, STRIDE) is None else None


def capacities(searched: Item, seeds: int, results: Results) -> list[float]:
    """Of the seeds whose search has ended."""
    found = (capacity(with_seed(searched, seed), results) for seed in range(seeds))
    return [rps for rps in found if rps is not None]


def median_capacity(searched: Item, seeds: int, results: Results) -> float | None:
    """None before the last seed is there."""
    found = capacities(searched, seeds, results)
    return statistics.median(found) if len(found) == seeds else None


def _search(searched: Item, guess_rps: float, results: Results) -> Iterator[Item]:
    """The one run that the search needs next. Later seeds begin where the first ended, once it has:
    not where whichever was quickest did.
    """
    guess: float | None = guess_rps
    if searched.seed:
        guess = capacity(with_seed(searched, 0), results)
    if guess is not None:
        rung = next_rung(results.tried(searched), rung_of(guess or guess_rps), STRIDE)
        if rung is not None:
            yield at(searched, rate_of(rung))


def _searches(
    question: Question,
    scenarios: Sequence[str],
    guesses: Mapping[str, Mapping[str, float]],
    results: Results,
) -> Iterator[Item]:
    for seed in range(question.seeds):
        for scenario in scenarios:
            for policy in question.policies:
                guess = guesses.get(scenario, {}).get(
                    policy, GUESS_RPS_PER_WORKER * question.workers
                )
                yield from _search(question.item("keeps", policy, scenario, seed), guess, results)


# ---- comparisons ---------------------------------------------------------------------------------


def reference_search(question: CompareQuestion, scenario: str, seed: int) -> Item:
    """For the rate at which the reference's p99 reaches COMMON_P99_S."""
    return msgspec.structs.replace(
        question.item("keeps", REFERENCE, scenario, seed), p99_s=COMMON_P99_S
    )


def common_rate(question: CompareQuestion, scenario: str, results: Results) -> float | None:
    """Of the comparison, rounded to halves; None as long as capacities are missing."""
    if question.common == "reference":
        rate = median_capacity(reference_search(question, scenario, 0), question.seeds, results)
    else:
        medians = [
            median_capacity(question.item("keeps", policy, scenario, 0), question.seeds, results)
            for policy in question.policies
        ]
        rate = None if None in medians else COMMON_SHARE * max(rps or 0.0 for rps in medians)
    return rate and round(2 * rate) / 2


def compared_runs(
    question: CompareQuestion, scenario: str, seed: int, rate_rps: float
) -> list[Item]:
    runs = [question.item("figures", policy, scenario, seed) for policy in question.policies]
    runs.append(question.item("bound", CLAIRVOYANT, scenario, seed))
    if question.common == "reference" and OURS in question.policies:
        runs.append(question.item("pooled", ONE_POOL, scenario, seed))
    return [at(run, rate_rps) for run in runs]


def _compare(question: CompareQuestion, results: Results) -> Iterator[Item]:
    yield from _searches(question, question.scenarios, question.guesses, results)
    if question.common == "reference":
        for seed in range(question.seeds):
            for scenario in question.scenarios:
                guess = question.guesses.get(scenario, {}).get(
                    REFERENCE, GUESS_RPS_PER_WORKER * question.workers
                )
                yield from _search(reference_search(question, scenario, seed), guess, results)
    for scenario in question.scenarios:
        rate = common_rate(question, scenario, results)
        if rate:
            for seed in range(question.seeds):
                yield from compared_runs(question, scenario, seed, rate)


# ---- the others ----------------------------------------------------------------------------------


def overload_runs(
    question: OverloadQuestion, policy: str, times: float, results: Results
) -> list[Item]:
    """One per seed; none as long as the capacity is not known."""
    median = median_capacity(
        question.item("keeps", policy, question.scenario, 0), question.seeds, results
    )
    if not median:
        return []
    return [
        at(question.item("overload", policy, question.scenario, seed), round(median * times, 2))
        for seed in range(question.seeds)
    ]


def _overload(question: OverloadQuestion, results: Results) -> Iterator[Item]:
    yield from _searches(question, [question.scenario], {}, results)
    runs = [
        overload_runs(question, policy, times, results)
        for policy in question.policies
        for times in question.times
    ]
    for seed in range(question.seeds):
        yield from (of_case[seed] for of_case in runs if of_case)


def event_runs(question: EventQuestion, seed: int) -> list[Item]:
    """One per policy."""
    return [
        at(question.item(question.what, policy, question.scenario, seed), question.rate_rps)
        for policy in question.policies
    ]


def grow_runs(question: GrowQuestion, point: Point) -> list[Item]:
    """One per seed and policy."""
    workers = point.at if question.of == "workers" else question.workers
    adapters = (
        min(MOST_ADAPTERS, ADAPTERS_PER_WORKER * workers) if question.of == "workers" else point.at
    )
    window = (point.warm_up_s or question.warm_up_s, point.duration_s or question.duration_s)
    rate = question.rps_per_worker * workers
    seeds = range(point.seeds or question.seeds)
    return [
        Item(
            "figures",
            policy,
            question.scenario,
            seed,
            rate,
            workers,
            adapters,
            *window,
            loads=question.loads,
        )
        for seed in seeds
        for policy in question.policies
    ]


def rehearse(plan: Plan, results: Results) -> list[list[Item]]:
    """By question, the runs that are left if every search finds what it guesses. Fills `results`
    with pretended ones.
    """
    left: list[list[Item]] = []
    guesses = {
        (s, p, q.workers): rps
        for q in plan
        if isinstance(q, CompareQuestion)
        for s, of in q.guesses.items()
        for p, rps in of.items()
    }
    for question in plan:
        runs: list[Item] = []
        while batch := list(needed(question, results)):
            for item in batch:
                limit = guesses.get(
                    (item.scenario, item.policy, item.workers), GUESS_RPS_PER_WORKER * item.workers
                )
                results.add(item, item.rate_rps <= limit if item.kind == "keeps" else PRETENDED)
            runs += batch
        left.append(runs)
    return left
