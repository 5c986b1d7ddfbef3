"""Pure. What nobody can beat: loads with perfect knowledge of the future, and answers without any
waiting.

Loads. Whatever the gateway does, a request starts while its adapter is in some slot of some worker
and keeps it there until it ends, and a load fills one slot. So a fleet of W workers with S slots
that serves requests as they come does at least as many loads as one cache of W x S places that
holds every adapter once, keeps what is in use for as long as the answer takes on an idle engine,
and otherwise evicts the adapter whose next use is furthest away (Belady, "A study of replacement
algorithms for a virtual-storage computer", 1966). Likewise with the places of the CPU tier added:
at least as many loads come from below it. A policy that holds requests back until others of their
adapter come could go below it, and pays for that in time to first token.

Answers. Each request is alone on an engine: its TTFT is that of an idle worker, plus its load's own
time if the bound has a load for it. The capacity is the rate at which engines with full batches are
busy all the time, prompts and the bound's loads included.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence

from bench.load.workload import PlannedRequest
from bench.routing.sim.timing import Timing
from bench.routing.sim.worker import WorkerFacts
from bench.routing.sim.world import LoadSeen, SimOutcome, SimRun, adapter_name
from shared.link.messages import Tier

FLEET = "fleet"


def hits_of(requests: Sequence[tuple[int, float, float]], places: int) -> list[bool]:
    """Which of these requests, (adapter, from when, until when it is in use), find their adapter.
    Starts empty.

    What is in use stays; of the rest the one needed latest makes room. If all are in use one more
    place is lent: nobody waits here.
    """
    uses: defaultdict[int, list[int]] = defaultdict(list)
    for at in range(len(requests) - 1, -1, -1):
        uses[requests[at][0]].append(at)  # the next use is last
    held: dict[int, int] = {}  # adapter -> its next use
    busy_until: dict[int, float] = {}
    busy: list[tuple[float, int]] = []  # heap of (until when, adapter)
    # heap of (-next use, adapter) of those not in use; out of date unless `held` agrees
    latest: list[tuple[int, int]] = []
    hits = []
    for adapter, now, until in requests:
        while busy and busy[0][0] <= now:
            _, free = heapq.heappop(busy)
            if busy_until[free] <= now:
                heapq.heappush(latest, (-held[free], free))
        uses[adapter].pop()
        hits.append(adapter in held)
        while adapter not in held and len(held) >= places and latest:
            next_use, victim = heapq.heappop(latest)
            if held.get(victim) == -next_use and busy_until[victim] <= now:
                del held[victim]
        held[adapter] = uses[adapter][-1] if uses[adapter] else len(requests)
        busy_until[adapter] = max(busy_until.get(adapter, 0.0), until)
        heapq.heappush(busy, (until, adapter))
    return hits


def bound(
    requests: Sequence[PlannedRequest], workers: int, facts: WorkerFacts, timing: Timing
) -> SimRun:
    """The bound as a run, so that it is counted like any other."""
    uses = [
        (r.adapter, r.at_s, r.at_s + _least_s(r, timing)) for r in requests if r.adapter is not None
    ]
    in_slot = iter(hits_of(uses, workers * facts.slots))
    in_memory = iter(hits_of(uses, workers * (facts.slots + facts.cpu_adapters)))
    seen: set[int] = set()
    run = SimRun([], [])
    for request in requests:
        tier = Tier.GPU
        if request.adapter is not None:
            hit, near = next(in_slot), next(in_memory)
            far = Tier.DISK if facts.disk_warm or request.adapter in seen else Tier.REMOTE
            tier = Tier.GPU if hit else Tier.CPU if near else far
            seen.add(request.adapter)
        wait_s = (
            0.0
            if tier is Tier.GPU
            else timing.fetch_s(tier, facts.adapter_bytes)
            + timing.load_from_s(tier, facts.adapter_bytes)
        )
        wait_s += timing.prepared_in_s(facts.adapter_bytes) if tier > Tier.CPU else 0.0
        if tier is not Tier.GPU and request.adapter is not None:
            run.loads.append(LoadSeen(request.at_s, FLEET, adapter_name(request.adapter), tier))
        ttft_s = wait_s + timing.outside_s + timing.prefill_step_s(1, request.prompt_tokens)
        ended_s = request.at_s + ttft_s + (request.output_tokens - 1) * timing.step_s(1)
        run.outcomes.append(
            SimOutcome(request, ttft_s, request.at_s, ended_s, None, tier, FLEET, 1)
        )
    run.ended_s = max((outcome.ended_s or 0.0 for outcome in run.outcomes), default=0.0)
    return run


def _least_s(request: PlannedRequest, timing: Timing) -> float:
    """What an engine needs for an answer that is alone there."""
    first_s = timing.prefill_step_s(1, request.prompt_tokens)
    return first_s + (request.output_tokens - 1) * timing.step_s(1)


def capacity_bound(run: SimRun, workers: int, facts: WorkerFacts, timing: Timing) -> float:
    """Requests per second that no policy exceeds for long."""
    requests = len(run.outcomes)
    load_s = (
        sum(timing.load_from_s(load.tier, facts.adapter_bytes) for load in run.loads) / requests
    )
    prompt = sum(outcome.request.prompt_tokens for outcome in run.outcomes) / requests
    output = sum(outcome.request.output_tokens for outcome in run.outcomes) / requests
    return workers * timing.most_requests_per_s(prompt, output, load_s)
