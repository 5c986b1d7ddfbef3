"""Pure. Every adapter's way on this worker: ABSENT -> FETCHING -> CACHED -> LOADING -> RESIDENT -> WARM, and FAILED for a while.

Events in, instructions out. WARM is the CPU tier: the adapter has left its slot but its weights stay in the engine's host memory, so that its next
load costs a copy instead of a read; the coldest of them (see heat.py) are dropped beyond `host_places` adapters or WARM_BYTES.

Fetches run side by side; loads one at a time, because the engine loads inside its step loop. A request that needs an adapter waits here and is
started once the adapter is resident; from then on it holds the slot until it ends. When all slots are in use, adapters wait in order; one that
has waited longer than SLOT_PATIENCE_S closes the slot that has gone longest without a new request: its running requests end in peace, its new
ones wait in line. So a busy adapter cannot starve another one (vLLM's own scheduler would let it).

What an operator asks for (wire.Tend) has a number like a request: `want` and `finish` stand for a load, `cache` for the disk alone, `evict` for
the way out of the engine.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

from shared.adapters import AdapterRef
from shared.wire import STEADY_PER_S, AdapterState, Tier
from worker.engine import Loaded
from worker.heat import STEADY_FADE_S, Heat
from worker.instructions import Fetch, Instruction, Load, Reject, Start, Tended, Unload
from worker.slots import Evict, Full, SlotTable

__all__ = ["Fetch", "Instruction", "Load", "Reject", "Residency", "Stage", "Start", "Tended", "Unload"]

SLOT_PATIENCE_S = 2.0
FAILED_FOR_S = 5.0
"""A failing adapter is not tried again within this time."""
MAX_FAILED = 10_000
WARM_BYTES = 4 << 30
"""Host memory for adapters that are in no slot: 150 of 26 MiB (rank 16 on an 8B model), 10 of 400 MiB."""


class Stage(Enum):
    FETCHING = "fetching"
    CACHED = "cached"  # on disk, waits for a slot
    LOADING = "loading"
    RESIDENT = "resident"
    CLOSING = "closing"  # resident, gives up its slot when its last request ends
    UNLOADING = "unloading"
    WARM = "warm"  # in the engine's host memory, in no slot, wanted by nobody


@dataclass(frozen=True, slots=True)
class Failure:
    code: str
    message: str
    retryable: bool
    until: float


@dataclass(slots=True)
class _Entry:
    stage: Stage
    since: float
    came_from: Tier
    loaded: Loaded | None = None
    waiting: dict[int, None] = field(default_factory=dict)  # requests, in order of arrival
    cachers: dict[int, None] = field(default_factory=dict)  # want it on disk, while it is fetched
    in_host: bool = False  # the engine holds the weights in host memory (in a slot as well, or not)
    when_warm: AdapterState | None = None  # what heartbeats say of it while it is WARM; always the same, so it is made once


class Residency:
    """The adapters of one engine with `slots` slots and room for `host_places` adapters in host memory, those in slots included.

    Requests are known by a number chosen by the caller.
    """

    def __init__(self, slots: int, host_places: int = 0) -> None:
        self._heat, self._recent = Heat(), Heat(STEADY_FADE_S)
        self.slots = SlotTable(slots)
        self._host_places = max(slots, host_places)
        self._warm: dict[AdapterRef, int] = {}  # WARM adapters in order of demotion -> bytes
        self._entries: dict[AdapterRef, _Entry] = {}
        self._line: dict[AdapterRef, None] = {}  # CACHED adapters in order of arrival
        self._users: dict[int, AdapterRef] = {}  # started requests
        self._seekers: dict[int, AdapterRef] = {}  # waiting requests
        self._failed: dict[AdapterRef, Failure] = {}
        self._leaving: dict[AdapterRef, dict[int, None]] = {}  # evicted, not gone yet -> who asked
        self._loading: AdapterRef | None = None
        self._closed = False  # some adapter may be CLOSING

    # ---- requests ---------------------------------------------------------------------------------------------------------------------

    def want(self, request: int, adapter: AdapterRef, now: float) -> list[Instruction]:
        """A request needs the adapter."""
        self._heat.note(adapter, now)
        self._recent.note(adapter, now)
        rejected = self._reject(request, adapter, now)
        if rejected:
            return [rejected]
        entry = self._entries.get(adapter)
        if entry is None:
            entry = self._entries[adapter] = _Entry(Stage.FETCHING, now, Tier.REMOTE)
            self._seek(request, adapter, entry)
            return [Fetch(adapter)]
        if entry.stage is Stage.RESIDENT:
            assert entry.loaded is not None
            return [self._start(request, entry.loaded, Tier.GPU)]
        self._seek(request, adapter, entry)
        if entry.stage is Stage.WARM:
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
            if entry.stage is Stage.CACHED and not entry.waiting:
                self._forget(adapter)
                return self._advance(now)
        return []

    # ---- what operators ask for -------------------------------------------------------------------------------------------------------

    def cache(self, request: int, adapter: AdapterRef, now: float) -> list[Instruction]:
        """Somebody wants the adapter on this host's disk, and no more."""
        rejected = self._reject(request, adapter, now)
        if rejected:
            return [rejected]
        entry = self._entries.get(adapter)
        if entry is not None and entry.stage is not Stage.FETCHING:
            return [Tended(request)]
        instructions: list[Instruction] = []
        if entry is None:
            entry = self._entries[adapter] = _Entry(Stage.FETCHING, now, Tier.REMOTE)
            instructions.append(Fetch(adapter))
        entry.cachers[request] = None
        return instructions

    def evict(self, request: int, adapter: AdapterRef, now: float) -> list[Instruction]:
        """Unpins the adapter; it leaves the engine as soon as nobody uses it or waits for it. Those who come meanwhile are served first."""
        self.slots.unpin(adapter)
        self._leaving.setdefault(adapter, {})[request] = None
        return self._advance(now)

    def pin(self, adapter: AdapterRef) -> list[Instruction]:
        """It is in a slot and keeps it, whatever was asked before; its name's other versions are pinned no longer."""
        self.slots.pin(adapter)
        if adapter in self._entries:
            self._entries[adapter].when_warm = None
        askers = self._leaving.pop(adapter, ())
        return [Reject(r, "worker_unavailable", f"The adapter `{adapter.name}` was pinned meanwhile.", False) for r in askers]

    def tick(self, now: float) -> list[Instruction]:
        """Lets the head of the line close a slot once it has waited long enough."""
        head = next(iter(self._line), None)
        if head is None or now - self._entries[head].since < SLOT_PATIENCE_S or not isinstance(self.slots.room(), Full):
            return []
        if any(e.stage is Stage.CLOSING for e in self._entries.values()):
            return []
        victim = self.slots.oldest_in_use()
        if victim is not None and self._entries[victim].stage is Stage.RESIDENT:
            self._entries[victim].stage = Stage.CLOSING
            self._closed = True
        return []

    # ---- what became of the instructions ------------------------------------------------------------------------------------------------

    def fetched(self, loaded: Loaded, came_from: Tier, now: float) -> list[Instruction]:
        """The adapter is on disk and valid."""
        entry = self._entries[loaded.ref]
        entry.loaded = loaded
        tended: list[Instruction] = [Tended(r) for r in entry.cachers]
        entry.cachers.clear()
        self._line_up(loaded.ref, entry, came_from, now)
        if not entry.waiting:
            self._forget(loaded.ref)
        return tended + self._advance(now)

    def loaded(self, adapter: AdapterRef, now: float) -> list[Instruction]:
        """The engine has it: everybody who waited starts."""
        entry = self._entries[adapter]
        entry.stage, entry.since, entry.in_host, self._loading = Stage.RESIDENT, now, True, None
        assert entry.loaded is not None
        started: list[Instruction] = [self._start(r, entry.loaded, entry.came_from) for r in entry.waiting]
        for request in entry.waiting:
            del self._seekers[request]
        entry.waiting.clear()
        return started + self._advance(now)

    def failed(self, adapter: AdapterRef, code: str, message: str, retryable: bool, now: float) -> list[Instruction]:
        """The fetch or the load failed: everybody who waited hears of it, and for FAILED_FOR_S nobody tries again."""
        entry = self._entries.pop(adapter)
        if self._loading == adapter:
            self._loading = None
            self.slots.vacate(adapter)
        self._failed[adapter] = Failure(code, message, retryable, now + FAILED_FOR_S)
        while len(self._failed) > MAX_FAILED:
            del self._failed[next(iter(self._failed))]
        for request in entry.waiting:
            del self._seekers[request]
        rejected: list[Instruction] = [Reject(r, code, message, retryable) for r in (*entry.waiting, *entry.cachers)]
        return rejected + self._advance(now)

    def unloaded(self, adapter: AdapterRef, now: float) -> list[Instruction]:
        """A victim has left the engine. Requests that came for it meanwhile wait in line again."""
        entry = self._entries[adapter]
        entry.in_host = False
        tended: list[Instruction] = [Tended(r) for r in self._leaving.pop(adapter, ())]
        if entry.waiting:
            self._line_up(adapter, entry, Tier.DISK, now)
        else:
            self._forget(adapter)
        return tended + self._advance(now)

    # ---- for heartbeats -----------------------------------------------------------------------------------------------------------------

    def states(self, now: float, load_s: float) -> tuple[AdapterState, ...]:
        """The adapters of this worker that are in a slot or on their way; `load_s` is the expected time of a load."""
        warm, unloading = Stage.WARM, Stage.UNLOADING
        return tuple(
            [
                (entry.when_warm if entry.stage is warm else None) or self._state(ref, entry, now, load_s)
                for ref, entry in self._entries.items()
                if entry.stage is not unloading
            ]
        )

    def adapters(self) -> Iterable[AdapterRef]:
        """Every adapter that is on its way, in a slot or just leaving one: its files must stay on disk."""
        return self._entries.keys()

    def came_from(self, adapter: AdapterRef) -> Tier:
        """Where an adapter that is being loaded comes from."""
        return self._entries[adapter].came_from

    @property
    def waiting(self) -> int:
        return len(self._seekers)

    # ---- inside -------------------------------------------------------------------------------------------------------------------------

    def _reject(self, request: int, adapter: AdapterRef, now: float) -> Reject | None:
        """What failed a moment ago is not tried again."""
        failure = self._failed.get(adapter)
        if failure is None:
            return None
        if now < failure.until:
            return Reject(request, failure.code, failure.message, failure.retryable)
        del self._failed[adapter]
        return None

    def _advance(self, now: float) -> list[Instruction]:
        """Lets go what was evicted and is idle by now, then gives out the next slot."""
        return (self._retire() if self._leaving else []) + self._give_slot(now)

    def _retire(self) -> list[Instruction]:
        instructions: list[Instruction] = []
        for adapter, askers in list(self._leaving.items()):
            entry = self._entries.get(adapter)
            if entry is None:
                del self._leaving[adapter]
                instructions += [Tended(r) for r in askers]
            elif entry.stage is Stage.WARM:
                del self._warm[adapter]
                instructions.append(Unload(self._leave(adapter)))
            elif entry.stage in (Stage.RESIDENT, Stage.CLOSING) and not entry.waiting and self.slots.uses(adapter) == 0:
                self.slots.vacate(adapter)
                instructions.append(Unload(self._leave(adapter)))
        return instructions

    def _give_slot(self, now: float) -> list[Instruction]:
        """The next slot to the head of the line, if there is a slot to give and no load runs."""
        if self._loading is not None:
            return []
        head = next(iter(self._line), None)
        if head is None:
            return self._reopen()
        room = self.slots.room(lambda adapter: self._steady_per_s(adapter, now))
        if isinstance(room, Full):
            return []
        entry = self._entries[head]
        del self._line[head]
        entry.stage = Stage.LOADING
        self._loading = head
        victim = self._vacate(room.victim) if isinstance(room, Evict) else None
        self.slots.occupy(head)
        assert entry.loaded is not None
        return [self._make_room(entry, victim, now)]

    def _steady_per_s(self, adapter: AdapterRef, now: float) -> float:
        """Requests a second of an adapter in steady use, and 0 for all others: they make room first, in the order of their last use."""
        per_s = self._recent.per_s(adapter, now)
        return per_s if per_s >= STEADY_PER_S else 0.0

    def _vacate(self, idle: AdapterRef) -> AdapterRef:
        """Frees the slot of a closed adapter, else of the one given."""
        closed = next((a for a, e in self._entries.items() if e.stage is Stage.CLOSING and self.slots.uses(a) == 0), None)
        victim = closed or idle
        self.slots.vacate(victim)
        return victim

    def _make_room(self, entry: _Entry, victim: AdapterRef | None, now: float) -> Load:
        """The load of `entry`, with what becomes of the victim: it stays in host memory if there is a place, after colder ones have gone."""
        assert entry.loaded is not None
        held = sum(e.in_host and e.stage is not Stage.UNLOADING for e in self._entries.values())
        excess = held + (not entry.in_host) - self._host_places
        drop: list[Loaded] = []
        while self._warm and (excess > len(drop) or sum(self._warm.values()) > WARM_BYTES):
            coldest = min(self._warm, key=self._heat.of)
            del self._warm[coldest]
            drop.append(self._leave(coldest))
        if victim is None:
            return Load(entry.loaded, None, None, tuple(drop))
        if excess > len(drop):
            return Load(entry.loaded, self._leave(victim), None, tuple(drop))
        gone = self._entries[victim]
        assert gone.loaded is not None
        if gone.waiting:
            self._line_up(victim, gone, Tier.CPU, now)
        else:
            gone.stage = Stage.WARM
            self._warm[victim] = gone.loaded.size_bytes
        return Load(entry.loaded, None, gone.loaded, tuple(drop))

    def _leave(self, adapter: AdapterRef) -> Loaded:
        entry = self._entries[adapter]
        entry.stage = Stage.UNLOADING
        assert entry.loaded is not None
        return entry.loaded

    def _line_up(self, adapter: AdapterRef, entry: _Entry, came_from: Tier, now: float) -> None:
        entry.stage, entry.came_from, entry.since = Stage.CACHED, came_from, now
        self._line[adapter] = None

    def _reopen(self) -> list[Instruction]:
        """Nobody waits for a slot any more: closing adapters stay, and those who came for them meanwhile start."""
        started: list[Instruction] = []
        if not self._closed:
            return started
        self._closed = False
        for entry in self._entries.values():
            if entry.stage is Stage.CLOSING and entry.loaded is not None:
                entry.stage = Stage.RESIDENT
                started += [self._start(r, entry.loaded, Tier.GPU) for r in entry.waiting]
                for request in entry.waiting:
                    del self._seekers[request]
                entry.waiting.clear()
        return started

    def _seek(self, request: int, adapter: AdapterRef, entry: _Entry) -> None:
        entry.waiting[request] = None
        self._seekers[request] = adapter

    def _start(self, request: int, adapter: Loaded, came_from: Tier) -> Start:
        self.slots.acquire(adapter.ref)
        self._users[request] = adapter.ref
        return Start(request, adapter, came_from)

    def _forget(self, adapter: AdapterRef) -> None:
        """Nobody waits: it stays warm if the engine has it, else what is left of it lies in the disk cache."""
        self._line.pop(adapter, None)
        entry = self._entries[adapter]
        if entry.in_host and entry.loaded is not None:
            entry.stage = Stage.WARM
            self._warm[adapter] = entry.loaded.size_bytes
        else:
            del self._entries[adapter]

    def _state(self, ref: AdapterRef, entry: _Entry, now: float, load_s: float) -> AdapterState:
        in_slot = entry.stage in (Stage.RESIDENT, Stage.CLOSING)
        warm = entry.stage is Stage.WARM
        tier = Tier.GPU if in_slot else Tier.CPU if entry.in_host else Tier.REMOTE if entry.stage is Stage.FETCHING else Tier.DISK
        size = entry.loaded.size_bytes if entry.loaded else 0
        rank = entry.loaded.rank if entry.loaded else 0
        loading = not (in_slot or warm or (entry.cachers and not entry.waiting))
        eta_s = max(0.0, load_s - (now - entry.since)) if loading else 0.0
        in_flight = self.slots.uses(ref) + len(entry.waiting)
        steady = in_slot and self._steady_per_s(ref, now) > 0.0
        state = AdapterState(ref.name, ref.digest, tier, loading, eta_s, in_flight, rank, size, self.slots.pinned(ref), steady)
        if warm and not state.pinned:
            entry.when_warm = state
        return state
