"""Pure. Where versions of an adapter are, and on which workers a new version must be loaded before
it answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from gateway.fleet.pool import Pool
from gateway.fleet.rendezvous import Rendezvous
from gateway.fleet.worker_view import WorkerView
from shared.adapters.identity import AdapterKey, StoredAdapter, key_of
from shared.link.messages import Tier, WorkerState


@dataclass(frozen=True, slots=True)
class Prepare:
    """Make the new version ready (see `plan`), then call `ready` or `failed`. `recent`: the old
    version is worth keeping until then.
    """

    old: StoredAdapter
    new: StoredAdapter
    recent: bool


@dataclass(frozen=True, slots=True)
class KnownVersion:
    """A version of a name that clients may request by its digest. `state` is current, preparing,
    refused, older, or loaded (on some worker).
    """

    digest: str
    state: str
    stored: StoredAdapter | None = None


@dataclass(frozen=True, slots=True)
class LoadVersion:
    """Load the version into a slot of each of these workers. The first worker loads it alone, so
    that a version that kills engines kills only one.
    """

    workers: tuple[WorkerView, ...]


@dataclass(frozen=True, slots=True)
class CacheVersion:
    """Fetch the version onto the worker's disk and validate it."""

    worker: WorkerView


@dataclass(frozen=True, slots=True)
class NothingToPrepare:
    """No engine has the old version, and it was not used recently. The new one answers at once."""


@dataclass(frozen=True, slots=True)
class NoWorkerServes:
    """No worker serves the base model now."""


PreparationPlan: TypeAlias = LoadVersion | CacheVersion | NothingToPrepare | NoWorkerServes


def plan(prepare: Prepare, pool: Pool, homes: Rendezvous) -> PreparationPlan:
    """Where the new version is made ready: in the slots of the workers that have the old one in a
    slot; else on one that has it in host memory; else on the disk of its home.
    """
    old = key_of(prepare.old)
    holders = in_engines(old, pool)
    if holders:
        slotted = [w for w in holders if w.tier_at(old) is Tier.GPU]
        return LoadVersion(tuple(sorted(slotted, key=lambda w: w.load)) or (holders[0],))
    if not prepare.recent:
        return NothingToPrepare()
    return (
        CacheVersion(homes.order(key_of(prepare.new), pool)[0])
        if pool.workers
        else NoWorkerServes()
    )


def in_engines(key: AdapterKey, pool: Pool) -> list[WorkerView]:
    """The workers whose engine has the version in a slot or in host memory."""
    there = {**pool.holders.get(key, {}), **pool.stashes.get(key, {})}
    return [w for w in there.values() if w.tier_at(key) in (Tier.GPU, Tier.CPU)]


def serving_with(key: AdapterKey, base: str, fleet: Iterable[WorkerView]) -> list[WorkerView]:
    """The same of all workers that serve, also of those that are not heard just now."""
    return [
        w
        for w in fleet
        if w.heartbeat.base == base
        and w.heartbeat.state is WorkerState.SERVING
        and w.tier_at(key) in (Tier.GPU, Tier.CPU)
    ]


def in_flight(key: AdapterKey, pool: Pool) -> int | None:
    """Requests for the version on all workers. None: no engine has it."""
    workers = in_engines(key, pool)
    return sum(w.in_flight(key) for w in workers) if workers else None


def on_workers(name: str, pool: Pool) -> Iterator[KnownVersion]:
    """The versions of a name that any worker has. This looks at every adapter of the pool."""
    for digest in {d for index in (pool.holders, pool.stashes) for n, d in index if n == name}:
        yield KnownVersion(digest, "loaded")
