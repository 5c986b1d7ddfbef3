"""Shell. Shows the recorder the fleet once a second."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from gateway.telemetry.prometheus import Watched
from gateway.telemetry.recorder import Recorder

SAMPLE_S = 1.0
"""An adapter that is loaded and evicted within one is not seen."""


class FleetSampler:
    """`clock` is the dispatcher's."""

    def __init__(self, recorder: Recorder, watched: Watched, clock: Callable[[], float]) -> None:
        self._recorder, self._watched, self._clock = recorder, watched, clock

    async def run(self) -> None:
        while True:
            await asyncio.sleep(SAMPLE_S)
            self.sample()

    def sample(self) -> None:
        fleet = self._watched.fleet
        assert fleet is not None
        queued = sum(depth() for depth in self._watched.queued.values())
        loaded = {(w.id, w.beat.epoch): w.loaded for w in fleet}
        ongoing = queued + sum(fleet.own_requests().values())
        self._recorder.sample(self._clock(), queued, ongoing, loaded)
