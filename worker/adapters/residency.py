"""Pure. The state machine of every adapter on this worker: ABSENT -> FETCHING -> CACHED -> LOADING
-> RESIDENT -> WARM, and FAILED for a while.

Events come in, and instructions go out. A fetch ends with the weights in the engine's host memory,
in the form that a slot takes. So only a copy is left to do between two engine steps. WARM is the
CPU tier: the adapter is in host memory, but in no slot, and no request wants it. Beyond
`host_places` adapters or WARM_BYTES the least popular ones (see popularity.py) are dropped.

Fetches run side by side. Swaps run one at a time, because they happen between engine steps. Each
swap takes as many adapters as there are slots for them. A request that needs an adapter waits here
and is started once the adapter is resident. From then on it holds the slot until it ends.

If all slots are in use, adapters wait in line. An adapter that has waited longer than
SLOT_WAIT_S closes a slot: that of the adapter that has gone longest without a new request. The
running requests of a closed slot go on to their end, but new ones for its adapter wait in line. So
a busy adapter cannot starve another one, as it could in vLLM's own scheduler.

An operator's command (messages.AdapterCommand) has a number, as a request has. A load is `want` and
`finish`. `cache` asks for the disk only, and `evict` for leaving the engine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from shared.adapters.identity import AdapterRef
from shared.link.messages import (
    ASKED_OF_CPU,
    ASKED_OF_GPU,
    MEMORY_NEEDED,
    SLOT_NEEDED,
    AdapterState,
    Tier,
)
from worker.adapters.entry import IN_SLOT, AdapterEntry, ResidencyStage
from worker.adapters.failures import FailedAdapters, Failure
from worker.adapters.instructions import CommandDone, Fetch, Instruction, Reject, Start
from worker.adapters.slot_eviction import SlotEviction
from worker.adapters.slot_table import Evict, Full, SlotTable
from worker.engine.base import Loaded, Swap

__all__ = [
    "CommandDone",
    "Fetch",
    "Instruction",
    "Reject",
    "Residency",
    "ResidencyStage",
    "Start",
    "Swap",
]

SLOT_WAIT_S = 1.0
"""How long an adapter waits in line before it closes a slot. In the simulator (128 closed-loop
streams over 64 adapters and 16 slots, one worker) 0 to 1.5 s serve alike. With 3 s the p99 of TTFT
is a third longer.
"""
COUNT_S = 0.05
"""In the order of the line, each waiting request of an adapter counts as much as this time of
waiting. A slot that serves many requests is worth more than a slot for one, but no request may wait
for ever.

