"""Pure. The state of every adapter on this worker: ABSENT -> FETCHING -> CACHED -> LOADING ->
RESIDENT -> WARM, and FAILED for a while.

Events come in, instructions go out. A fetch ends with the weights in the engine's host memory, in
the form that a slot takes, so that only a copy is left to do between two engine steps. WARM is the
CPU tier: the adapter is wanted by no request and in no slot, but still in host memory. Beyond
`host_places` adapters or WARM_BYTES the least popular of them (see popularity.py) are dropped.

Fetches run side by side. Swaps run one at a time, because they run between engine steps, and each
takes as many adapters as there are slots for them. A request that needs an adapter waits here and
is started once the adapter is resident; from then on it holds the slot until it ends.

When all slots are in use, adapters wait in order. An adapter that has waited longer than
SLOT_PATIENCE_S closes a slot, and first the one that has gone longest without a new request. The
running requests of a closed slot go on to their end, and new ones for its adapter wait in line. So
a busy adapter cannot starve another one; vLLM's own scheduler would let it.

An operator's command (messages.AdapterCommand) has a number like a request. `want` and `finish`
stand for a load, `cache` for the disk alone, and `evict` for leaving the engine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

from shared.adapters.identity import AdapterRef
from shared.link.messages import (
    ASKED_OF_CPU,
    ASKED_OF_GPU,
    MEMORY_NEEDED,
    SLOT_NEEDED,
    STEADY_PER_S,
    STEADY_SHARE,
    AdapterState,
    Tier,
)
from worker.adapters.instructions import CommandDone, Fetch, Instruction, Reject, Start
from worker.adapters.popularity import STEADY_FADE_S, Popularity
from worker.adapters.slot_table import Evict, Full, SlotOffer, SlotTable
from worker.engine.base import Loaded, Swap

__all__ = [
    "CommandDone",
    "Failure",
    "Fetch",
    "Instruction",
    "Reject",
    "Residency",
    "ResidencyStage",
    "Start",
    "Swap",
]

SLOT_PATIENCE_S = 1.0
"""In the simulator (128 closed-loop streams over 64 adapters and 16 slots, one worker) 0 to 1.5 s
serve alike; 3 s let the p99 of TTFT grow by a third.
"""
COUNT_S = 0.05
"""What each waiting request weighs against age in the order of the line. A slot that serves many
requests is worth more than a slot for one, but no request may wait for others for ever. In the same
simulation, with steps of 9.7 ms at 64 sequences, 0.1 gives 1 to 2% more throughput than this for a
p99 of TTFT 4 to 25% longer; 0 gives 0 to 2% less.
"""
FAILED_FOR_S = 5.0
"""A failing adapter is not tried again within this time."""
MAX_FAILED = 10_000
WARM_BYTES = 4 << 30
"""Host memory for adapters that are in no slot: 150 adapters of 26 MiB (rank 16 on an 8B model), or
10 of 400 MiB.
"""


class ResidencyStage(Enum):
    FETCHING = "fetching"
    CACHED = "cached"  # at hand, waits for a slot
    LOADING = "loading"
    RESIDENT = "resident"
    CLOSING = "closing"  # resident, gives up its slot when its last request ends
    UNLOADING = "unloading"
    WARM = "warm"  # in the engine's host memory, in no slot, wanted by no request


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an adapter cannot be served. It is not tried again before `until`."""

    code: str
    message: str
    retryable: bool
    until: float = 0.0


@dataclass(slots=True)
class _Entry:
    stage: ResidencyStage
    since: float
    came_from: Tier
    loaded: Loaded | None = None
    # requests in order of arrival, and when that was
    waiting: dict[int, float] = field(default_factory=dict)
    cachers: dict[int, None] = field(default_factory=dict)  # want it on disk, while it is fetched
    in_host: bool = False  # the engine holds the weights in host memory (in a slot as well, or not)
    # what heartbeats say of it while it is WARM; always the same, so it is made once
    when_warm: AdapterState | None = None


