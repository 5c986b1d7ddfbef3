"""A rollback holds at once, whatever is read from the file before it has it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

from gateway.adapters.alias_store import AliasStore
from gateway.adapters.aliases import Alias, AliasShare, AliasState
from gateway.telemetry.prometheus import Metrics
from shared.config.aliases import RollbackConfig
from shared.runtime.state_file import StateFile

CANARY = Alias(
    (AliasShare("v7", 50), AliasShare("bad", 50)),
    RollbackConfig(error_rate=0.2, min_requests=10, window_s=60.0),
)


class SlowFile(StateFile[AliasState]):
    """Changes wait for `written`. `reads` counts."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, AliasState)
        self.written, self.reads = threading.Event(), 0

    def read(self) -> AliasState:
        self.reads += 1
        return super().read()

    def update(self, change: Callable[[AliasState], AliasState]) -> AliasState:
        self.written.wait(30)
        return super().update(change)


async def test_a_rollback_that_is_not_written_yet_outlives_what_is_read_from_the_file(
    tmp_path: Path,
) -> None:
    file = SlowFile(tmp_path / "aliases.json")
    store = AliasStore({"base": {"prod": CANARY}}, file, Metrics())
    for _ in range(10):
        store.note("base", "prod", "bad", failed=True)
    assert "bad" in store.of("base")["prod"].rollbacks
    before, following = file.reads, asyncio.create_task(store.run())
    try:
        async with asyncio.timeout(30):
            while file.reads == before:
                await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert [s.adapter for s in store.of("base")["prod"].live] == ["v7"]
            file.written.set()
            while not file.read().bases:
                await asyncio.sleep(0.01)
        assert "bad" in store.of("base")["prod"].rollbacks
    finally:
        file.written.set()
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
