"""Pure. The rows of the dashboard: workers, their adapters, and accounts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import msgspec

from gateway.accounts.account import Account
from gateway.fleet.worker_view import WorkerView
from gateway.telemetry.recorder import Recorder
from shared.link.messages import AdapterState

LiveRow: TypeAlias = dict[str, object]


def worker(w: WorkerView, recorder: Recorder, moved_elsewhere: int) -> LiveRow:
    """`restarts` and `moved` (streams that others went on with) are counted since the gateway
    processes began. `moved_elsewhere` are the streams of other processes.
    """
    heartbeat = w.heartbeat
    return {
        "id": w.id,
        "base": heartbeat.base,
        "host": heartbeat.host,
        "epoch": heartbeat.epoch,
        "state": w.shown_state.name.lower(),
        "reason": heartbeat.reason or heartbeat.suspect,
        "load": w.load,
        "running": heartbeat.running,
        "waiting": heartbeat.waiting,
        "capacity": heartbeat.capacity,
        "slots": heartbeat.slots,
        "slots_loaded": len(w.loaded),
        "slots_busy": w.occupied,
        "kv_usage": round(heartbeat.kv_usage, 4),
        "step_ms": round(heartbeat.step_s * 1e3, 2),
        "load_ms": round(heartbeat.load_s * 1e3, 1),
        "stall_ms": round(heartbeat.stall_s * 1e3, 1),
        "loads": sum(heartbeat.adapter_loads.values()),
        "restarts": recorder.restarts.get(w.id, 0),
        "moved": recorder.moved_from.get(w.id, 0) + moved_elsewhere,
        "prefill_tokens_per_s": round(heartbeat.prefill_tokens_per_s),
    }


def held(states: Iterable[AdapterState]) -> list[Sequence[object]]:
    """(name, tier, loading, pinned, requests in flight, seconds until it is loaded) of each. Of two
    versions of a name the page shows the last: the one in the better tier.
    """
    return [
        (s.name, s.tier.name.lower(), s.loading, s.pinned, s.in_flight, round(s.eta_s, 2))
        for s in sorted(states, key=lambda s: s.tier, reverse=True)
    ]


def account(account: Account, left: Mapping[str, float]) -> LiveRow:
    """`left` of each limit now, by its name."""
    limits = msgspec.structs.asdict(account.limits)
    return {
        "key": account.name,
        "models": list(account.models),
        "adapters": list(account.adapters),
        "weight": account.weight,
        "limits": {name: value for name, value in limits.items() if value is not None},
        "left": dict(left),
        "expires": None if math.isinf(account.expires) else account.expires,
    }
