"""Shell. What each engine step tells of itself: the few figures that heartbeats carry."""

from __future__ import annotations

import time
from typing import Any

from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import LoRARequestStates

from worker.engine.step_rates import StepRates
from worker.engine.vllm.write_interval import WriteInterval


class StepStats(StatLoggerBase):  # type: ignore[misc]
    """Takes the place of vLLM's own statistics, which cost 10 us per token.

    `steps`, `running` and `waiting` are counts, and `kv_usage` is a share (0 to 1).
    """

    current: StepStats | None = None

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self.running = self.waiting = self.steps = 0
        self.kv_usage = 0.0
        self.rates = StepRates()
        self._last = 0.0
        self._outputs = self._prompt_tokens = 0
        self.pacing: WriteInterval | None = None
        StepStats.current = self

    def replace_others(self, engine: AsyncLLM) -> None:
        """Called before the first request. It switches off vLLM's figures per request and token,
        and the Prometheus logger that vLLM adds to any other logger.
        """
        processor = engine.output_processor
        engine.log_stats = processor.log_stats = False
        processor.lora_states = LoRARequestStates(False)
        engine.logger_manager = self
        process = processor.process_outputs

        def counted(outputs: list[Any], *args: Any, **kwargs: Any) -> Any:
            self._outputs += len(outputs)
            for output in outputs:
                if output.prefill_stats is not None:  # comes with a request's first token
                    self._prompt_tokens += output.prefill_stats.num_prompt_tokens
            return process(outputs, *args, **kwargs)

        processor.process_outputs = counted

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
        **_: Any,
    ) -> None:
        """vLLM calls this after each step."""
        now = time.monotonic()
        took = now - self._last
        self.steps += 1
        if self._last and self._prompt_tokens:
            self.rates.prefill(took, self._prompt_tokens)
        elif self._last and self._outputs and took < 1.0:
            self.rates.steps(took)
        self._outputs = self._prompt_tokens = 0
        if scheduler_stats is not None:
            self.running = scheduler_stats.num_running_reqs
            self.waiting = (
                scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
            )
            self.kv_usage = scheduler_stats.kv_cache_usage
        self._last = now if self.running else 0.0
        if self.pacing is not None:
            self.pacing.stepped(now, self.rates.step_s)

    def record_admission_rejection(self, reason: str) -> None:
        return None

    def log_engine_initialized(self) -> None:
        return None
