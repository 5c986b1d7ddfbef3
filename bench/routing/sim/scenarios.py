"""Pure. The named situations that policies are compared in: which adapters are asked for, how long
requests are, and when.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from heapq import merge
from itertools import takewhile

from bench.load.workload import (
    Fixed,
    FlashCrowd,
    Identical,
    Length,
    LogNormal,
    Mix,
    PlannedRequest,
    Poisson,
    Uniform,
    Workload,
    Zipf,
    requests,
)

WORKERS = 8
TOKENS = Fixed(128)
FLASH_RAMP_S = 1.0
FLASH_AT = 1 / 3
"""Of the measured time, when the crowd comes, a worker joins or one is lost."""


@dataclass(frozen=True, slots=True)
class TrafficScenario:
    """`flash`: beside the rest, one more adapter, cold until then, comes to as many requests per
    second as all others together.
    """

    name: str
    what: str
    adapters: int
    mix: Mix
    prompt: Length = TOKENS
    output: Length = TOKENS
    flash: bool = False

    @property
    def all_adapters(self) -> int:
        return self.adapters + self.flash


_SKEWED = LogNormal(96, 0.76, 2048)
"""The mean of this log-normal is 128 tokens, so that the load is that of `default`; one request in
100 is six times its median.
"""

SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        TrafficScenario("default", "1,000 adapters, Zipf 1.0", 1000, Zipf(1.0)),
        TrafficScenario(
            "fits", "100 adapters, Zipf 1.0: all fit into the slots of the fleet", 100, Zipf(1.0)
        ),
        TrafficScenario("hot", "1,000 adapters, Zipf 1.5", 1000, Zipf(1.5)),
        TrafficScenario("flat", "500 adapters, all alike", 500, Uniform()),
        TrafficScenario(
            "flash",
            "default, and one cold adapter goes from 0 to 50% of all requests in 1 s",
            1000,
            Zipf(1.0),
            flash=True,
        ),
        TrafficScenario(
            "lengths",
            "default with log-normal lengths of prompts and answers",
            1000,
            Zipf(1.0),
            _SKEWED,
            _SKEWED,
        ),
    )
}


@dataclass(frozen=True, slots=True)
class CountedWindow:
    """Requests arrive from 0 to `warm_up_s` + `duration_s`; those of the first `warm_up_s` are
    served but not counted.
    """

    warm_up_s: float = 20.0
    duration_s: float = 60.0

    @property
    def end_s(self) -> float:
        return self.warm_up_s + self.duration_s

    @property
    def flash_s(self) -> float:
        return self.warm_up_s + FLASH_AT * self.duration_s

    def counts(self, at_s: float) -> bool:
        return self.warm_up_s <= at_s < self.end_s


def requests_of(
    scenario: TrafficScenario, rate_per_s: float, seed: int, window: CountedWindow
) -> list[PlannedRequest]:
    """All requests of a run. The same seed draws the same adapters and lengths in the same order at
    any rate, and gaps that only scale.

    `rate_per_s` is that of the steady requests; a flash crowd comes on top of it.
    """
    load = Workload(
        Poisson(rate_per_s), scenario.mix, scenario.adapters, scenario.prompt, scenario.output, seed
    )
    steady = takewhile(lambda request: request.at_s < window.end_s, requests(load))
    if not scenario.flash:
        return list(steady)
    crowd = replace(
        load,
        arrival=FlashCrowd(0.0, rate_per_s, window.flash_s, FLASH_RAMP_S),
        mix=Identical(),
        seed=seed + 1_000_003,
    )
    extra = (
        replace(r, adapter=scenario.adapters)
        for r in takewhile(lambda request: request.at_s < window.end_s, requests(crowd))
    )
    both = merge(steady, extra, key=lambda request: request.at_s)
    return [replace(request, index=index) for index, request in enumerate(both)]
