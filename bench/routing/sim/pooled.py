"""Pure. A policy's own run, had its fleet been one worker with all the slots, and had eviction
known the future.

What separates a policy from the clairvoyant bound is partly the engines (answers take longer where
many run and loads stop them) and partly that a slot is on one worker and an adapter's weights on
another. This takes the second part away and leaves the first: every request stays in its slot for
as long as it did in the run and has its first token as long after it was sent, but it may take any
slot of the fleet, first come first served, at once if its adapter is in flight; loads are those of
Belady's rule (see clairvoyant.py) on all slots as one cache.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from bench.routing.sim.clairvoyant import FLEET, hits_of
from bench.routing.sim.worker import WorkerFacts
from bench.routing.sim.world import LoadSeen, SimOutcome, SimRun, adapter_name
from shared.link.messages import Tier

SlotUse = tuple[int, float, float]
"""(adapter, from when, for how long), in seconds."""


def starts_of(slot_uses: Sequence[SlotUse], slots: int) -> list[float]:
    """When each of these, in order of arrival, gets a slot: with its adapter if that has one, else
    the next that is free.
    """
    starts = [0.0] * len(slot_uses)
    in_flight: Counter[int] = Counter()
    ends: list[tuple[float, int]] = []  # heap
    line: dict[int, list[int]] = {}  # adapters that wait, in order, with their requests

    def start(nth: int, now: float) -> None:
        adapter, _, lasts_s = slot_uses[nth]
        starts[nth] = now
        in_flight[adapter] += 1
        heapq.heappush(ends, (now + lasts_s, adapter))

    def end() -> None:
        now, adapter = heapq.heappop(ends)
        in_flight[adapter] -= 1
        if in_flight[adapter]:
            return
        del in_flight[adapter]
        if line:
            for nth in line.pop(next(iter(line))):
                start(nth, now)

    for nth, (adapter, now, _) in enumerate(slot_uses):
        while ends and ends[0][0] <= now:
            end()
        if adapter in in_flight or (adapter not in line and len(in_flight) < slots):
            start(nth, now)
        else:
            line.setdefault(adapter, []).append(nth)
    while ends:
        end()
    return starts


def pooled(run: SimRun, workers: int, facts: WorkerFacts) -> SimRun:
    """The run as it would have been. Every request of it must have been served.

    Raises: ValueError if one was not.
    """
    asked = [o for o in run.outcomes if o.request.adapter is not None]
    slot_uses: list[SlotUse] = []
    for outcome in asked:
        if (
            outcome.ttft_s is None
            or outcome.ended_s is None
            or outcome.failed is not None
            or outcome.request.adapter is None
        ):
            raise ValueError(
                f"request {outcome.request.index} was not served: of an overloaded "
                "fleet nothing can be said here"
            )
        slot_uses.append(
            (outcome.request.adapter, outcome.request.at_s, outcome.ended_s - outcome.sent_s)
        )
    starts = starts_of(slot_uses, workers * facts.slots)
    made = SimRun([], [], ended_s=run.ended_s)
    tiers = dict(
        zip(
            (id(outcome) for outcome in asked),
            _tiers(slot_uses, starts, workers, facts),
            strict=True,
        )
    )
    began = dict(zip((id(outcome) for outcome in asked), starts, strict=True))
    for outcome in run.outcomes:
        if id(outcome) not in began:
            made.outcomes.append(outcome)
            continue
        made.outcomes.append(_moved(outcome, began[id(outcome)], tiers[id(outcome)]))
        if tiers[id(outcome)] is not Tier.GPU and outcome.request.adapter is not None:
            made.loads.append(
                LoadSeen(
                    began[id(outcome)],
                    FLEET,
                    adapter_name(outcome.request.adapter),
                    tiers[id(outcome)],
                )
            )
    return made


def _tiers(
    slot_uses: Sequence[SlotUse], starts: Sequence[float], workers: int, facts: WorkerFacts
) -> list[Tier]:
    """Where each one's adapter is when it starts."""
    order = sorted(range(len(slot_uses)), key=starts.__getitem__)
    uses = [(slot_uses[nth][0], starts[nth], starts[nth] + slot_uses[nth][2]) for nth in order]
    in_slot = hits_of(uses, workers * facts.slots)
    in_memory = hits_of(uses, workers * (facts.slots + facts.cpu_adapters))
    tiers = [Tier.GPU] * len(slot_uses)
    for nth, hit, near in zip(order, in_slot, in_memory, strict=True):
        tiers[nth] = Tier.GPU if hit else Tier.CPU if near else Tier.DISK
    return tiers


def _moved(outcome: SimOutcome, start_s: float, tier: Tier) -> SimOutcome:
    """Sent at another time."""
    assert outcome.ttft_s is not None and outcome.ended_s is not None
    later_s = start_s - outcome.sent_s
    return replace(
        outcome,
        ttft_s=outcome.ttft_s + later_s,
        sent_s=start_s,
        ended_s=outcome.ended_s + later_s,
        tier=tier,
        worker=FLEET,
    )
