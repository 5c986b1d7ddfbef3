"""Shell. What the signals that end a process mean, and how often one must come."""

from __future__ import annotations

import asyncio
import os
import signal

from shared.runtime.process import on_stop_signals


async def test_ctrl_c_again_hurries_and_sigterm_again_says_nothing_new() -> None:
    heard: asyncio.Queue[str] = asyncio.Queue()
    on_stop_signals(heard.put_nowait, lambda: heard.put_nowait("hurry"))
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(10):
            os.kill(os.getpid(), signal.SIGTERM)
            assert await heard.get() == "SIGTERM"
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            assert await heard.get() == "hurry"
    finally:
        for sig in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(sig)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert heard.empty()
