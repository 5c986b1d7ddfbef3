"""Pure. What a page shows of the fleet and of the keys."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import msgspec

from gateway.accounts.account import Account
from gateway.fleet.worker_view import WorkerView
from shared.link.messages import AdapterState, WorkerState

Row = dict[str, object]


def worker(w: WorkerView) -> Row:
    beat = w.beat
    state = beat.state
    if state is WorkerState.SERVING and not w.routable:
        state = WorkerState.JOINING  # it beats, but nothing can be sent to it
    return {
        "id": w.id,
        "base": beat.base,
        "host": beat.host,
        "epoch": beat.epoch,
        "state": state.name.lower(),
        "reason": beat.reason or beat.suspect,
        "load": w.load,
        "running": beat.running,
        "waiting": beat.waiting,
        "capacity": beat.capacity,
        "slots": beat.slots,
        "slots_loaded": len(w.loaded),
        "slots_busy": w.occupied,
        "kv_usage": round(beat.kv_usage, 4),
        "step_ms": round(beat.step_s * 1e3, 2),
        "load_ms": round(beat.load_s * 1e3, 1),
        "stall_ms": round(beat.stall_s * 1e3, 1),
        "prefill_tokens_per_s": round(beat.prefill_tokens_per_s),
    }


def changed(workers: Sequence[WorkerView], told: dict[str, object]) -> dict[str, object]:
    """By worker what it holds, where that is not what was `told` before, which is brought up to
    date; None: it is gone.
    """
    news: dict[str, object] = {}
    for w in workers:
        if w.id not in told or told[w.id] != w.beat.adapters:
            told[w.id] = w.beat.adapters
            news[w.id] = [_held(state) for state in w.beat.adapters]
    for gone in set(told) - {w.id for w in workers}:
        del told[gone]
        news[gone] = None
    return news


def _held(s: AdapterState) -> Sequence[object]:
    """name, tier, loading, pinned, requests in flight, seconds until it is loaded."""
    return (s.name, s.tier.name.lower(), s.loading, s.pinned, s.in_flight, round(s.eta_s, 2))


def accounts(known: Iterable[Account]) -> list[Row]:
    return [_account(account) for account in sorted(known, key=lambda a: a.name)]


def _account(account: Account) -> Row:
    limits = msgspec.structs.asdict(account.limits)
    return {
        "key": account.name,
        "models": list(account.models),
        "adapters": list(account.adapters),
        "weight": account.weight,
        "limits": {name: value for name, value in limits.items() if value is not None},
        "expires": None if math.isinf(account.expires) else account.expires,
    }
