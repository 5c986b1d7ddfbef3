"""Shell. Watches an engine's progress for as long as the worker serves."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

from shared.errors import EngineFailure
from worker.engine.base import Engine
from worker.engine.hang_detection import LOOK_S, Healthy, Hung, ProgressWatch, Suspect

PING_S = 1.0
clock = time.monotonic


async def watch_engine(
    engine: Engine,
    suspect_s: float,
    kill_s: float,
    on_suspect: Callable[[str], None],
    on_hung: Callable[[str], None],
) -> None:
    """Pings the engine and judges it every LOOK_S. `on_suspect` is called at each change: with a
    reason, or with "" when the engine is trusted again. Returns after it has called `on_hung`.
    """
    watch = ProgressWatch(suspect_s, kill_s, clock())
    pinging = asyncio.create_task(_ping(engine, watch), name="engine pings")
    suspect = False
    try:
        while True:
            await asyncio.sleep(LOOK_S)
            match watch.look(engine.signs(), clock()):
                case Suspect(reason) if not suspect:
                    suspect = True
                    on_suspect(reason)
                case Healthy() if suspect:
                    suspect = False
                    on_suspect("")
                case Hung(reason):
                    on_hung(reason)
                    return
    finally:
        pinging.cancel()


async def _ping(engine: Engine, watch: ProgressWatch) -> None:
    """Sends one ping and waits for its answer, however long it takes."""
    # RequestTable and Engine.died report a dead engine.
    with contextlib.suppress(EngineFailure):
        while True:
            watch.pinged(clock())
            await engine.ping()
            watch.answered()
            await asyncio.sleep(PING_S)
