"""Pure. What operators see of each adapter: one row that joins the catalog, the workers and this
gateway's own records.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TypeAlias

from gateway.adapters.usage import UsageRecord
from gateway.adapters.versions import VersionChange, VersionStage
from gateway.fleet.worker_view import WorkerView
from shared.adapters.identity import StoredAdapter
from shared.errors import InvalidAdapter
from shared.link.messages import AdapterState, Tier, WorkerId

STATES = ("listed", "cached", "warm", "loading", "loaded", "pinned", "invalid")
"""In order: in the store; on a worker's disk; in an engine's host memory; on its way to a slot; in
a slot; pinned in a slot; the newest version was refused.
"""
Holder: TypeAlias = tuple[WorkerId, AdapterState]
AdapterRow: TypeAlias = dict[str, object]


def holders(workers: Iterable[WorkerView]) -> dict[str, list[Holder]]:
    """Name -> the workers that have or load a version of it, as of their last heartbeats."""
    found: dict[str, list[Holder]] = {}
    for worker in sorted(workers, key=lambda w: w.id):
        for state in worker.heartbeat.adapters:
            found.setdefault(state.name, []).append((worker.id, state))
    return found


def after(names: Sequence[str], last: str) -> int:
    """Where the page begins that follows the name `last`; `names` are sorted."""
    return bisect_right(names, last) if last else 0


def state_of(
    stored: StoredAdapter | None,
    held: Sequence[Holder],
    record: UsageRecord | None,
    change: VersionChange | None = None,
    on_disk: Sequence[str] = (),
) -> str:
    """One of STATES. `on_disk`: see `row`."""
    if change is not None and change.stage is VersionStage.REFUSED:
        return "invalid"
    if (
        record is not None
        and stored is not None
        and record.refused == stored.digest
        and record.code.startswith(InvalidAdapter.code)
    ):
        return "invalid"
    states = [s for _, s in held]
    if any(s.pinned for s in states):
        return "pinned"
    if any(s.tier is Tier.GPU and not s.loading for s in states):
        return "loaded"
    if any(s.loading for s in states):
        return "loading"
    if any(s.tier is Tier.CPU for s in states):
        return "warm"
    if (
        on_disk
        or any(s.tier is Tier.DISK for s in states)
        or (record is not None and stored is not None and record.on_disk == stored.digest)
    ):
        return "cached"
    return "listed"


def row(
    base: str,
    name: str,
    stored: StoredAdapter | None,
    held: Sequence[Holder],
    record: UsageRecord | None,
    change: VersionChange | None = None,
    on_disk: Sequence[str] = (),
) -> AdapterRow:
    """`digest` and `bytes` are of the store's newest version, or of a worker's if the store has
    none any more. `on_disk` are the hosts that have the served version on disk, as far as known.

    While the newest version is not served (`update`: waiting, preparing or refused), `serving` is
    the older version that is.
    """
    if change is not None:
        stored = change.new
    newest = held[0][1] if held else None
    rank = next((s.rank for _, s in held if s.rank), None)
    return {
        "base": base,
        "name": name,
        "digest": stored.digest if stored else newest.digest if newest else None,
        "bytes": stored.size_bytes if stored else newest.size_bytes if newest else None,
        "rank": rank,
        "state": state_of(stored, held, record, change, on_disk),
        "serving": version.digest if (version := served(stored, change)) else None,
        "update": change.stage.value if change else None,
        "in_store": stored is not None,
        "code": (change.code if change else record.code if record else "") or None,
        "reason": (change.reason if change else record.reason if record else "") or None,
        "hits": record.hits if record else 0,
        "last_used": _iso(record.last_used) if record and record.last_used else None,
        "on_disk": list(on_disk),
        "workers": [_holder(worker, state) for worker, state in held],
    }


def names_of(
    known: Mapping[str, StoredAdapter], held: Mapping[str, list[Holder]], in_order: Sequence[str]
) -> Sequence[str]:
    """All names in order. `in_order` are the names of `known`, sorted once per listing."""
    extra = [name for name in held if name not in known]
    return sorted([*in_order, *extra]) if extra else in_order


def served(stored: StoredAdapter | None, change: VersionChange | None) -> StoredAdapter | None:
    """The version that is served. None: the store has none any more."""
    return change.old if change is not None else stored


def _holder(worker: WorkerId, state: AdapterState) -> AdapterRow:
    return {
        "worker": worker,
        "digest": state.digest,
        "tier": state.tier.name.lower(),
        "loading": state.loading,
        "in_flight": state.in_flight,
        "pinned": state.pinned,
        "steady": state.steady,
    }


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