Measured in the same simulation, with steps of 9.7 ms at 64 sequences. 0.1 gives 1 to 2% more
throughput, but the p99 of TTFT is 4 to 25% longer. 0 gives 0 to 2% less throughput.
"""
WARM_BYTES = 4 << 30
"""Host memory for adapters that are in no slot. It holds 150 adapters of 26 MiB (rank 16 on an 8B
model), or 10 of 400 MiB.
"""


class Residency:
    """The adapters of one engine. It has `slots` slots and room for `host_places` adapters in host
    memory, those in slots included.

    The caller chooses a number for each request. With `lru` the least recently used adapter makes
    room, however popular it is. The counters `loads` and `evictions` only grow.
    """

    def __init__(self, slots: int, host_places: int = 0, *, lru: bool = False) -> None:
        self.loads: Counter[str] = Counter()  # by the tier that the adapter came from
        self.evictions: Counter[str] = Counter()  # by `tier:reason`
        self._eviction = SlotEviction(lru)
        self.slots = SlotTable(slots)
        self._host_places = max(slots, host_places)
        self._warm: dict[AdapterRef, int] = {}  # WARM adapters in order of demotion -> bytes
        self._entries: dict[AdapterRef, AdapterEntry] = {}
        self._line: dict[AdapterRef, None] = {}  # CACHED adapters in order of arrival
        self._users: dict[int, AdapterRef] = {}  # started requests
        self._seekers: dict[int, AdapterRef] = {}  # waiting requests
        self._closing: dict[AdapterRef, None] = {}
        self._failed = FailedAdapters()
        # evicted but not gone yet -> the commands that asked for it
        self._leaving: dict[AdapterRef, dict[int, None]] = {}
        self._swap: Swap | None = None  # under way

    # ---- requests --------------------------------------------------------------------------------

    def want(self, request: int, adapter: AdapterRef, now: float) -> list[Instruction]:
        """A request needs the adapter. It is started, rejected, or waits."""
        self._eviction.note(adapter, now)
        rejected = self._failed.reject(request, adapter, now)
        if rejected:
            return [rejected]
        entry = self._entries.get(adapter)
        if entry is None:
            entry = self._entries[adapter] = AdapterEntry(ResidencyStage.FETCHING, now, Tier.REMOTE)
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
        """The request has ended, or its client left while it waited. A second call does nothing."""
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
        rejected = self._failed.reject(request, adapter, now)
        if rejected:
            return [rejected]
        entry = self._entries.get(adapter)
        if entry is not None and entry.stage is not ResidencyStage.FETCHING:
            return [CommandDone(request)]
        instructions: list[Instruction] = []
        if entry is None:
            entry = self._entries[adapter] = AdapterEntry(ResidencyStage.FETCHING, now, Tier.REMOTE)
            instructions.append(Fetch(adapter))
        entry.cachers[request] = None
        return instructions

    def evict(self, request: int, adapter: AdapterRef, now: float) -> list[Instruction]:
        """Unpins the adapter. It leaves the engine as soon as no request uses it or waits for it.
        Requests that come meanwhile are served first.
        """
        self.slots.unpin(adapter)
        self._leaving.setdefault(adapter, {})[request] = None
        return self._advance(now)

    def pin(self, adapter: AdapterRef, now: float) -> list[Instruction]:
        """Pins an adapter that is in a slot: it keeps the slot, whatever was asked before. Other
        versions of the same name are no longer pinned.
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
        """The adapter makes room like any other from now on. If it is idle and another one waits,
        it does so at once.
        """
        self.slots.unpin(adapter)
        return self._advance(now)

    def tick(self, now: float) -> list[Instruction]:
        """Called regularly. Each adapter that has waited long enough in line closes a slot, or
        takes the slot of an adapter whose steady use has ended.
        """
        if not self._line:
            return []
        kept = self._eviction.kept(self.slots, now)
        room = self._eviction.room(self.slots, now, kept=kept, closing=self._closing)
        if not isinstance(room, Full):
            return self._advance(now)
        late = sum(now - self._oldest(a) >= SLOT_WAIT_S for a in self._line)
        for _ in range(late - len(self._closing)):
            victim = self.slots.oldest_in_use({*self._closing, *kept})
            if victim is None:
                break
            self._entries[victim].stage = ResidencyStage.CLOSING
            self._closing[victim] = None
        return []

    # ---- what became of the instructions ---------------------------------------------------------

    def cached(self, adapter: AdapterRef, now: float) -> list[Instruction]:
        """The adapter's files are on disk and valid. If only commands for the disk wait, they are
        done: the adapter is no longer among `adapters`, which tells the driver to stop here.
        """
        entry = self._entries[adapter]
        done: list[Instruction] = [CommandDone(r) for r in entry.cachers]
        entry.cachers.clear()
        if done and not entry.waiting:
            del self._entries[adapter]
        return done + self._advance(now)

    def fetched(self, loaded: Loaded, came_from: Tier, now: float) -> list[Instruction]:
        """The adapter is valid and in the engine's host memory."""
        entry = self._entries[loaded.ref]
        entry.loaded, entry.in_host = loaded, True
        done: list[Instruction] = [CommandDone(r) for r in entry.cachers]
        entry.cachers.clear()
        self._line_up(loaded.ref, entry, came_from, now)
        if not entry.waiting:
            self._forget(loaded.ref)
        return done + self._advance(now)

    def failed(self, adapter: AdapterRef, failure: Failure, now: float) -> list[Instruction]:
        """The fetch failed. Every request and command that waited for it is rejected. The adapter
        is not tried again for FAILED_FOR_S.
        """
        return self._fail(adapter, failure, now) + self._advance(now)

    def swapped(self, failures: Mapping[AdapterRef, Failure], now: float) -> list[Instruction]:
        """The engine has performed the swap. Every request that waited for an entered adapter
        starts. `failures` are the adapters that the engine refused; nothing of them is left there.
        """
        swap, self._swap = self._swap, None
        assert swap is not None
        instructions: list[Instruction] = []
        for gone in swap.unload:
            instructions += [CommandDone(r) for r in self._leaving.pop(gone.ref, ())]
            entry = self._entries[gone.ref]
            if entry.waiting:  # requests came while it was unloaded
                entry.stage, entry.loaded = ResidencyStage.FETCHING, None
                instructions.append(Fetch(gone.ref))
            else:
                del self._entries[gone.ref]
        for entered in swap.enter:
            failure = failures.get(entered.ref)
            if failure is not None:
                self.slots.vacate(entered.ref)
                instructions += self._fail(entered.ref, failure, now)
                continue
            entry = self._entries[entered.ref]
            entry.stage, entry.since = ResidencyStage.RESIDENT, now
            self.loads[entry.came_from.name.lower()] += 1
            instructions += self._start_waiting(entry, entry.came_from)
        return instructions + self._advance(now)

    # ---- for heartbeats --------------------------------------------------------------------------

    def states(self, now: float, load_s: float) -> tuple[AdapterState, ...]:
        """The adapters that are in a slot, in host memory or on their way. `load_s` is the expected
        time of a load, in seconds.
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
        """Every adapter that is on its way, in a slot, in host memory, or just leaving. Its files
        must stay on disk.
        """
        return self._entries.keys()

    def came_from(self, adapter: AdapterRef) -> Tier:
        """The tier at which the load of this adapter began."""
        return self._entries[adapter].came_from

    @property
    def waiting(self) -> int:
        """How many requests wait for an adapter."""
        return len(self._seekers)

    # ---- inside ----------------------------------------------------------------------------------

    def _advance(self, now: float) -> list[Instruction]:
        """Removes evicted adapters that are idle by now, gives slots to the adapters in line, and
        makes room in host memory.
        """
        instructions = self._tell_gone() if self._leaving else []
        if self._swap is not None:
            return instructions
        unload = self._retire() if self._leaving else []
        enter: list[Loaded] = []
        victims: list[AdapterRef] = []
        coming: set[AdapterRef] = set()
        kept = self._eviction.kept(self.slots, now) if self._line else set()
        for head in self._in_order():
            room = self._eviction.room(
                self.slots,
                now,
                kept=kept,
                closing=self._closing,
                coming=coming,
                wanted_by=head,
            )
            if isinstance(room, Full):
                break
            if isinstance(room, Evict):
                victims.append(self._vacate(room.victim))
                self.evictions[SLOT_NEEDED] += 1
            self.slots.occupy(head)
            coming.add(head)
            enter.append(self._enter(head, now))
        for left in self._line:
            entry = self._entries[left]
            entry.full_since = now if entry.full_since is None else entry.full_since
        instructions += self._reopen()
        if not (enter or unload) and sum(self._warm.values()) <= WARM_BYTES:
            return instructions
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
        return [*instructions, self._swap]

    def _tell_gone(self) -> list[Instruction]:
        """Evicting an adapter that is not here is done at once."""
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
            elif entry.stage in IN_SLOT and not entry.waiting and self.slots.uses(adapter) == 0:
                self._closing.pop(adapter, None)
                self.slots.vacate(adapter)
                self.evictions[ASKED_OF_GPU] += 1
            else:
                continue
            retired.append(self._leave(adapter))
        return retired

    def _in_order(self) -> list[AdapterRef]:
        """The adapters in line, the first to be served first. They are ordered by the age of their
        oldest request, and each waiting request adds COUNT_S of age.
        """
        if isinstance(self.slots.room(), Full):
            return []
        return sorted(
            self._line, key=lambda a: self._oldest(a) - COUNT_S * len(self._entries[a].waiting)
        )

    def _oldest(self, adapter: AdapterRef) -> float:
        return next(iter(self._entries[adapter].waiting.values()))

    def _vacate(self, idle: AdapterRef) -> AdapterRef:
        """Frees the slot of a closed adapter that is idle; without one, that of the given
        adapter.
        """
        victim = next((a for a in self._closing if self.slots.uses(a) == 0), idle)
        self._closing.pop(victim, None)
        self.slots.vacate(victim)
        return victim

    def _enter(self, adapter: AdapterRef, now: float) -> Loaded:
        entry = self._entries[adapter]
        del self._line[adapter]
        entry.stage, entry.entered = ResidencyStage.LOADING, now
        assert entry.loaded is not None
        return entry.loaded

    def _drop(self) -> list[Loaded]:
        """Drops the least popular adapters until the others fit host memory."""
        dropped: list[Loaded] = []
        while self._warm and (
            self._held() > self._host_places or sum(self._warm.values()) > WARM_BYTES
        ):
            coldest = min(self._warm, key=self._eviction.warmth)
            del self._warm[coldest]
            self.evictions[MEMORY_NEEDED] += 1
            dropped.append(self._leave(coldest))
        return dropped

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

    def _line_up(
        self, adapter: AdapterRef, entry: AdapterEntry, came_from: Tier, now: float
    ) -> None:
        entry.stage, entry.came_from, entry.since = ResidencyStage.CACHED, came_from, now
        entry.full_since = None
        self._line[adapter] = None

    def _reopen(self) -> list[Instruction]:
        """Opens closed slots again until no more are closed than adapters wait. The requests that
        came for their adapters meanwhile start.
        """
        started: list[Instruction] = []
        while len(self._closing) > len(self._line):
            adapter, _ = self._closing.popitem()
            entry = self._entries[adapter]
            entry.stage = ResidencyStage.RESIDENT
            started += self._start_waiting(entry, Tier.GPU)
        return started

    def _start_waiting(self, entry: AdapterEntry, came_from: Tier) -> list[Instruction]:
        assert entry.loaded is not None
        started: list[Instruction] = []
        for request, came in entry.waiting.items():
            del self._seekers[request]
            slot_wait_s = 0.0 if came_from is Tier.GPU else entry.slot_wait_s(came)
            started.append(self._start(request, entry.loaded, came_from, slot_wait_s))
        entry.waiting.clear()
        return started

    def _fail(self, adapter: AdapterRef, failure: Failure, now: float) -> list[Instruction]:
        entry = self._entries.pop(adapter)
        self._failed.note(adapter, failure, now)
        for request in entry.waiting:
            del self._seekers[request]
        return [
            Reject(r, failure.code, failure.message, failure.retryable)
            for r in (*entry.waiting, *entry.cachers)
        ]

    def _seek(self, request: int, adapter: AdapterRef, entry: AdapterEntry, now: float) -> None:
        entry.waiting[request] = now
        self._seekers[request] = adapter

    def _start(
        self, request: int, adapter: Loaded, came_from: Tier, slot_wait_s: float = 0.0
    ) -> Start:
        self.slots.acquire(adapter.ref)
        self._users[request] = adapter.ref
        return Start(request, adapter, came_from, slot_wait_s)

    def _forget(self, adapter: AdapterRef) -> None:
        """No request waits for the adapter any more. It stays WARM if the engine has it in host
        memory. Else only the disk cache keeps it.
        """
        self._line.pop(adapter, None)
        entry = self._entries[adapter]
        if entry.in_host and entry.loaded is not None:
            entry.stage = ResidencyStage.WARM
            self._warm[adapter] = entry.loaded.size_bytes
        else:
            del self._entries[adapter]

    def _state(
        self, ref: AdapterRef, entry: AdapterEntry, now: float, load_s: float
    ) -> AdapterState:
        in_slot = entry.stage in IN_SLOT
        state = entry.state(
            ref,
            now,
            load_s,
            uses=self.slots.uses(ref),
            pinned=self.slots.pinned(ref),
            steady=in_slot and self._eviction.is_steady(ref, now),
        )
        if entry.stage is ResidencyStage.WARM and not state.pinned:
            entry.when_warm = state
        return state
