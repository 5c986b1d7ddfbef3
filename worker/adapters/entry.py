"""Pure. What residency knows of one adapter on this worker, and what heartbeats say of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from shared.adapters.identity import AdapterRef
from shared.link.messages import AdapterState, Tier
from worker.engine.base import Loaded


class ResidencyStage(Enum):
    FETCHING = "fetching"
    CACHED = "cached"  # in host memory, waits for a slot
    LOADING = "loading"
    RESIDENT = "resident"
    CLOSING = "closing"  # resident, but gives up its slot when its last request ends
    UNLOADING = "unloading"
    WARM = "warm"  # in the engine's host memory, in no slot, and no request wants it


IN_SLOT = (ResidencyStage.RESIDENT, ResidencyStage.CLOSING)


@dataclass(slots=True)
class AdapterEntry:
    """One adapter on this worker. `since` is when its stage began (of FETCHING, CACHED and
    RESIDENT); `came_from` is the tier that its load began at.
    """

    stage: ResidencyStage
    since: float
    came_from: Tier
    loaded: Loaded | None = None
    # since when it waits in line because no slot can be had, and when it got one
    full_since: float | None = None
    entered: float = 0.0
    # waiting requests in order of arrival -> when each came
    waiting: dict[int, float] = field(default_factory=dict)
    # commands that want the adapter on disk, while it is being fetched
    cachers: dict[int, None] = field(default_factory=dict)
    # whether the engine holds the weights in host memory, in a slot as well or not
    in_host: bool = False
    # What heartbeats say while the adapter is WARM. It never changes, so it is made once.
    when_warm: AdapterState | None = None

    def tier(self) -> Tier:
        """Where the weights are now."""
        if self.stage in IN_SLOT:
            return Tier.GPU
        if self.in_host:
            return Tier.CPU
        return Tier.REMOTE if self.stage is ResidencyStage.FETCHING else Tier.DISK

    def slot_wait_s(self, came: float) -> float:
        """How long a request that came at `came` has waited for others to give up a slot."""
        if self.full_since is None:
            return 0.0
        return max(0.0, self.entered - max(self.full_since, came))

    def is_loading(self) -> bool:
        """Whether the adapter is on its way into a slot."""
        if self.stage in IN_SLOT or self.stage is ResidencyStage.WARM:
            return False
        return not self.cachers or bool(self.waiting)

    def state(
        self, ref: AdapterRef, now: float, load_s: float, *, uses: int, pinned: bool, steady: bool
    ) -> AdapterState:
        """The entry as heartbeats say it. `load_s` is the expected time of a load; `uses` are the
        running requests of the adapter.
        """
        loading = self.is_loading()
        return AdapterState(
            ref.name,
            ref.digest,
            self.tier(),
            loading,
            max(0.0, load_s - (now - self.since)) if loading else 0.0,
            uses + len(self.waiting),
            self.loaded.rank if self.loaded else 0,
            self.loaded.size_bytes if self.loaded else 0,
            pinned,
            steady,
        )
