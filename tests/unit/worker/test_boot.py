"""What a worker does between its engine's start and its first request."""

from __future__ import annotations

import gc
from pathlib import Path

from shared.config.engine import SimTiming
from shared.config.llm import LLMConfig
from worker.boot import boot
from worker.engine.sim.engine import SimEngine
from worker.settings import WorkerSettings


async def test_what_a_worker_has_imported_is_never_walked_by_the_collector_again(
    tmp_path: Path,
) -> None:
    model = LLMConfig(model_loading_config={"model_id": "tiny"}, llm_engine="sim")
    engine = SimEngine("tiny", SimTiming())
    before, thresholds = gc.get_freeze_count(), gc.get_threshold()
    try:
        await boot(engine, WorkerSettings("w0", 1, model, (), tmp_path))
        assert gc.get_freeze_count() > before + 10_000
        assert gc.get_threshold()[2] > 1_000_000  # nor are the answers of requests, in their midst
    finally:
        gc.unfreeze()
        gc.set_threshold(*thresholds)
        await engine.stop()
