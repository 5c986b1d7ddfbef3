"""Pure. How long this worker's loads take: moving averages for heartbeats and for estimates."""

from __future__ import annotations

from shared.averages import blend
from shared.link.messages import Tier

LOAD_WEIGHT = 0.3
"""Of the newest load in the moving averages."""


class LoadTimes:
    """Means in seconds and bytes; 0 until something was measured.

    `prepare_s`: checking an adapter's files and preparing them beside the engine. `stall_s`: the
    time for which the engine stands still per adapter that enters a slot, and `load_bytes` the size
    of those adapters. `fetch_s`: a fetch from the store alone to this host's disk.
    """

    def __init__(self) -> None:
        self.prepare_s = self.stall_s = self.fetch_s = self.load_bytes = 0.0

    @property
    def load_s(self) -> float:
        """A whole load from disk."""
        return self.prepare_s + self.stall_s

    def prepared(self, came_from: Tier, check_s: float, prepare_s: float) -> None:
        """An adapter that came from the store was checked on its way, so its time tells less than
        that of one from disk. It counts only while nothing else was measured.
        """
        if came_from is Tier.DISK or not self.prepare_s:
            self.prepare_s = blend(self.prepare_s, check_s + prepare_s, LOAD_WEIGHT)

    def swapped(self, stall_s: float, sizes_bytes: list[int]) -> None:
        """One stop of the engine put adapters of these sizes into slots."""
        if sizes_bytes:
            count = len(sizes_bytes)
            self.stall_s = blend(self.stall_s, stall_s / count, LOAD_WEIGHT)
            self.load_bytes = blend(self.load_bytes, sum(sizes_bytes) / count, LOAD_WEIGHT)

    def fetched(self, seconds: float) -> None:
        self.fetch_s = blend(self.fetch_s, seconds, LOAD_WEIGHT)
