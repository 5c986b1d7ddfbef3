"""Shell. What has to happen before a worker serves: its engine starts, and its validator opens the
base model's files.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from worker.disk.cache import Check
from worker.engine.base import Engine, EngineFacts
from worker.settings import WorkerSettings
from worker.validation.factory import open_validator


@dataclass(frozen=True, slots=True)
class Booted:
    """What the engine turned out to be, and how adapters for it are checked."""

    facts: EngineFacts
    check: Check


async def boot(engine: Engine, settings: WorkerSettings) -> Booted:
    """Raises LoraplexError with the reason if the worker cannot serve."""
    facts = await engine.start()
    validator = await asyncio.to_thread(
        open_validator, settings.model, facts.max_lora_rank, facts.layers
    )
    return Booted(facts, validator.check)
