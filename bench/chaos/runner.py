"""Shell. One scenario from its start to its row: a cluster, clients, faults, and what is left."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import MappingProxyType

from bench.chaos.clients import Clients, questions
from bench.chaos.figures import ChaosRow
from bench.chaos.fleets import ClusterShape, DisturbedFleet, linked, served
from bench.chaos.judge import Verdict
from bench.chaos.scenarios import NotAsPromised, Scenario, until_ready
from bench.process import NotStarted
from examples.demo.styles import HELD_OUT

TOKENS = 100
PROMPTS = 2
SAY_S = 5.0
"""Between two lines of progress."""
WARM_S = 2.0
"""Of load before the first fault: as long as an answer, so that all streams are at different
places.
"""
QUIET_S = 20.0
"""For the last reservation to end after the last answer."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much of a scenario."""

    engine: str
    seconds: float
    streams: int
    workers: int
    seed: int
    command: str


class ChaosRun:
    """One scenario. `say` is called with each step of progress. `gateway` are settings that differ
    from the usual ones.
    """

    def __init__(
        self,
        scenario: Scenario,
        effort: Effort,
        say: Callable[[ChaosRow], None],
        gateway: Mapping[str, object] = MappingProxyType({}),
    ) -> None:
        self._gateway = gateway
        self._scenario, self._effort, self._say = scenario, effort, say
        self._rng = Random(effort.seed)
        self._strikes = 0
        self._load = 0.0
        self._began = time.monotonic()

    async def run(self) -> ChaosRow:
        """Raises NotStarted if the cluster does not even start."""
        effort, scenario = self._effort, self._scenario
        shape = ClusterShape(effort.engine, effort.workers, scenario.gateways)
        start = linked if scenario.linked else served
        with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
            async with start(shape, Path(folder), self._gateway) as fleet:
                asked = questions(shape.models, HELD_OUT[:PROMPTS])
                repeats = scenario.repeats
                async with Clients(fleet.url, asked, TOKENS, self._rng, repeats=repeats) as clients:
                    await clients.learn()
                    clients.start(effort.streams)
                    await asyncio.sleep(WARM_S)
                    self._began = time.monotonic()
                    failure = ""
                    async with self._telling(clients):
                        try:
                            await self._strike_until_the_end(fleet)
                            await clients.finish()
                            await fleet.until_serving(shape.workers)
                            failure = await fleet.until_quiet(QUIET_S)
                        except (NotAsPromised, NotStarted) as exc:
                            failure = str(exc)
                    return self._row(clients, failure)

    async def _strike_until_the_end(self, fleet: DisturbedFleet) -> None:
        while self._since_began() < self._effort.seconds:
            await until_ready(fleet, self._scenario)
            struck = time.monotonic()
            self._strikes += 1
            await self._scenario.strike(fleet, self._rng)
            await asyncio.sleep(max(0.0, struck + self._scenario.every_s - time.monotonic()))

    def _since_began(self) -> float:
        return time.monotonic() - self._began

    @contextlib.asynccontextmanager
    async def _telling(self, clients: Clients) -> AsyncIterator[None]:
        async def tell() -> None:
            while True:
                await asyncio.sleep(SAY_S)
                self._load = max(self._load, os.getloadavg()[0])
                self._say(self._row(clients, ""))

        telling = asyncio.create_task(tell(), name="progress")
        try:
            yield
        finally:
            telling.cancel()
            await asyncio.wait([telling])

    def _row(self, clients: Clients, failure: str) -> ChaosRow:
        tally = clients.tally
        return ChaosRow(
            scenario=self._scenario.name,
            says=self._scenario.says,
            engine=self._effort.engine,
            streams=self._effort.streams,
            seconds=self._since_began(),
            strikes=self._strikes,
            answers=tally.answers,
            failed=tally.verdicts[Verdict.FAILED],
            wrong=tally.verdicts[Verdict.WRONG],
            moved=tally.moved,
            reconnected=tally.reconnected,
            gap_s=tally.longest_gap_s,
            first_s=tally.longest_first_s,
            load=self._load,
            command=self._effort.command,
            failure=failure,
            examples=tally.examples,
        )
