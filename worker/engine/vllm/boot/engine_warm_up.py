"""Shell. Warms an engine up before its worker says that it is ready. The first request of each kind
compiles kernels inside the step loop, which would stall every stream.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from shared.adapters.identity import AdapterRef
from shared.errors import EngineFailure
from worker.engine.base import EngineRequest, Loaded, Reply, Swap
from worker.engine.vllm.adapters.front_end import Adapters
from worker.engine.vllm.boot.warm_up_requests import WARM_UP_TOKENS, WARM_UPS, prefills, warm_up

log = logging.getLogger("loraplex.vllm")

WARM_UP_S = 60.0
NOT_THE_REQUEST = (401, 403)
"""Statuses under 500 with which something in the way of every request answers. Others may mean that
the small request does not fit the model.
"""
SHOWN_CHARS = 300
REHEARSAL_ID = (1 << 31) - 1
"""Engine id of the adapter that is loaded once before the first real one."""


class Rehearsal:
    """Sends small requests to an engine that has started, with and without an adapter.

    `config` is vLLM's VllmConfig and `tasks` are what its model can do. `serve` answers a request.
    """

    def __init__(
        self,
        base: str,
        config: Any,
        tasks: Sequence[str],
        adapters: Adapters,
        serve: Callable[[EngineRequest, Reply], Awaitable[None]],
    ) -> None:
        self._base, self._config, self._tasks = base, config, tasks
        self._adapters, self._serve = adapters, serve

    async def run(self) -> None:
        """Takes at most WARM_UP_S. That a worker serves means that its engine has answered through
        the same way as for clients.

        Raises EngineFailure if the engine answers with an error that is not the request's.
        """
        started = time.monotonic()
        try:
            async with asyncio.timeout(WARM_UP_S):
                for extra in WARM_UPS if "generate" in self._tasks else ({},):
                    await self._ask(extra, None)
                if self._config.lora_config is not None:
                    await self._with_an_adapter()
        except TimeoutError:
            log.warning("warm-up was cut short", extra={"after_s": WARM_UP_S})
        log.info("warmed up", extra={"seconds": round(time.monotonic() - started, 1)})

    async def _with_an_adapter(self) -> None:
        ref = AdapterRef(self._base, "warm-up", "0")
        adapter = Loaded(ref, REHEARSAL_ID, Path("/nonexistent"), 1, 0)
        try:
            await self._adapters.rehearse(adapter)
            await self._ask({}, adapter)
            for prompts in self._prefills():
                await asyncio.gather(*(self._ask({"prompt": p}, adapter) for p in prompts))
            await self._adapters.swap(Swap((), (), (adapter,)))
        except EngineFailure as exc:
            log.warning("warm-up without an adapter", extra={"reason": exc.message})

    def _prefills(self) -> list[list[list[int]]]:
        """Prompts for a prefill of each size. None on a CPU, whose kernels are compiled already."""
        config = self._config
        if config.device_config.device_type == "cpu" or "generate" not in self._tasks:
            return []
        return prefills(
            config.compilation_config.max_cudagraph_capture_size or 1,
            config.scheduler_config.max_num_batched_tokens,
            config.model_config.max_model_len - WARM_UP_TOKENS,
        )

    async def _ask(self, extra: dict[str, Any], adapter: Loaded | None) -> None:
        asked = warm_up(self._base, self._tasks, extra)
        call = EngineRequest(
            asked.path, "warm-up", asked.body, adapter, content_type=asked.content_type
        )
        discard = DiscardReply()
        await self._serve(call, discard)
        status = discard.status
        if status >= 500 or status in NOT_THE_REQUEST:
            refusal = discard.data.decode(errors="replace")[:SHOWN_CHARS]
            raise EngineFailure(f"the engine answers its first request with {status}: {refusal}")
        if status != 200:
            log.warning(
                "warm-up request was not answered",
                extra={"status": status, "with": list(extra)},
            )


class DiscardReply:
    """A Reply that keeps only the status and the first bytes."""

    def __init__(self) -> None:
        self.prompt_tokens = self.output_tokens = self.status = 0
        self.finish_reasons = ""
        self.data = b""

    def head(self, status: int, sse: bool, data: bytes, end: bool, tokens: bytes = b"") -> None:
        self.status, self.data = status, data

    def answered(self, status: int, data: bytes) -> None:
        return None

    def stored(self, copy: bytes) -> None:
        return None

    def more(self, data: bytes, end: bool, tokens: bytes = b"") -> None:
        return None

    async def room(self) -> None:
        return None

    def progress(self, tokens: bytes) -> None:
        return None

    def lines(self, lines: bytes) -> None:
        return None
