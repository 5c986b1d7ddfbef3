"""Pure. Bottlenecks that Ray does not count: adapter slots, KV cache, and prompt tokens that wait.
Each one is expressed in workers needed.

    slots      distinct adapters in flight or waiting / (slots of a worker x share)
    kv_usage   sum of the workers' KV cache usage / share
    ttft       seconds of prompt tokens that wait for their prefill / ttft_s

These are sums and not means. With one worker more, a mean would fall while the need stays the same.
A full KV cache is healthy while requests flow. So its target share is below 1, and the delays of
the decision let short peaks pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from gateway.supervisor.autoscaling.decision import Cause, whole
from gateway.supervisor.autoscaling.reports import ModelLoad, WorkerLoad
from shared.config.deployment import BottleneckConfig

ADAPTERS, KV, BACKLOG_S = "adapters", "kv", "backlog_s"
"""The names under which the measured amounts are kept over time."""


def workers_of(loads: Iterable[ModelLoad]) -> dict[str, WorkerLoad]:
    """Every serving worker, as the gateway process with its newest heartbeat describes it.
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
    """The amounts at this moment, over all gateway processes."""
    loads = list(loads)
    workers = workers_of(loads).values()
    adapters = {name for load in loads for name in load.adapters}
    rates = [w.prefill_tokens_per_s for w in workers if w.prefill_tokens_per_s > 0]
    tokens = sum(load.queued_tokens for load in loads)
    return {
        ADAPTERS: float(len(adapters)),
        KV: sum(w.kv_usage for w in workers),
        BACKLOG_S: tokens / (sum(rates) / len(rates)) if rates else 0.0,
    }


def needs(
    config: BottleneckConfig | None, measured: Mapping[str, float], slots_per_worker: int
) -> dict[Cause, int]:
    """The workers that each bottleneck needs. A bottleneck that is switched off or unknown is left
    out.
    """
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
