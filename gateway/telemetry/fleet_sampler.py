"""Shell. Records the state of the fleet in the recorder once a second."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from gateway.telemetry.prometheus import GaugeSources
from gateway.telemetry.recorder import Recorder

SAMPLE_S = 1.0


class FleetSampler:
    """`clock` must be the dispatcher's, since the recorder keeps that time."""

    def __init__(
        self, recorder: Recorder, sources: GaugeSources, clock: Callable[[], float]
    ) -> None:
        self._recorder, self._sources, self._clock = recorder, sources, clock

    async def run(self) -> None:
        while True:
            await asyncio.sleep(SAMPLE_S)
            self.sample()

    def sample(self) -> None:
        fleet = self._sources.fleet
        assert fleet is not None
        queued = sum(depth() for depth in self._sources.queued.values())
        changes = {(w.id, w.heartbeat.epoch): w.slot_changes for w in fleet}
        ongoing = queued + sum(fleet.own_requests().values())
        self._recorder.sample(self._clock(), queued, ongoing, changes)
