"""Pure. What it costs to serve a request on a worker, in seconds: until its own first token, and
what other requests lose by it.

    queue    prompts that wait for their prefill, a step, and the sequences that run beside it
    line     the wait for a slot, if none is free
    slot     the same wait, for those behind it: each adapter in line, or else the next one x the
             chance that it finds no slot. Requests that use the slot at the same time share it
    load     until the adapter is in its slot
    stall    what a load stops the engine for, for everybody who runs there
    outside  the rest of a first token's time, as it was with the requests before (a median): HTTP,
             tokenizing, hand-overs. It is the same for all workers
    prefix   less, where the prompt's beginning is cached

The chance: slots fill and empty like a birth-death process. With `u` of them in use, one more is
taken while one is given back with a probability of about u / slots. So `free` more are taken in a
row with (u / slots) ^ free: next to nothing while slots abound, and one when none is free. A second
copy has the chance of the average worker: it stays as long as its crowd, so a worker with free
slots at this moment says little about it.

The wait: of `slots` slots that are all in use, one becomes free every service time / slots.
"""

from __future__ import annotations

from collections.abc import Collection

import msgspec

from gateway.fleet.worker_view import WorkerView
from gateway.routing.policy import CostBreakdown, RoutingRequest
from shared.adapters.identity import AdapterKey
from shared.link.messages import Tier

SERVICE_S = 2.0
"""Until some requests have ended."""
PREFILL_TOKENS_PER_S = 20_000.0
"""Until a worker has measured its own. An 8B model on an H200 reads 12,000 to 32,000."""
LOAD_S = 0.090
"""A load from disk, until it is measured: on an H200 the first token of a cold adapter of 26 MiB
comes 92 ms after a warm one's.
"""
FETCH_S = 0.250
"""A fetch from the store, until it is measured: 26 MiB over a 1 Gbit/s link, and its latency."""
CROWD_S = 0.0003
"""What one running sequence costs the next request. On an H200 a step grows by 0.05 ms with each
sequence. A first token takes two and a half steps; the rest stands for the later tokens, of this
request and of the others, which count less than a first token.
"""


class Learned(msgspec.Struct, frozen=True):
    """Of one base model's requests, in seconds: how long one usually stays on a worker, and what of
    its first token's time the other terms do not tell.
    """

    service_s: float = SERVICE_S
    outside_s: float = 0.0


def price(
    request: RoutingRequest,
    key: AdapterKey | None,
    worker: WorkerView,
    learned: Learned,
    now: float,
    shared_by: float = 1.0,
    prefix_s: float = 0.0,
    only_copy: bool = False,
    chance: float | None = None,
) -> CostBreakdown:
    """`key` None: the base model. As many requests as `shared_by` will use what is loaded for this
    one, so each pays its share of the load. `only_copy`: no other worker has the adapter. `chance`:
    that the next adapter finds no slot; None: the worker's own.
    """
    heartbeat, load = worker.heartbeat, worker.load
    tokens = worker.unseen_tokens + request.prompt_tokens
    queue_s = tokens / (heartbeat.prefill_tokens_per_s or PREFILL_TOKENS_PER_S) + CROWD_S * load
    if load:  # what an idle worker measured last says nothing about its next step
        queue_s += heartbeat.step_s
    line_s = slot_s = load_s = stall_s = 0.0
    if key is not None:
        loaded, users = key in worker.loaded, worker.in_flight(key)
        # one in steady use keeps its slot anyhow, and the only copy in flight needs one anywhere
        if heartbeat.slots and key not in worker.steady and not (only_copy and users):
            wait_s, in_line = learned.service_s / heartbeat.slots, _in_line(worker)
            puts_off = in_line or (_no_slot(worker) if chance is None else chance)
            slot_s = wait_s * puts_off / (1 + users)
            if not users and not loaded:
                line_s = wait_s * in_line
        if not loaded:
            load_s, stall_s = _load_s(worker, key, now)
            load_s, stall_s = load_s / shared_by, stall_s * load / shared_by
    outside_s = learned.outside_s
    return CostBreakdown(queue_s, line_s, slot_s, load_s, stall_s, outside_s, prefix_s)


def mean_chance(workers: Collection[WorkerView]) -> float:
    """The chance that an adapter finds no slot on one of these workers; there is at least one."""
    return sum(_no_slot(worker) for worker in workers) / len(workers)


def _no_slot(worker: WorkerView) -> float:
    """The chance that the next adapter finds none once this one has taken its own."""
    slots, used = worker.heartbeat.slots, worker.occupied
    if used >= slots:
        return 1.0 if slots else 0.0  # none: without limit
    return (used / slots) ** (slots - used)


def _in_line(worker: WorkerView) -> int:
    """Adapters that must get a slot before this one has its own, itself included. 0: one is
    free.
    """
    return max(0, worker.occupied - worker.heartbeat.slots + 1)


def _load_s(worker: WorkerView, key: AdapterKey, now: float) -> tuple[float, float]:
    """(seconds until the adapter is in a slot, those for which the engine stops)"""
    heartbeat, tier, state = worker.heartbeat, worker.tier_at(key), worker.held.get(key)
    stall_s = heartbeat.stall_s or LOAD_S
    load_s = stall_s if tier is Tier.CPU else max(stall_s, heartbeat.load_s)
    if tier is Tier.REMOTE:
        load_s += heartbeat.fetch_s or FETCH_S
    if key not in worker.coming:
        return load_s * (1 + len(worker.coming)), stall_s  # behind those that are on their way
    if state is not None and state.loading:
        load_s = max(0.0, state.eta_s - (now - worker.heartbeat_at))
    return load_s, 0.0
