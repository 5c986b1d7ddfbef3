"""Pure. One worker as this gateway sees it: its last heartbeat and the requests sent
there since.
"""

from __future__ import annotations

import hashlib
from collections.abc import Set
from dataclasses import dataclass, field

from gateway.fleet.disk_index import DiskIndex
from shared.adapters.identity import AdapterKey, AdapterRef, key_of
from shared.link.messages import (
    ASKED_OF_GPU,
    SLOT_NEEDED,
    AdapterState,
    Heartbeat,
    StreamId,
    Tier,
    WorkerId,
    WorkerState,
    identity,
)

LINE_PER_SLOT = 1
"""Adapters per slot that may wait in a worker's line. The line is about a service time long."""


@dataclass(slots=True, eq=False)
class WorkerView:
    """Only gateway/fleet writes to it: Fleet, and the Pool that the worker is in (`counted`). All
    other code reads.

    `loaded` are the adapters in a GPU slot as of the last heartbeat. `coming` are those on their
    way to one: they load, or this gateway has a reservation for them. `lower` are those in the CPU
    tier or on disk. `idle` are the loaded ones without a request in flight. The first of them is
    the one whose last request of this gateway ended earliest, so it is the likely victim of the
    next load. `steady` are the loaded ones in steady use, in flight or not. `others_busy` are those
    in flight beyond this gateway's reservations. `load` counts the requests of all gateways, those
    that wait too: the `others`, and this gateway's reservations.
    """

    heartbeat: Heartbeat
    lease_until: float
    heartbeat_at: float = 0.0
    attached_epoch: int = -1
    carries: bool = True  # whether its data connection carries messages in both directions
    connected: bool = True  # whether its control connection stood when something was sent last
    silent: bool = False  # its heartbeats are overdue
    served: bool = False  # this life of it, at any time
    warmed_up: bool = False  # see Fleet.to_warm_up
    held: dict[AdapterKey, AdapterState] = field(default_factory=dict)
    reserved: dict[StreamId, AdapterKey | None] = field(default_factory=dict)
    # adapters of this gateway's reservations -> number of reservations
    busy: dict[AdapterKey, int] = field(default_factory=dict)
    others: int = 0
    load: int = 0
    others_busy: set[AdapterKey] = field(default_factory=set)
    loaded: set[AdapterKey] = field(default_factory=set)
    coming: set[AdapterKey] = field(default_factory=set)
    lower: set[AdapterKey] = field(default_factory=set)
    idle: dict[AdapterKey, None] = field(default_factory=dict)
    steady: set[AdapterKey] = field(default_factory=set)
    # prompt tokens of reservations that the last heartbeat does not count yet
    unseen: dict[StreamId, int] = field(default_factory=dict)
    unseen_tokens: int = 0
    seed: int = 0
    disk_index: DiskIndex = field(default_factory=DiskIndex)
    # (load, open slots, has room) as the pool has counted them; None outside a pool
    counted: tuple[int, int, bool] | None = None

    id: WorkerId = field(init=False)
    # (loads, evictions) of its slots before this gateway knew it
    changes_before: tuple[int, int] = field(init=False)
    peer: bytes = field(init=False)  # this life of it, as the link addresses it

    def __post_init__(self) -> None:
        self.id = self.heartbeat.worker
        self.peer = identity(self.id, self.heartbeat.epoch)
        self.seed = int.from_bytes(
            hashlib.blake2b(self.heartbeat.worker.encode(), digest_size=8).digest(), "big"
        )
        self.changes_before = _slot_changes(self.heartbeat)
        self._read(self.heartbeat)

    @property
    def slot_changes(self) -> tuple[int, int]:
        """How often an adapter has come into a slot, and how often one has left it, since this
        gateway knows the worker.
        """
        loads, evictions = _slot_changes(self.heartbeat)
        return loads - self.changes_before[0], evictions - self.changes_before[1]

    @property
    def has_room(self) -> bool:
        return self.load < self.heartbeat.capacity

    def accepts(self, excluded: Set[WorkerId]) -> bool:
        """Whether the worker takes another request and is not one of `excluded`."""
        return self.load < self.heartbeat.capacity and not (excluded and self.id in excluded)

    @property
    def routable(self) -> bool:
        """Whether requests are sent to the worker: it takes them, and no sign says that it cannot
        be reached.
        """
        return (
            self.heartbeat.state is WorkerState.SERVING
            and self.reachable
            and self.carries
            and not self.silent
            and not self.heartbeat.suspect
        )

    @property
    def reachable(self) -> bool:
        """Whether the worker serves or drains, and gets what is sent to it, though perhaps not at
        once. What its data connection does not carry goes by its control connection. If it stands
        still for long it leaves the fleet.
        """
        served = self.heartbeat.state in (WorkerState.SERVING, WorkerState.DRAINING)
        return served and self.attached_epoch == self.heartbeat.epoch

    @property
    def warming(self) -> bool:
        """Whether it loads adapters and does not serve yet."""
        return (
            self.heartbeat.state is WorkerState.JOINING
            and self.heartbeat.warming
            and self.attached_epoch == self.heartbeat.epoch
        )

    def most_wanted(self) -> tuple[AdapterKey, ...]:
        """The adapters in its slots: pinned ones first, then those in steady use, then those in
        flight.
        """
        held = self.held

        def rank(key: AdapterKey) -> tuple[bool, bool, bool, AdapterKey]:
            state = held[key]
            return not state.pinned, not state.steady, not state.in_flight, key

        return tuple(sorted(self.loaded & held.keys(), key=rank))

    @property
    def occupied(self) -> int:
        """Slots that cannot be given to another adapter: the distinct adapters in flight."""
        busy = self.busy
        if not self.others_busy:
            return len(busy)
        return len(busy) + sum(1 for key in self.others_busy if key not in busy)

    @property
    def open_slots(self) -> int:
        """Slots for adapters that are not in flight here; idle adapters may have to leave them. A
        worker that reports no number of slots has no limit.

        The places of its line count as well. The worker gives a freed slot to the next adapter
        between two engine steps, with the weights ready. If the gateway did it, the slot would
        stand empty for a round trip and a load.
        """
        slots = self.heartbeat.slots
        if not slots:
            return self.heartbeat.capacity
        return slots * (1 + LINE_PER_SLOT) - self.occupied

    @property
    def has_open_slot(self) -> bool:
        """A slot, and not just a place in line."""
        slots = self.heartbeat.slots
        return not slots or self.occupied < slots

    @property
    def shown_state(self) -> WorkerState:
        """The state to show people. JOINING for a worker that serves, but whose data connection is
        not there yet: nothing can be sent to it.
        """
        state = self.heartbeat.state
        return WorkerState.JOINING if state is WorkerState.SERVING and not self.routable else state

    @property
    def free_slots(self) -> int:
        """Slots that no adapter has to leave first."""
        return self.heartbeat.slots - len(self.loaded) - len(self.coming)

    @property
    def has_empty_slot(self) -> bool:
        """Another adapter fits beside those that are there; always, where slots have no number."""
        slots = self.heartbeat.slots
        return not slots or len(self.loaded) + len(self.coming) < slots

    def in_flight(self, key: AdapterKey) -> int:
        own = self.busy.get(key, 0)
        if key in self.others_busy:
            return max(own + 1, self.held[key].in_flight)
        return own

    def takes(self, key: AdapterKey) -> bool:
        """Whether the adapter can have a slot: it is in flight here already, a slot or a place in
        line is open, or it keeps its slot while it is idle.
        """
        return (
            key in self.busy or self.open_slots > 0 or key in self.others_busy or key in self.steady
        )

    def tier(self, adapter: AdapterRef) -> Tier:
        """Where the adapter's weights are on this worker, as far as known. GPU only once they are
        loaded; DISK also if any worker of its host has them or had them.
        """
        return self.tier_at(key_of(adapter))

    def tier_at(self, key: AdapterKey) -> Tier:
        state = self.held.get(key)
        if state is not None and state.tier is not Tier.REMOTE:
            return state.tier
        return (
            Tier.DISK
            if self.disk_index.has(self.heartbeat.host, self.heartbeat.base, key)
            else Tier.REMOTE
        )

    def holds(self, adapter: AdapterRef) -> bool:
        """Whether the adapter is in a GPU slot, on its way to one, or reserved for here."""
        key = key_of(adapter)
        return key in self.loaded or key in self.coming or key in self.busy

    # ---- for Fleet -------------------------------------------------------------------------------

    def update(self, heartbeat: Heartbeat, now: float) -> None:
        """Takes a newer heartbeat of the same life."""
        same = heartbeat.adapters == self.heartbeat.adapters
        self.heartbeat, self.heartbeat_at = heartbeat, now
        unseen = self.unseen
        while unseen:
            first = next(iter(unseen))
            if first > heartbeat.acked:
                break
            self.unseen_tokens -= unseen.pop(first)
        if (
            not same
            or self.coming
            or self.others
            or heartbeat.running + heartbeat.waiting > heartbeat.yours
        ):
            self._read(heartbeat)

    def take(self, stream: StreamId, adapter: AdapterRef | None, prompt_tokens: int) -> None:
        key = None if adapter is None else key_of(adapter)
        self.reserved[stream] = key
        self.load += 1
        if prompt_tokens:
            self.unseen[stream] = prompt_tokens
            self.unseen_tokens += prompt_tokens
        if key is not None:
            self.busy[key] = self.busy.get(key, 0) + 1
            self.idle.pop(key, None)
            if key not in self.loaded:
                self.coming.add(key)

    def give_back(self, stream: StreamId) -> AdapterKey | None:
        """Returns the adapter of the reservation that has ended."""
        if stream not in self.reserved:
            return None  # `take` failed half-way
        key = self.reserved.pop(stream)
        self.load -= 1
        self.unseen_tokens -= self.unseen.pop(stream, 0)
        if key is None:
            return None
        left = self.busy[key] - 1
        if left:
            self.busy[key] = left
            return key
        del self.busy[key]
        if key in self.loaded:
            self.idle[key] = None
        else:
            state = self.held.get(key)
            if state is None or not state.loading:
                self.coming.discard(key)
        return key

    def forget_reservations(self) -> None:
        self.reserved.clear()
        self.load = self.others
        self.busy.clear()
        self.unseen.clear()
        self.unseen_tokens = 0
        self.coming.clear()

    def _read(self, heartbeat: Heartbeat) -> None:
        """Reads which adapters the worker holds from the heartbeat."""
        self.others = max(0, heartbeat.running + heartbeat.waiting - heartbeat.yours)
        self.load = self.others + len(self.reserved)
        busy = self.busy
        held: dict[AdapterKey, AdapterState] = {}
        loaded: set[AdapterKey] = set()
        coming: set[AdapterKey] = set()
        lower: set[AdapterKey] = set()
        in_flight: set[AdapterKey] = set()
        idle: dict[AdapterKey, None] = {}
        steady: set[AdapterKey] = set()
        for state in heartbeat.adapters:
            key = key_of(state)
            held[key] = state
            if state.loading:
                coming.add(key)
            elif state.tier is Tier.GPU:
                loaded.add(key)
                if state.steady:
                    steady.add(key)
                if key not in busy:
                    idle[key] = None
            else:
                lower.add(key)
            if state.in_flight and state.in_flight > busy.get(key, 0):
                in_flight.add(key)
        for key in busy:
            if key not in loaded:
                coming.add(key)
        self.disk_index.put(heartbeat.host, heartbeat.base, loaded - self.loaded)
        self.disk_index.put(
            heartbeat.host,
            heartbeat.base,
            [key for key in lower - self.lower if held[key].tier is not Tier.REMOTE],
        )
        self.held, self.loaded, self.coming, self.lower, self.steady = (
            held,
            loaded,
            coming,
            lower,
            steady,
        )
        # Without requests of other gateways, those beyond the reservations are this gateway's own,
        # which ended after the heartbeat had left.
        self.others_busy = in_flight if self.others else set()
        known = {key: None for key in self.idle if key in idle}
        self.idle = known | idle


def _slot_changes(heartbeat: Heartbeat) -> tuple[int, int]:
    left = heartbeat.adapter_evictions
    evictions = left.get(SLOT_NEEDED, 0) + left.get(ASKED_OF_GPU, 0)
    return sum(heartbeat.adapter_loads.values()), evictions