class Residency:
    """The adapters of one engine with `slots` slots and room for `host_places` adapters in host
    memory, those in slots included.

    Requests are known by a number chosen by the caller. `lru`: the least recently used adapter
    makes room, however popular it is. `loads` and `evictions` only grow.
    """

    def __init__(self, slots: int, host_places: int = 0, *, lru: bool = False) -> None:
        self._lru = lru
        self.loads: Counter[str] = Counter()  # by the tier that the adapter came from
        self.evictions: Counter[str] = Counter()  # by `tier:reason`
        self._popularity, self._recent = Popularity(), Popularity(STEADY_FADE_S)
        self.slots = SlotTable(slots)
        self._host_places = max(slots, host_places)
        self._warm: dict[AdapterRef, int] = {}  # WARM adapters in order of demotion -> bytes
        self._entries: dict[AdapterRef, _Entry] = {}
        self._line: dict[AdapterRef, None] = {}  # CACHED adapters in order of arrival
        self._users: dict[int, AdapterRef] = {}  # started requests
        self._seekers: dict[int, AdapterRef] = {}  # waiting requests
        self._closing: dict[AdapterRef, None] = {}
        self._failed: dict[AdapterRef, Failure] = {}
        self._leaving: dict[AdapterRef, dict[int, None]] = {}  # evicted, not gone yet -> who asked
        self._swap: Swap | None = None  # under way

    # ---- requests --------------------------------------------------------------------------------

    def want(self, request: int, adapter: AdapterRef, now: float) -> list[Instruction]:
        """A request needs the adapter."""
        self._popularity.note(adapter, now)
        self._recent.note(adapter, now)
        rejected = self._reject(request, adapter, now)
        if rejected:
            return [rejected]
        entry = self._entries.get(adapter)
        if entry is None:
            entry = self._entries[adapter] = _Entry(ResidencyStage.FETCHING, now, Tier.REMOTE)
            self._seek(request, adapter, entry, now)
            return [Fetch(adapter)]
        if entry.stage is ResidencyStage.RESIDENT:
            assert entry.loaded is not None
            return [self._start(request, entry.loaded, Tier.GPU)]
        self._seek(request, adapter, entry, now)
        if entry.stage is ResidencyStage.WARM:
            del self._warm[adapter]
            self._line_up(adapter, entry, Tier.CPU, now)
            return self._advance(now)
        return []

    def finish(self, request: int, now: float) -> list[Instruction]:
        """The request has ended, or its client left while it waited. Idempotent."""
        adapter = self._users.pop(request, None)
        if adapter is not None:
            self.slots.release(adapter)
            return self._advance(now)
        adapter = self._seekers.pop(request, None)
        if adapter is not None:
            entry = self._entries[adapter]
            del entry.waiting[request]
            if entry.stage is ResidencyStage.CACHED and not entry.waiting:
                self._forget(adapter)
                return self._advance(now)
        return []

    # ---- what operators ask for ------------------------------------------------------------------

    def cache(self, request: int, adapter: AdapterRef, now: float) -> list[Instruction]:
        """A command wants the adapter on this host's disk, and no more."""
        rejected = self._reject(request, adapter, now)
        if rejected:
            return [rejected]
        entry = self._entries.get(adapter)
        if entry is not None and entry.stage is not ResidencyStage.FETCHING:
            return [CommandDone(request)]
        instructions: list[Instruction] = []
        if entry is None:
            entry = self._entries[adapter] = _Entry(ResidencyStage.FETCHING, now, Tier.REMOTE)
            instructions.append(Fetch(adapter))
        entry.cachers[request] = None
        return instructions

    def evict(self, request: int, adapter: AdapterRef, now: float) -> list[Instruction]:
        """Unpins the adapter. It leaves the engine as soon as no request uses it or waits for it;
        requests that come meanwhile are served first.
        """
        self.slots.unpin(adapter)
        self._leaving.setdefault(adapter, {})[request] = None
        return self._advance(now)

    def pin(self, adapter: AdapterRef, now: float) -> list[Instruction]:
        """The adapter is in a slot and keeps it, whatever was asked before. Other versions of the
        same name are no longer pinned.
        """
        self.slots.pin(adapter)
        if adapter in self._entries:
            self._entries[adapter].when_warm = None
        askers = self._leaving.pop(adapter, ())
        rejected = [
            Reject(
                r,
                "worker_unavailable",
                f"The adapter `{adapter.name}` was pinned meanwhile.",
                False,
            )
            for r in askers
        ]
        return [*rejected, *self._advance(now)]

    def unpin(self, adapter: AdapterRef, now: float) -> list[Instruction]:
        """From now on the adapter makes room like any other: at once, if it is idle and another
        one waits for a slot.
        """
        self.slots.unpin(adapter)
        return self._advance(now)

    def tick(self, now: float) -> list[Instruction]:
        """Each adapter in line that has waited long enough closes a slot, or takes one from an
        adapter whose steady use is over.
        """
        if not self._line:
            return []
        kept = self._kept(now)
        if not isinstance(self._room(kept, now), Full):
            return self._advance(now)
        late = sum(now - self._oldest(a) >= SLOT_PATIENCE_S for a in self._line)
        for _ in range(late - len(self._closing)):
            victim = self.slots.oldest_in_use({*self._closing, *kept})
            if victim is None:
                break
            self._entries[victim].stage = ResidencyStage.CLOSING
            self._closing[victim] = None
        return []

    # ---- what became of the instructions ---------------------------------------------------------

    def cached(self, adapter: AdapterRef, now: float) -> list[Instruction]:
        """The adapter's files are on disk and valid. If only the disk was asked for, it is done:
        the agent sees that `adapters` no longer has it, and stops here.
        """
        entry = self._entries[adapter]
        done: list[Instruction] = [CommandDone(r) for r in entry.cachers]
        entry.cachers.clear()
        if done and not entry.waiting:
            del self._entries[adapter]
        return done + self._advance(now)

    def fetched(self, loaded: Loaded, came_from: Tier, now: float) -> list[Instruction]:
        """The adapter is valid and at hand."""
        entry = self._entries[loaded.ref]
        entry.loaded, entry.in_host = loaded, True
        done: list[Instruction] = [CommandDone(r) for r in entry.cachers]
        entry.cachers.clear()
        self._line_up(loaded.ref, entry, came_from, now)
        if not entry.waiting:
            self._forget(loaded.ref)
        return done + self._advance(now)

    def failed(self, adapter: AdapterRef, failure: Failure, now: float) -> list[Instruction]:
        """The fetch failed. Every request and command that waited is rejected, and for FAILED_FOR_S
        the adapter is not tried again.
        """
        return self._fail(adapter, failure, now) + self._advance(now)

    def swapped(self, failures: Mapping[AdapterRef, Failure], now: float) -> list[Instruction]:
        """The engine has performed the swap. Every request that waited starts, but for those of
        adapters that the engine refused; nothing of these has stayed there.
        """
        swap, self._swap = self._swap, None
        assert swap is not None
        told: list[Instruction] = []
        for gone in swap.unload:
            told += [CommandDone(r) for r in self._leaving.pop(gone.ref, ())]
            entry = self._entries[gone.ref]
            if entry.waiting:  # requests came meanwhile
                entry.stage, entry.loaded = ResidencyStage.FETCHING, None
                told.append(Fetch(gone.ref))
            else:
                del self._entries[gone.ref]
        for entered in swap.enter:
            failure = failures.get(entered.ref)
            if failure is not None:
                self.slots.vacate(entered.ref)
                told += self._fail(entered.ref, failure, now)
                continue
            entry = self._entries[entered.ref]
            entry.stage, entry.since = ResidencyStage.RESIDENT, now
            self.loads[entry.came_from.name.lower()] += 1
            told += self._start_waiting(entry, entry.came_from)
        return told + self._advance(now)

    # ---- for heartbeats --------------------------------------------------------------------------

    def states(self, now: float, load_s: float) -> tuple[AdapterState, ...]:
        """The adapters of this worker that are in a slot or on their way; `load_s` is the expected
        time of a load.
        """
        warm, unloading = ResidencyStage.WARM, ResidencyStage.UNLOADING
        return tuple(
            [
                (entry.when_warm if entry.stage is warm else None)
                or self._state(ref, entry, now, load_s)
                for ref, entry in self._entries.items()
                if entry.stage is not unloading
            ]
        )

    def adapters(self) -> Iterable[AdapterRef]:
        """Every adapter that is on its way, in a slot or just leaving one: its files must stay on
        disk.
        """
        return self._entries.keys()

    def came_from(self, adapter: AdapterRef) -> Tier:
        """Where an adapter that is being loaded comes from."""
        return self._entries[adapter].came_from

    @property
    def waiting(self) -> int:
        return len(self._seekers)

    # ---- inside ----------------------------------------------------------------------------------

    def _reject(self, request: int, adapter: AdapterRef, now: float) -> Reject | None:
        """A rejection, if the adapter failed less than FAILED_FOR_S ago."""
        failure = self._failed.get(adapter)
        if failure is None:
            return None
        if now < failure.until:
            return Reject(request, failure.code, failure.message, failure.retryable)
        del self._failed[adapter]
        return None

    def _advance(self, now: float) -> list[Instruction]:
        """Removes evicted adapters that are idle by now, gives slots to the adapters in line in
        their order, and makes room in host memory.
        """
        told = self._tell_gone() if self._leaving else []
        if self._swap is not None:
            return told
        unload = self._retire() if self._leaving else []
        enter: list[Loaded] = []
        victims: list[AdapterRef] = []
        coming: set[AdapterRef] = set()
        kept = self._kept(now) if self._line else set()
        for head in self._in_order():
            room = self._room(kept, now, self._recent.per_s(head, now), coming)
            if isinstance(room, Full):
                break
            if isinstance(room, Evict):
                victims.append(self._vacate(room.victim))
                self.evictions[SLOT_NEEDED] += 1
            self.slots.occupy(head)
            coming.add(head)
            enter.append(self._enter(head))
        told += self._reopen()
        if not (enter or unload) and sum(self._warm.values()) <= WARM_BYTES:
            return told
        unload += self._drop()
        excess = self._held() - self._host_places
        demote: list[Loaded] = []
        for victim in victims:
            if excess > 0:
                unload.append(self._leave(victim))
                excess -= 1
            else:
                demote.append(self._demote(victim, now))
        self._swap = Swap(tuple(enter), tuple(demote), tuple(unload))
        return [*told, self._swap]

    def _tell_gone(self) -> list[Instruction]:
        """The eviction of an adapter that is not here is done at once."""
        gone = [a for a in self._leaving if a not in self._entries]
        return [CommandDone(r) for a in gone for r in self._leaving.pop(a)]

    def _retire(self) -> list[Loaded]:
        """The evicted adapters that no request uses or waits for."""
        retired: list[Loaded] = []
        for adapter in self._leaving:
            entry = self._entries[adapter]
            if entry.stage is ResidencyStage.WARM:
                del self._warm[adapter]
                self.evictions[ASKED_OF_CPU] += 1
            elif (
                entry.stage in (ResidencyStage.RESIDENT, ResidencyStage.CLOSING)
                and not entry.waiting
                and self.slots.uses(adapter) == 0
            ):
                self._closing.pop(adapter, None)
                self.slots.vacate(adapter)
                self.evictions[ASKED_OF_GPU] += 1
            else:
                continue
            retired.append(self._leave(adapter))
        return retired

    def _in_order(self) -> list[AdapterRef]:
        """The adapters in line, by the age of their oldest request; every request that waits for an
        adapter counts as COUNT_S of age.
        """
        if isinstance(self.slots.room(), Full):
            return []
        return sorted(
            self._line, key=lambda a: self._oldest(a) - COUNT_S * len(self._entries[a].waiting)
        )

    def _oldest(self, adapter: AdapterRef) -> float:
        return next(iter(self._entries[adapter].waiting.values()))

    def _room(
        self,
        kept: Collection[AdapterRef],
        now: float,
        per_s: float = 0.0,
        coming: Collection[AdapterRef] = (),
    ) -> SlotOffer:
        """The slot for an adapter that is asked for `per_s` times a second. An adapter of `kept`
        that is asked for more often keeps its slot even while it is idle.
        """
        room = self.slots.room(coming, self._warmth)
        if (
            not isinstance(room, Evict)
            or room.victim not in kept
            or self._recent.per_s(room.victim, now) <= per_s
        ):
            return room
        return room if any(self.slots.uses(a) == 0 for a in self._closing) else Full()

    def _kept(self, now: float) -> set[AdapterRef]:
        """The adapters in steady use, while they have few of the slots, empty ones counted. The
        gateway spares them as well for the requests that wait there; this rule is for a line at the
        worker.
        """
        if self._lru:
            return set()
        held = self.slots.adapters()
        pinned = {a for a in held if self.slots.pinned(a)}
        steady = {a for a in held if a not in pinned and self._steady_per_s(a, now)}
        few = STEADY_SHARE * (self.slots.size - len(pinned))
        return steady if len(steady) <= few else set()

    def _steady_per_s(self, adapter: AdapterRef, now: float) -> float:
        """Requests a second of an adapter in steady use, and 0 for all others."""
        per_s = self._recent.per_s(adapter, now)
        return per_s if per_s >= STEADY_PER_S else 0.0

    def _vacate(self, idle: AdapterRef) -> AdapterRef:
        """Frees the slot of a closed adapter that is idle, else of the one given."""
        victim = next((a for a in self._closing if self.slots.uses(a) == 0), idle)
        self._closing.pop(victim, None)
        self.slots.vacate(victim)
        return victim

    def _enter(self, adapter: AdapterRef) -> Loaded:
        entry = self._entries[adapter]
        del self._line[adapter]
        entry.stage = ResidencyStage.LOADING
        assert entry.loaded is not None
        return entry.loaded

    def _drop(self) -> list[Loaded]:
        """Drops the least popular adapters, as many as it takes for the rest to fit host memory."""
        dropped: list[Loaded] = []
        while self._warm and (
            self._held() > self._host_places or sum(self._warm.values()) > WARM_BYTES
        ):
            coldest = min(self._warm, key=self._warmth)
            del self._warm[coldest]
            self.evictions[MEMORY_NEEDED] += 1
            dropped.append(self._leave(coldest))
        return dropped

    def _warmth(self, adapter: AdapterRef) -> float:
        """The adapter with the least value makes room, in the slots and in host memory; among equal
        ones the least recently used.
        """
        return 0.0 if self._lru else self._popularity.of(adapter)

    def _held(self) -> int:
        return sum(e.in_host for e in self._entries.values())

    def _demote(self, victim: AdapterRef, now: float) -> Loaded:
        entry = self._entries[victim]
        assert entry.loaded is not None
        if entry.waiting:
            self._line_up(victim, entry, Tier.CPU, now)
        else:
            entry.stage = ResidencyStage.WARM
            self._warm[victim] = entry.loaded.size_bytes
        return entry.loaded

    def _leave(self, adapter: AdapterRef) -> Loaded:
        entry = self._entries[adapter]
        entry.stage, entry.in_host = ResidencyStage.UNLOADING, False
        assert entry.loaded is not None
        return entry.loaded

    def _line_up(self, adapter: AdapterRef, entry: _Entry, came_from: Tier, now: float) -> None:
        entry.stage, entry.came_from, entry.since = ResidencyStage.CACHED, came_from, now
        self._line[adapter] = None

    def _reopen(self) -> list[Instruction]:
        """No more slots stay closed than adapters wait for one. The other adapters stay, and the
        requests that came for them meanwhile start.
        """
        started: list[Instruction] = []
        while len(self._closing) > len(self._line):
            adapter, _ = self._closing.popitem()
            entry = self._entries[adapter]
            entry.stage = ResidencyStage.RESIDENT
            started += self._start_waiting(entry, Tier.GPU)
        return started

    def _start_waiting(self, entry: _Entry, came_from: Tier) -> list[Instruction]:
        assert entry.loaded is not None
        started: list[Instruction] = []
        for request in entry.waiting:
            del self._seekers[request]
            started.append(self._start(request, entry.loaded, came_from))
        entry.waiting.clear()
        return started

    def _fail(self, adapter: AdapterRef, failure: Failure, now: float) -> list[Instruction]:
        entry = self._entries.pop(adapter)
        self._failed[adapter] = replace(failure, until=now + FAILED_FOR_S)
        while len(self._failed) > MAX_FAILED:
            del self._failed[next(iter(self._failed))]
        for request in entry.waiting:
            del self._seekers[request]
        return [
            Reject(r, failure.code, failure.message, failure.retryable)
            for r in (*entry.waiting, *entry.cachers)
        ]

    def _seek(self, request: int, adapter: AdapterRef, entry: _Entry, now: float) -> None:
        entry.waiting[request] = now
        self._seekers[request] = adapter

    def _start(self, request: int, adapter: Loaded, came_from: Tier) -> Start:
        self.slots.acquire(adapter.ref)
        self._users[request] = adapter.ref
        return Start(request, adapter, came_from)

    def _forget(self, adapter: AdapterRef) -> None:
        """No request waits for the adapter any more. It stays WARM if the engine has it in host
        memory; else only the disk cache keeps it.
        """
        self._line.pop(adapter, None)
        entry = self._entries[adapter]
        if entry.in_host and entry.loaded is not None:
            entry.stage = ResidencyStage.WARM
            self._warm[adapter] = entry.loaded.size_bytes
        else:
            del self._entries[adapter]

    def _state(self, ref: AdapterRef, entry: _Entry, now: float, load_s: float) -> AdapterState:
        in_slot = entry.stage in (ResidencyStage.RESIDENT, ResidencyStage.CLOSING)
        warm = entry.stage is ResidencyStage.WARM
        tier = (
            Tier.GPU
            if in_slot
            else Tier.CPU
            if entry.in_host
            else Tier.REMOTE
            if entry.stage is ResidencyStage.FETCHING
            else Tier.DISK
        )
        size = entry.loaded.size_bytes if entry.loaded else 0
        rank = entry.loaded.rank if entry.loaded else 0
        loading = not (in_slot or warm or (entry.cachers and not entry.waiting))
        eta_s = max(0.0, load_s - (now - entry.since)) if loading else 0.0
        in_flight = self.slots.uses(ref) + len(entry.waiting)
        steady = in_slot and self._steady_per_s(ref, now) > 0.0
        state = AdapterState(
            ref.name,
            ref.digest,
            tier,
            loading,
            eta_s,
            in_flight,
            rank,
            size,
            self.slots.pinned(ref),
            steady,
        )
        if warm and not state.pinned:
            entry.when_warm = state
        return state
