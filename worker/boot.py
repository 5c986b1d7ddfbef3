"""Shell. What must happen before a worker serves: its engine starts, and the validator reads the
shape of the base model.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass

from shared.runtime import garbage
from shared.runtime.descendants import descendants, is_stopped, kill_all
from shared.runtime.process import give_large_blocks_back
from shared.runtime.shared_memory import SUFFIX, note_segments
from worker.disk.cache import Check
from worker.engine.base import Engine, EngineFacts
from worker.settings import WorkerSettings
from worker.validation.factory import open_validator

GC_THRESHOLD = (700, 10, 1 << 30)
"""Python's own, but old objects are looked at by the Agent alone."""
log = logging.getLogger("loraplex.boot")

STOPPED_LOOK_S = 0.5
NOTE_S = 2.0
"""Between two looks at the shared memory of an engine that boots."""


@dataclass(frozen=True, slots=True)
class BootedEngine:
    """The facts of the engine that has started, and the check that each new adapter must pass."""

    facts: EngineFacts
    check: Check


async def boot(engine: Engine, settings: WorkerSettings) -> BootedEngine:
    """Starts the engine and opens the validator for it.

    Raises LoraplexError, with the reason, if the worker cannot serve.
    """
    async with _noting_segments(settings), _killing_stopped_processes(settings):
        facts = await engine.start()
    validator = await asyncio.to_thread(
        open_validator, settings.model, facts.max_lora_rank, facts.layers
    )
    garbage.freeze(*GC_THRESHOLD)
    give_large_blocks_back()  # not before: the engine's own process would inherit it
    return BootedEngine(facts, validator)


@contextlib.asynccontextmanager
async def _killing_stopped_processes(settings: WorkerSettings) -> AsyncIterator[None]:
    """The watchdog looks at an engine that serves. One that boots may be silent for minutes, but a
    process of it that a signal has stopped will never go on, and the engine waits for it for ever.
    Time for which this process itself stood still does not count, since it does not look then.
    """
    patience = (settings.engine_suspect_s + settings.engine_kill_s) / STOPPED_LOOK_S

    async def look_for_ever() -> None:
        looks: dict[int, int] = {}
        while True:
            await asyncio.sleep(STOPPED_LOOK_S)
            stopped = await asyncio.to_thread(lambda: list(filter(is_stopped, descendants())))
            looks = {pid: looks.get(pid, 0) + 1 for pid in stopped}
            for pid in (pid for pid, count in looks.items() if count > patience):
                log.error("a process of the engine was stopped while it boots", extra={"pid": pid})
                kill_all([pid])

    looking = asyncio.create_task(look_for_ever(), name="stopped processes")
    try:
        yield
    finally:
        looking.cancel()


@contextlib.asynccontextmanager
async def _noting_segments(settings: WorkerSettings) -> AsyncIterator[None]:
    """Writes down the shared memory of the engine's processes, for whoever cleans up after this
    process. The engine makes it while it boots.
    """
    if settings.run_dir is None:
        yield
        return
    place = settings.run_dir / f"{settings.worker}{SUFFIX}"

    def note() -> None:
        note_segments(place, [os.getpid(), *descendants()])

    async def note_for_ever() -> None:
        while True:
            await asyncio.sleep(NOTE_S)
            await asyncio.to_thread(note)

    noting = asyncio.create_task(note_for_ever(), name="shared memory")
    try:
        yield
    finally:
        noting.cancel()
        note()
