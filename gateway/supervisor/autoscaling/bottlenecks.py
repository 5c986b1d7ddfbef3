"""Pure. What Ray does not count: adapters, KV cache and tokens that wait. Each as workers needed.

    slots      distinct adapters in flight or waiting / (slots of a worker x share)
    kv_usage   sum of the workers' KV cache usage / share
    ttft       seconds of prompt tokens that wait for their prefill / ttft_s

Sums, not means: a mean would hide that one worker more has halved it. Occupancy is a level: a full
KV cache that flows is healthy, so its share is below 1 and a moment above it is no reason yet (the
delays of the decision see to that).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from gateway.supervisor.autoscaling.decision import Cause, whole
from gateway.supervisor.autoscaling.reports import ModelLoad, WorkerLoad
from shared.config.deployment import BottleneckConfig

ADAPTERS, KV, BACKLOG_S = "adapters", "kv", "backlog_s"
"""What is measured, by the names under which it is kept over time."""


def workers_of(loads: Iterable[ModelLoad]) -> dict[str, WorkerLoad]:
    """Every worker that serves, as the gateway process knows it that has heard of it last.
    `requests` is the sum over all processes.
    """
    found: dict[str, WorkerLoad] = {}
    for load in loads:
        for name, worker in load.workers.items():
            if not worker.serving:
                continue
            known = found.get(name)
            if known is None:
                found[name] = worker
                continue
            newer = max(known, worker, key=lambda w: (w.epoch, w.seq))
            found[name] = newer.with_requests(known.requests + worker.requests)
    return found


def measure(loads: Iterable[ModelLoad]) -> dict[str, float]:
    """The amounts of this moment, over all gateway processes."""
    loads = list(loads)
    workers = workers_of(loads).values()
    adapters = {name for load in loads for name in load.adapters}
    rates = [w.prefill_tokens_per_s for w in workers if w.prefill_tokens_per_s > 0]
    tokens = sum(w.waiting_tokens for w in workers) + sum(load.queued_tokens for load in loads)
    return {
        ADAPTERS: float(len(adapters)),
        KV: sum(w.kv_usage for w in workers),
        BACKLOG_S: tokens / (sum(rates) / len(rates)) if rates else 0.0,
    }


def needs(
    config: BottleneckConfig | None, measured: Mapping[str, float], slots_per_worker: int
) -> dict[Cause, int]:
    """Workers that each bottleneck takes; without one that is switched off or unknown."""
    found: dict[Cause, int] = {}
    if config is None:
        return found
    if config.slots is not None and slots_per_worker:
        found["slots"] = whole(measured[ADAPTERS] / (slots_per_worker * config.slots))
    if config.kv_usage is not None:
        found["kv_usage"] = whole(measured[KV] / config.kv_usage)
    if config.ttft_s is not None:
        found["ttft"] = whole(measured[BACKLOG_S] / config.ttft_s)
    return found
