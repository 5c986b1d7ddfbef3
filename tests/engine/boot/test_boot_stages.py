"""Shell. The stages of vLLM's own start are told, by the calls of the vLLM that is installed."""

from __future__ import annotations

from typing import Any

import pytest

from worker.engine.vllm.boot.stages import WORDS

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_each_stage_of_a_start_is_seen_and_what_the_kv_cache_holds(engine: Any) -> None:
    """EngineCore is a process of its own here. A stage whose method vLLM has renamed is missing."""
    (started,) = [r for r in engine.boot_log if r.msg == "vLLM has started"]
    assert list(started.seconds) == list(WORDS.values())
    assert all(seconds >= 0 for seconds in started.seconds.values())
    assert started.kv_tokens >= 1024  # one whole request at least
    assert engine.stage == "warming up"
