"""Pure. The highest rate at which a policy keeps a promise, by bisection of a ladder of rates."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence

from bench.routing.report.figures import ttft_s
from bench.routing.sim.scenarios import CountedWindow, TrafficScenario, requests_of
from bench.routing.sim.world import SimOutcome, World, simulate

RATIO = 1.02
"""Rates are tried on rungs this far apart, so that a capacity is the same wherever its search
began, and short of the true one by 2% at most.
"""
FAILING_SHARE = 0.01
"""Of requests above a bound on p99."""
LEAST_RPS = 0.5
NEAR_TRIES = 3
"""So many strides on one side of the guess are short ones, then they double: a guess is rarely far
off, and what is far above a capacity takes long to fail.
"""
HOPELESS_S = 5.0
"""If half of the requests that came so long ago (or up to twice as long) still wait late in the
warm-up, the queue grows for ever.
"""


def rung_of(rate_rps: float) -> int:
    """The nearest one."""
    return round(math.log(rate_rps) / math.log(RATIO))


def rate_of(rung: int) -> float:
    return float(f"{RATIO**rung:.5g}")


LEAST_RUNG = rung_of(LEAST_RPS)


def next_rung(tried: Mapping[int, bool], guess: int, stride: int) -> int | None:
    """Which rung to try next, from which of those tried passed; None once the highest that passes
    is known (or not even LEAST_RUNG does).

    Whatever is below a rung that passes is taken to pass too. `guess` and `stride` only save time.
    """
    low = max((rung for rung, passed in tried.items() if passed), default=None)
    high = min(
        (rung for rung, passed in tried.items() if not passed and (low is None or rung > low)),
        default=None,
    )
    wider = stride << max(0, len(tried) - NEAR_TRIES)
    if low is None:
        if high is None:
            return max(guess, LEAST_RUNG)
        return None if high <= LEAST_RUNG else max(LEAST_RUNG, high - wider)
    if high is None:
        return low + wider
    return None if high - low <= 1 else (low + high) // 2


def found_rps(tried: Mapping[int, bool]) -> float:
    """The capacity, of a search that has ended."""
    return (
        rate_of(max(passing))
        if (passing := [rung for rung, passed in tried.items() if passed])
        else 0.0
    )


def highest(passes: Callable[[float], bool], guess_rps: float, *, stride: float) -> float:
    """The highest rate that passes, on the rungs; 0 if LEAST_RPS fails. `stride`: the first step
    from the guess, as a ratio.
    """
    tried: dict[int, bool] = {}
    guess, step = rung_of(guess_rps), max(1, rung_of(stride))
    while (rung := next_rung(tried, guess, step)) is not None:
        tried[rung] = passes(rate_of(rung))
    return found_rps(tried)


def keeps(
    world: World, scenario: TrafficScenario, rate_per_s: float, window: CountedWindow, p99_s: float
) -> bool:
    """Whether p99 TTFT of the counted requests stays at or under `p99_s` and every request of the
    run completes.
    """
    requests = requests_of(scenario, rate_per_s, world.seed, window)
    counted = sum(window.counts(request.at_s) for request in requests)
    if not counted:
        raise ValueError("no request arrived within the window; more time is needed")
    allowed = int(FAILING_SHARE * counted)
    late = seen = 0
    next_look_s = window.warm_up_s / 2

    def give_up(now: float, outcomes: Sequence[SimOutcome]) -> bool:
        """More are late already than may be. Each is looked at once, when its time is over, whether
        it has begun by then or not.
        """
        nonlocal late, seen, next_look_s
        while outcomes[seen].request.at_s + p99_s < now:
            late += window.counts(outcomes[seen].request.at_s) and (
                outcomes[seen].ttft_s is None or ttft_s(outcomes[seen]) > p99_s
            )
            seen += 1
        if next_look_s <= now < window.warm_up_s:
            next_look_s = now + 1.0
            return hopeless(now, outcomes)
        return late > allowed

    run = simulate(world, requests, give_up)
    if run.given_up or any(outcome.failed is not None for outcome in run.outcomes):
        return False
    return (
        sum(
            ttft_s(outcome) > p99_s
            for outcome in run.outcomes
            if window.counts(outcome.request.at_s)
        )
        <= allowed
    )


def hopeless(now: float, outcomes: Sequence[SimOutcome]) -> bool:
    """See HOPELESS_S. `outcomes` are in order of arrival."""
    first, last = (
        bisect_left(outcomes, now - ago_s, key=lambda outcome: outcome.request.at_s)
        for ago_s in (2 * HOPELESS_S, HOPELESS_S)
    )
    return 2 * sum(outcome.ttft_s is None for outcome in outcomes[first:last]) > last - first
