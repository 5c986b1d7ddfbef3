"""What a worker does between its engine's start and its first request."""

from __future__ import annotations

import asyncio
import gc
import signal
from pathlib import Path

import pytest

from shared.config.engine import SimTiming
from shared.config.llm import LLMConfig
from shared.errors import EngineFailure
from worker.boot import boot
from worker.engine.base import EngineFacts
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


class WaitsForItsProcess(SimEngine):
    """Boots until its process ends, as vLLM does until its process is ready or has ended."""

    async def start(self) -> EngineFacts:
        process = await asyncio.create_subprocess_exec("sleep", "600")
        try:
            process.send_signal(signal.SIGSTOP)
            status = await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
        raise EngineFailure(f"its process ended with {status}")


async def test_an_engine_whose_process_is_stopped_while_it_boots_does_not_boot_for_ever(
    tmp_path: Path,
) -> None:
    model = LLMConfig(model_loading_config={"model_id": "tiny"}, llm_engine="sim")
    settings = WorkerSettings("w0", 1, model, (), tmp_path, engine_suspect_s=0.5, engine_kill_s=0.5)
    async with asyncio.timeout(60.0):
        with pytest.raises(EngineFailure, match=f"{-signal.SIGKILL}"):
            await boot(WaitsForItsProcess("tiny", SimTiming()), settings)
