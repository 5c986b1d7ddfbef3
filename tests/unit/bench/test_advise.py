from __future__ import annotations

from bench.advise import traffic_of
from bench.load.workload import PlannedRequest
from bench.routing.sim.scenarios import CountedWindow
from bench.routing.sim.world import SimOutcome, SimRun
from shared.link.messages import Tier


def outcome(at_s: float, adapter: int, ttft_s: float, tier: Tier) -> SimOutcome:
    request = PlannedRequest(0, at_s, adapter, None, 128, 128)
    load_s = 0.0 if tier is Tier.GPU else 0.1
    return SimOutcome(request, ttft_s, at_s, at_s + 2.0, tier=tier, load_s=load_s)


def test_the_formulas_see_what_a_gateway_would_have_counted() -> None:
    run = SimRun(
        [
            outcome(5.0, 7, 0.1, Tier.GPU),  # while it warms up
            outcome(25.0, 0, 0.03, Tier.GPU),
            outcome(26.0, 0, 0.05, Tier.GPU),
            outcome(27.0, 1, 0.14, Tier.DISK),
        ],
        [],
    )
    found = traffic_of(run, CountedWindow(20.0, 60.0))
    assert (found.requests, found.span_s, round(found.held.sum_s, 6)) == (3, 60.0, 5.9)
    assert sorted(found.counts.values()) == [1, 2]
    assert (found.warm.count, found.loads.count) == (2, 1)
    assert found.loads.sum_s == 0.1 and found.output_tokens == 3 * 128
