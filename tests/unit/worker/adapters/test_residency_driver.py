"""Shell. The driver performs what residency says, over a simulated engine and a real folder."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from shared.adapters.checks import AdapterFacts
from shared.adapters.identity import AdapterRef
from shared.config.engine import SimTiming
from shared.errors import EngineFailure, InvalidAdapter
from shared.link.messages import Tier
from shared.stores.local import LocalStore
from tests.unit.worker.disk.whole_check import WholeCheck
from worker.adapters.fetching import AdapterFetcher, FetchHint
from worker.adapters.load_times import LoadTimes
from worker.adapters.residency import Residency
from worker.adapters.residency_driver import ResidencyDriver
from worker.disk.cache import DiskCache
from worker.engine.base import Loaded, Swap, Swapped
from worker.engine.sim.engine import SimEngine

SLOTS = 2
TIMEOUT_S = 10.0


class DyingEngine(SimEngine):
    """Its first swap finds it dead."""

    async def swap(self, swap: Swap) -> Swapped:
        raise EngineFailure("gone")


class ToldRequests:
    """What requests are told, by their numbers."""

    def __init__(self) -> None:
        self.told: list[tuple[int, str]] = []
        self.news = asyncio.Event()

    def start(
        self, number: int, adapter: Loaded | None, came_from: Tier, slot_wait_s: float
    ) -> None:
        self.tell(number, f"starts from {came_from.name}")

    def refuse(self, number: int, code: str, message: str, retryable: bool) -> None:
        self.tell(number, code)

    def tell(self, number: int, what: str) -> None:
        self.told.append((number, what))
        self.news.set()


class Driven:
    """A driver over a store with one adapter, `ref`, which is `valid` or not."""

    def __init__(self, folder: Path, engine: SimEngine) -> None:
        (folder / "store" / "a").mkdir(parents=True)
        (folder / "store" / "a" / "adapter_config.json").write_text("{}")
        self.store, self.valid = LocalStore(str(folder / "store")), True
        self.cache = DiskCache(folder / "cache", 0)
        self.requests, self.heard = ToldRequests(), 0
        times = LoadTimes()
        fetcher = AdapterFetcher(engine, self.store, self.cache, lambda ref, peers: (), times)
        self.driver = ResidencyDriver(
            engine,
            fetcher,
            times,
            self.requests,
            self._changed,
            lambda reason: self.requests.tell(0, f"dead: {reason}"),
        )
        self.driver.engine_started(Residency(SLOTS, SLOTS), WholeCheck(self._check))

    def _changed(self) -> None:
        self.heard += 1

    def _check(self, folder: Path) -> AdapterFacts:
        if not self.valid:
            raise InvalidAdapter("It is bad.", "nonfinite")
        return AdapterFacts(8, 6, ())

    async def want(self, number: int) -> list[tuple[int, str]]:
        """One request for the adapter. Returns what all requests were told up to the next news."""
        stored = await self.store.find("a")
        assert stored is not None
        self.requests.news.clear()
        self.driver.want(number, AdapterRef("sim", "a", stored.digest), FetchHint(stored))
        async with asyncio.timeout(TIMEOUT_S):
            await self.requests.news.wait()
        return self.requests.told


@contextlib.asynccontextmanager
async def driven(folder: Path, engine: type[SimEngine] = SimEngine) -> AsyncIterator[Driven]:
    made = engine("sim", SimTiming(load_ms=0.0), max_loras=SLOTS)
    await made.start()
    one = Driven(folder, made)
    async with asyncio.TaskGroup() as tasks:
        one.driver.tasks = tasks
        yield one
        one.driver.cancel_loads()
    await made.stop()
    one.cache.close()


async def test_a_request_starts_once_its_adapter_is_in_a_slot_and_the_next_one_at_once(
    tmp_path: Path,
) -> None:
    async with driven(tmp_path) as one:
        assert await one.want(1) == [(1, "starts from REMOTE")]
        assert await one.want(2) == [(1, "starts from REMOTE"), (2, "starts from GPU")]
        assert one.heard >= 2  # of the fetch and of the swap


async def test_a_request_for_a_bad_adapter_is_refused_and_gateways_hear_of_it(
    tmp_path: Path,
) -> None:
    async with driven(tmp_path) as one:
        one.valid = False
        assert await one.want(1) == [(1, "invalid_adapter_nonfinite")]
        assert one.heard >= 2  # of the fetch and of its end


async def test_a_swap_that_finds_the_engine_dead_is_told_of(tmp_path: Path) -> None:
    async with driven(tmp_path, DyingEngine) as one:
        assert await one.want(1) == [(0, "dead: gone")]


async def test_what_nobody_expected_of_an_adapter_fails_its_requests_alone(tmp_path: Path) -> None:
    """The worker's tasks end with the first one that raises."""

    def broken(folder: Path) -> AdapterFacts:
        raise ExceptionGroup("of parts", [ValueError("buffer size")])

    async with driven(tmp_path) as one:
        one.driver.engine_started(Residency(SLOTS, SLOTS), WholeCheck(broken))
        assert await one.want(1) == [(1, "internal_error")]
        one.driver.engine_started(Residency(SLOTS, SLOTS), WholeCheck(one._check))
        assert (await one.want(2))[-1] == (2, "starts from REMOTE")
