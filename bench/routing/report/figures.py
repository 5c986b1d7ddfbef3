"""Pure. From a run to figures, and from the figures of many seeds to median and spread."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bench.load.measure import percentile
from bench.routing.sim.scenarios import CountedWindow
from bench.routing.sim.world import SimOutcome, SimRun
from shared.link.messages import Tier

FAILED_TTFT_S = 60.0
"""What a request that never got a first token counts as, if it did not wait longer: clients give up
about then.
"""
LEAST_REQUESTS = 10
"""An adapter with fewer requests in the window says nothing about fairness."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Of the requests that arrived within the window.

    `loads_per_request`: loads into GPU slots, from wherever; `cold_loads_per_request`: those that
    did not come from the CPU tier. `hit_rate`: the share of requests whose adapter was in a slot,
    ready, when they reached their worker. `jain`: Jain's index over the mean TTFT of the adapters
    that had enough requests: 1 if all wait alike, 1/n if only one of n waits. `completed_rps`:
    answers that ended within the window. `served_jain`: Jain's index over each adapter's completed
    requests against its max-min fair share of all that were completed; below 1, some adapters got
    less for the sake of others.
    """

    requests: int
    ttft_p50_s: float
    ttft_p99_s: float
    loads_per_request: float
    cold_loads_per_request: float
    hit_rate: float
    jain: float
    completed_rps: float
    served_jain: float
    failed: int


def figures(run: SimRun, window: CountedWindow) -> Figures:
    counted = [outcome for outcome in run.outcomes if window.counts(outcome.request.at_s)]
    if not counted:
        raise ValueError("no request arrived within the window; more rate or more time is needed")
    ttfts = sorted(ttft_s(outcome) for outcome in counted)
    loads = [load for load in run.loads if window.counts(load.at_s)]
    asked = [outcome for outcome in counted if outcome.request.adapter is not None]
    done = sum(
        o.ended_s is not None and window.counts(o.ended_s) and o.failed is None
        for o in run.outcomes
    )
    return Figures(
        requests=len(counted),
        ttft_p50_s=percentile(ttfts, 0.5),
        ttft_p99_s=percentile(ttfts, 0.99),
        loads_per_request=len(loads) / len(counted),
        cold_loads_per_request=sum(load.tier is not Tier.CPU for load in loads) / len(counted),
        hit_rate=sum(outcome.tier is Tier.GPU for outcome in asked) / len(asked) if asked else 1.0,
        jain=jain(
            statistics.fmean(waits)
            for waits in _by_adapter(counted).values()
            if len(waits) >= LEAST_REQUESTS
        ),
        completed_rps=done / window.duration_s,
        served_jain=_served_jain(run.outcomes, window),
        failed=sum(outcome.failed is not None for outcome in counted),
    )


def ttft_s(outcome: SimOutcome) -> float:
    """Of an outcome as users feel it: whoever never got an answer waited long."""
    if outcome.ttft_s is not None:
        return outcome.ttft_s
    waited_s = outcome.ended_s - outcome.request.at_s if outcome.ended_s is not None else 0.0
    return max(FAILED_TTFT_S, waited_s)


def jain(values: Iterable[float]) -> float:
    """(sum x)^2 / (n sum x^2); 1 for nothing. Jain, Chiu and Hawe, "A quantitative measure of
    fairness", 1984.
    """
    listed = list(values)
    squares = sum(value * value for value in listed)
    return sum(listed) ** 2 / (len(listed) * squares) if squares else 1.0


def fair_shares(wanted: Mapping[int | None, float], total: float) -> dict[int | None, float]:
    """Max-min: nobody gets more than it wants, and nobody who wants more has less than another."""
    shares: dict[int | None, float] = {}
    left = total
    for nth, (who, amount) in enumerate(sorted(wanted.items(), key=lambda item: item[1])):
        shares[who] = min(amount, left / (len(wanted) - nth))
        left -= shares[who]
    return shares


def _served_jain(outcomes: Sequence[SimOutcome], window: CountedWindow) -> float:
    offered: defaultdict[int | None, float] = defaultdict(float)
    served: defaultdict[int | None, float] = defaultdict(float)
    for outcome in outcomes:
        adapter = outcome.request.adapter
        offered[adapter] += window.counts(outcome.request.at_s)
        served[adapter] += (
            outcome.failed is None
            and outcome.ended_s is not None
            and window.counts(outcome.ended_s)
        )
    shares = fair_shares(offered, sum(served.values()))
    return jain(
        min(1.0, served[who] / share)
        for who, share in shares.items()
        if offered[who] >= LEAST_REQUESTS and share > 0
    )


def _by_adapter(outcomes: Iterable[SimOutcome]) -> dict[int | None, list[float]]:
    waits: defaultdict[int | None, list[float]] = defaultdict(list)
    for outcome in outcomes:
        waits[outcome.request.adapter].append(ttft_s(outcome))
    return waits


@dataclass(frozen=True, slots=True)
class SeedSpread:
    """Of one figure over seeds."""

    median: float
    min: float
    max: float


def spread(values: Sequence[float]) -> SeedSpread:
    return SeedSpread(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Flash:
    """What a flash crowd did. `others_*`: p99 TTFT of all other adapters after it came, with it and
    without it (same seed, same time).
    """

    others_with_s: float
    others_without_s: float
    copies: int
    """Workers that loaded the hot adapter."""
    hot_p99_s: float

    @property
    def rise(self) -> float:
        return self.others_with_s / self.others_without_s - 1


def flash(
    with_it: SimRun, without: SimRun, hot: int, hot_name: str, workers: int, window: CountedWindow
) -> Flash:
    def p99(run: SimRun, is_hot: bool) -> float:
        waits = [
            ttft_s(o)
            for o in run.outcomes
            if window.flash_s <= o.request.at_s < window.end_s
            and (o.request.adapter == hot) is is_hot
        ]
        return percentile(sorted(waits), 0.99)

    copies = len({load.worker for load in with_it.loads if load.adapter == hot_name})
    return Flash(p99(with_it, False), p99(without, False), copies, p99(with_it, True))


BIN_S = 2.0


@dataclass(frozen=True, slots=True)
class Moment:
    """The requests that arrived within BIN_S from `at_s` on."""

    at_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    loads: int
    failed: int


def timeline(run: SimRun, window: CountedWindow) -> list[Moment]:
    """For scale events and losses: how a run went, from the end of the warm-up on."""
    moments = []
    for nth in range(int(window.duration_s / BIN_S)):
        begin = window.warm_up_s + nth * BIN_S
        here = [
            outcome for outcome in run.outcomes if begin <= outcome.request.at_s < begin + BIN_S
        ]
        waits = sorted(ttft_s(outcome) for outcome in here) or [0.0]
        loads = sum(begin <= load.at_s < begin + BIN_S for load in run.loads)
        failed = sum(outcome.failed is not None for outcome in here)
        moments.append(
            Moment(begin, percentile(waits, 0.5), percentile(waits, 0.99), loads, failed)
        )
    return moments
