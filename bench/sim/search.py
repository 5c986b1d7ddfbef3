"""Pure. The highest rate at which a policy keeps a promise, by bisection."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bench.sim.figures import ttft_s
from bench.sim.scenarios import Scenario, Window, requests_of
from bench.sim.world import Outcome, World, simulate

TOLERANCE = 0.02
"""Of a capacity: the rate above it by this share does not pass any more."""
STRIDE = 1.3
FAILING_SHARE = 0.01
"""Of requests above a bound on p99."""
LEAST_RPS = 0.5


def highest(passes: Callable[[float], bool], guess: float, *, tolerance: float = TOLERANCE, stride: float = STRIDE) -> float:
    """The highest rate that passes, if whatever is below a rate that passes does too. `guess` only saves time. 0 if LEAST_RPS fails."""
    low = high = guess
    if passes(guess):
        while passes(high := high * stride):
            low = high
    else:
        while not passes(low := low / stride):
            high = low
            if low < LEAST_RPS:
                return 0.0
    while high / low > 1 + tolerance:
        middle = (low * high) ** 0.5
        if passes(middle):
            low = middle
        else:
            high = middle
    return low


def keeps(world: World, scenario: Scenario, rate_per_s: float, window: Window, p99_s: float) -> bool:
    """Whether p99 TTFT of the counted requests stays at or under `p99_s` and every request of the run completes."""
    requests = requests_of(scenario, rate_per_s, world.seed, window)
    counted = sum(window.counts(request.at_s) for request in requests)
    if not counted:
        raise ValueError("no request arrived within the window; more time is needed")
    allowed = int(FAILING_SHARE * counted)
    late = seen = 0

    def give_up(now: float, outcomes: Sequence[Outcome]) -> bool:
        """More are late already than may be. Each is looked at once, when its time is over, whether it has begun by then or not."""
        nonlocal late, seen
        while outcomes[seen].request.at_s + p99_s < now:
            late += window.counts(outcomes[seen].request.at_s) and (outcomes[seen].ttft_s is None or ttft_s(outcomes[seen]) > p99_s)
            seen += 1
        return late > allowed

    run = simulate(world, requests, give_up)
    if run.given_up or any(outcome.failed is not None for outcome in run.outcomes):
        return False
    return sum(ttft_s(outcome) > p99_s for outcome in run.outcomes if window.counts(outcome.request.at_s)) <= allowed
