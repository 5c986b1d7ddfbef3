"""Pure. How long the loads of this worker take, as moving averages for heartbeats and estimates."""

from __future__ import annotations

from shared.averages import blend
from shared.link.messages import Tier

LOAD_WEIGHT = 0.3
"""Weight of the newest load in the moving averages."""


class LoadTimes:
    """Moving averages in seconds and bytes; each is 0 until something was measured.

    `prepare_s`: checking an adapter's files and preparing them beside the engine. `stall_s`: how
    long the engine stands still for each adapter that enters a slot. `load_bytes`: the size of
    those adapters. `fetch_s`: a fetch to this host's disk from the store alone.

    `stalled_s` is the sum of all stalls so far.
    """

    def __init__(self) -> None:
        self.prepare_s = self.stall_s = self.fetch_s = self.load_bytes = self.stalled_s = 0.0

    @property
    def load_s(self) -> float:
        """How long a whole load from disk takes."""
        return self.prepare_s + self.stall_s

    def prepared(self, came_from: Tier, check_s: float, prepare_s: float) -> None:
        """Counts one adapter that was prepared. An adapter from the store was checked while it
        came, so its time says less than that of one from disk. It counts only while there is
        nothing better.
        """
        if came_from is Tier.DISK or not self.prepare_s:
            self.prepare_s = blend(self.prepare_s, check_s + prepare_s, LOAD_WEIGHT)

    def swapped(self, stall_s: float, sizes_bytes: list[int]) -> None:
        """Counts one swap that put adapters of these sizes into slots."""
        self.stalled_s += stall_s
        if sizes_bytes:
            count = len(sizes_bytes)
            self.stall_s = blend(self.stall_s, stall_s / count, LOAD_WEIGHT)
            self.load_bytes = blend(self.load_bytes, sum(sizes_bytes) / count, LOAD_WEIGHT)

    def fetched(self, seconds: float) -> None:
        """Counts one fetch from the store alone."""
        self.fetch_s = blend(self.fetch_s, seconds, LOAD_WEIGHT)
