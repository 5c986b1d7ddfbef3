"""Shell. Performs one Swap in the engine and logs what became of each adapter."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from shared.adapters.identity import AdapterRef
from shared.link.messages import Tier
from worker.adapters.failures import Failure
from worker.adapters.load_times import LoadTimes
from worker.engine.base import Engine, Loaded, Swap

log = logging.getLogger("loraplex.agent")
clock = time.monotonic


async def perform_swap(
    engine: Engine, swap: Swap, came_from: Callable[[AdapterRef], Tier], times: LoadTimes
) -> dict[AdapterRef, Failure]:
    """Returns the adapters that the engine refused, each with the reason. Raises EngineFailure."""
    start = clock()
    done = await engine.swap(swap)
    took = {"ms": round((clock() - start) * 1e3, 1), "stall_ms": round(done.stall_s * 1e3, 1)}
    times.swapped(done.stall_s, [adapter.size_bytes for adapter in swap.enter])
    for adapter in swap.unload:
        log.info("adapter unloaded", extra={"adapter": str(adapter.ref)})
    failures = {}
    for adapter in swap.enter:
        refused = done.refused.get(adapter.ref)
        if refused is None:
            _log_loaded(adapter, came_from(adapter.ref), took, len(swap.enter))
            continue
        failures[adapter.ref] = Failure(refused.code, refused.message, refused.retryable)
        log.warning(
            "adapter not loaded",
            extra={"adapter": str(adapter.ref), "code": refused.code, "reason": refused.message},
        )
    return failures


def _log_loaded(adapter: Loaded, came_from: Tier, took: dict[str, float], together: int) -> None:
    facts = {
        "adapter": str(adapter.ref),
        "rank": adapter.rank,
        "from": came_from.name.lower(),
        **took,
        "together": together,
    }
    log.info("adapter loaded", extra=facts)
