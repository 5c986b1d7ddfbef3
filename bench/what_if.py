"""Shell. `python -m bench.what_if`: what a fleet of another size would do with the traffic that a
gateway has seen. `loraplex advise --simulate` runs it, one process for each model.

It reads a SimulatorQuestion from its input and writes a SimulatorAnswer. The gateway's and the
workers' own code runs in virtual time, behind arrivals at random in the traffic's proportions. The
simulated engine is as fast as the traffic says: its steps, its first token and its loads take the
mean times that were seen.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import random
import sys
from collections.abc import Callable, Iterator

from bench.load.workload import PlannedRequest
from bench.routing.sim.timing import Timing, timing_of
from bench.routing.sim.worker import WorkerFacts
from bench.routing.sim.world import SimRun, World, simulate
from gateway.advisor.advice import TAIL, Expectation, FleetSize, Goal, load_s_of
from gateway.advisor.question import (
    SimulatorAnswer,
    SimulatorQuestion,
    decode_question,
    encode,
)
from gateway.advisor.traffic import Traffic
from gateway.advisor.unseen import unseen
from shared.link.messages import Tier

POLICY = "expected-ttft"
WARM_UP, COUNTED = 1500, 4000
"""Requests of one run. The first ones fill the slots."""
TIMES_SEEN = 5
"""No more than so many times the requests that were seen: more would tell nothing new."""
LONGEST_S = 1200.0
"""Of virtual time: a model that is hardly asked for is judged by fewer requests."""
USUAL_TOKENS = 128
"""Of prompt and answer, where the traffic does not say."""
MOST_UNSEEN = 1_000_000
MOST_TRIES = 8
OVERLOADED_S = 60.0
"""A first token that takes longer: the fleet cannot keep up."""


def timing_like(traffic: Traffic, fleet: FleetSize) -> Timing:
    """An engine with the mean times of this traffic. The shape, how a step grows with the batch,
    is that of the simulator's own table.
    """
    own, output = timing_of("own"), tokens_of(traffic)[1]
    held_s, warm_s = traffic.held.mean_s(), traffic.warm.mean_s()
    running = held_s * traffic.requests / max(traffic.span_s, 1e-9) / max(1, fleet.workers)
    step_s = max(1e-4, (held_s - warm_s) / max(1, output - 1))
    scale = step_s / own.step_s(max(1, round(running)))
    prefill_s = min(tokens_of(traffic)[0] / own.prefill_tokens_per_s * scale, warm_s / 2)
    # a first token waits for half a step, and on vLLM for one that is scheduled already
    ahead = warm_s - prefill_s >= 2.5 * step_s
    rest_s = max(0.0, warm_s - prefill_s - (2.5 if ahead else 1.5) * step_s)
    mixed_s = min(own.mixed_s * scale, rest_s)
    loads = load_s_of(traffic, fleet) / (own.fetch_disk_s + own.prepare_s + own.load_s)
    return dataclasses.replace(
        own,
        decode=tuple((sequences, seconds * scale) for sequences, seconds in own.decode),
        prefill_tokens_per_s=tokens_of(traffic)[0] / max(prefill_s, 1e-6),
        mixed_s=mixed_s,
        outside_s=rest_s - mixed_s,
        scheduled_ahead=ahead,
        max_sequences=max(1, fleet.capacity),
        load_s=own.load_s * loads,
        prepare_s=own.prepare_s * loads,
        fetch_disk_s=own.fetch_disk_s * loads,
    )


def tokens_of(traffic: Traffic) -> tuple[int, int]:
    """(of a prompt, of an answer), on average."""
    if not traffic.output_tokens:
        return USUAL_TOKENS, USUAL_TOKENS
    count = max(1, traffic.requests)
    return max(1, traffic.prompt_tokens // count), max(1, traffic.output_tokens // count)


def arrivals(traffic: Traffic, seed: int) -> Iterator[PlannedRequest]:
    """Independent requests, each adapter as often as it was asked for. Beside them come adapters
    that have not been seen yet.
    """
    rng = random.Random(seed)
    rate_per_s = traffic.requests / max(traffic.span_s, 1e-9)
    new, seen = unseen(traffic.counts.values()), len(traffic.counts)
    adapters: list[int | None] = [*range(seen + 1), None]
    weights = [*(n - new.discount for n in traffic.counts.values()), new.requests, traffic.others]
    prompt, output = tokens_of(traffic)
    count = min(WARM_UP + COUNTED, TIMES_SEEN * traffic.requests)
    at_s = 0.0
    for index, adapter in enumerate(rng.choices(adapters, weights, k=count)):
        at_s += rng.expovariate(rate_per_s)
        if at_s > LONGEST_S:
            return
        if adapter == seen:
            adapter += rng.randrange(min(MOST_UNSEEN, max(1, round(new.adapters))))
        yield PlannedRequest(index, at_s, adapter, None, prompt, output)


def try_out(traffic: Traffic, fleet: FleetSize, timing: Timing) -> tuple[int, Expectation]:
    """(requests that were counted, what became of them)."""
    planned = list(arrivals(traffic, 1))
    counted_from = min(WARM_UP, len(planned) // 4)
    planned = _numbered(planned)
    adapters = len({r.adapter for r in planned})
    facts = WorkerFacts("base", slots=max(1, fleet.slots), capacity=max(1, fleet.capacity))
    world = World(POLICY, fleet.workers, adapters, 1, timing, facts)
    run = simulate(world, planned)
    return len(planned) - counted_from, expectation_of(run, counted_from)


def _numbered(planned: list[PlannedRequest]) -> list[PlannedRequest]:
    """The same, with adapters numbered from 0 on without a gap."""
    found = dict.fromkeys(r.adapter for r in planned if r.adapter is not None)
    number: dict[int | None, int | None] = {adapter: n for n, adapter in enumerate(found)}
    return [dataclasses.replace(r, adapter=number.get(r.adapter)) for r in planned]


def expectation_of(run: SimRun, counted_from: int) -> Expectation:
    """What a run did, from so many requests on."""
    counted = [o for o in run.outcomes if o.request.index >= counted_from and o.ttft_s is not None]
    if not counted:
        return Expectation(1.0, 1.0, None)
    times_s = sorted(o.ttft_s for o in counted if o.ttft_s is not None)
    p99_s = times_s[math.ceil(TAIL * len(times_s)) - 1]
    missed = sum(o.tier not in (Tier.GPU, None) for o in counted)
    waited = sum(o.sent_s > o.request.at_s for o in counted)
    return Expectation(
        missed / len(counted),
        waited / len(counted),
        p99_s if p99_s < OVERLOADED_S else None,
    )


def answer(question: SimulatorQuestion) -> SimulatorAnswer:
    traffic, fleet, goal = question.traffic, question.fleet, question.goal
    timing = timing_like(traffic, fleet)
    requests, now = 0, None
    if fleet.workers:
        requests, now = try_out(traffic, fleet, timing)
    tried: dict[int, Expectation] = {} if now is None else {fleet.workers: now}

    def enough(workers: int) -> bool:
        if workers not in tried:
            tried[workers] = try_out(traffic, fleet.times(workers), timing)[1]
        return reaches(tried[workers], goal)

    workers = least_workers(enough, question.workers or max(1, fleet.workers))
    return SimulatorAnswer(requests, now, workers, None if workers is None else tried[workers])


def reaches(found: Expectation, goal: Goal) -> bool:
    ttft_s = math.inf if found.ttft_p99_s is None else found.ttft_p99_s
    wanted_s = sys.float_info.max if goal.ttft_p99_s is None else goal.ttft_p99_s
    return found.miss_rate <= goal.miss_rate and ttft_s <= wanted_s


def least_workers(enough: Callable[[int], bool], first: int) -> int | None:
    """The least number that is enough, looked for around `first` with few tries. None: not even
    the largest number that was tried is.
    """
    low, high, width = 0, None, 1
    at = first
    for _ in range(MOST_TRIES):
        if enough(at):
            high = at
        else:
            low = at
        if high is not None and high - low == 1:
            return high
        if high is None:
            at, width = at + width, 2 * width
        elif low == 0:
            at, width = max(1, at - width), 2 * width
        else:
            at = (low + high) // 2
    return high


def main() -> int:
    logging.disable(logging.CRITICAL)  # virtual workers are found and lost
    sys.stdout.buffer.write(encode(answer(decode_question(sys.stdin.buffer.read()))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
