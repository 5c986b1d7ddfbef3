"""Shell. vLLM as an engine: AsyncLLM with vLLM's own OpenAI app in front of it, called in this
process without HTTP.

vLLM's serving layer does chat templates, sampling parameters, stop strings, logprobs and rendering.
Requests reach it through an ASGI scope that this module makes, and its bytes go to the Reply as
they come. This module adds control over adapters. A context variable (PINNED) says which version a
request sees, so that the public name of an adapter may stand for different weights in requests that
run at the same time. Adapters are loaded and removed only by explicit calls, never while a request
is being read: in vLLM 0.32 such a load kills the engine if it fails.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import logging
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import LoRARequestStates

from loraplex.start import WORKER_PID_ENV
from shared.adapters.identity import AdapterRef
from shared.averages import blend
from shared.config import front_end
from shared.config.arguments import NO_LONGER
from shared.config.llm import LLMConfig
from shared.errors import CannotContinue, ConfigError, EngineFailure
from shared.runtime.descendants import (
    command_line,
    descendants,
    kill_all,
    on_exit,
    out_of_memory_kills,
)
from shared.runtime.parent_death import die_with_parent
from worker.engine.base import EngineFacts, EngineRequest, EngineStats, Loaded, Reply, Swap, Swapped
from worker.engine.progress import EngineSigns
from worker.engine.vllm import patches
from worker.engine.vllm.adapters import Adapters, lora_request
from worker.engine.vllm.app.bridge import AppBridge
from worker.engine.vllm.fast_path import FastServing
from worker.engine.vllm.pacing import LOOK_S, Pacing
from worker.engine.vllm.resume.movable import CREATED, PROGRESS, MovableLLM, install
from worker.engine.vllm.resume.progress import Progress
from worker.engine.vllm.warm_up import WARM_UP_TOKENS, WARM_UPS, prefills, warm_up

log = logging.getLogger("loraplex.vllm")

DEATH_POLL_S = 0.2
STOP_S = 5.0
WARM_UP_S = 60.0
REHEARSAL_ID = (1 << 31) - 1  # of the adapter that is loaded once before the first real one
EWMA = 0.2
CHAT = "/v1/chat/completions"
MOVABLE = frozenset({CHAT, "/v1/completions"})
"""Paths whose answers can be continued on another worker: nothing in them but the text is random.
"""
HOST_PLACES = 240  # adapters in host memory beside those in slots; a count is all that vLLM bounds

PINNED: ContextVar[LoRARequest | None] = ContextVar("pinned_adapter", default=None)
ASKED: ContextVar[str] = ContextVar("asked_model", default="")


class PinnedAdapters(dict[str, LoRARequest]):
    """vLLM's table of adapters, answering from the request's own context: the version that was
    resolved for it, or none.
    """

    def __contains__(self, name: object) -> bool:
        return PINNED.get() is not None

    def __getitem__(self, name: str) -> LoRARequest:
        lora = PINNED.get()
        if lora is None:
            raise KeyError(name)
        return lora

    def get(self, name: str, default: Any = None) -> Any:
        return PINNED.get() or default


class Stats(StatLoggerBase):  # type: ignore[misc]
    """The few engine figures that heartbeats carry. Alone with what each step says of itself:
    vLLM's own statistics cost 10 us per token.
    """

    current: Stats | None = None

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self.running = self.waiting = self.steps = 0
        self.kv_usage = self.step_s = self.prefill_tokens_per_s = 0.0
        self._last = 0.0
        self._outputs = self._prompt_tokens = 0
        self.pacing: Pacing | None = None
        Stats.current = self

    def replace_others(self, engine: AsyncLLM) -> None:
        """Before the first request: no figures per request and token, and no Prometheus logger,
        which vLLM adds to any other.
        """
        processor = engine.output_processor
        engine.log_stats = processor.log_stats = False
        processor.lora_states = LoRARequestStates(False)
        engine.logger_manager = self
        process = processor.process_outputs

        def counted(outputs: list[Any], *args: Any, **kwargs: Any) -> Any:
            self._outputs += len(outputs)
            for output in outputs:
                if output.prefill_stats is not None:  # with a request's first token
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
        now = time.monotonic()
        took = now - self._last
        self.steps += 1
        if self._last and self._prompt_tokens and took > 0:
            self.prefill_tokens_per_s = blend(
                self.prefill_tokens_per_s, self._prompt_tokens / took, EWMA
            )
        elif self._last and self._outputs and took < 1.0:
            self.step_s = blend(self.step_s, took, EWMA)
        self._outputs = self._prompt_tokens = 0
        if scheduler_stats is not None:
            self.running = scheduler_stats.num_running_reqs
            self.waiting = (
                scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
            )
            self.kv_usage = scheduler_stats.kv_cache_usage
        self._last = now if self.running else 0.0
        if self.pacing is not None:
            self.pacing.stepped(now, self.step_s)

    def record_admission_rejection(self, reason: str) -> None:
        return None

    def log_engine_initialized(self) -> None:
        return None


class VLLMEngine:
    """AsyncLLM for one model config. Its EngineCore is a child process that dies with this one."""

    def __init__(self, model: LLMConfig, stream_gap_s: float = 0.0) -> None:
        self._model = model
        self._pacing = Pacing(stream_gap_s)
        # Spawned children of vLLM get both through its plugin hook; forked ones would not, since
        # vLLM remembers that it has run.
        os.environ[WORKER_PID_ENV] = str(os.getpid())
        patches.apply()
        os.register_at_fork(after_in_child=lambda: die_with_parent(signal.SIGKILL))
        self._args = serve_args(model)
        self._engine: MovableLLM | None = None
        self._app: Any = None
        self._tasks: tuple[str, ...] = ()
        self._bridge: AppBridge | None = None
        self.fast: FastServing | None = None
        self._on_death: Callable[[str], None] | None = None
        self._adapters: Adapters | None = None
        self._watch: asyncio.Task[None] | None = None
        self._pace: asyncio.Task[None] | None = None
        self._earlier: set[int] = set()  # processes below this one that are not the engine's
        self._processes: list[int] = []  # EngineCore and its ranks
        self._forget_exits: list[Callable[[], None]] = []
        self._broken = False
        # The kernel's parent-death signal belongs to the thread that forked: this one lives as long
        # as the process.
        self._boot_thread = ThreadPoolExecutor(1, thread_name_prefix="engine-boot")

    async def start(self) -> EngineFacts:
        """Boots the engine beside the event loop. Raises ConfigError or EngineFailure with vLLM's
        own words.
        """
        self._earlier = set(descendants())
        loop = asyncio.get_running_loop()
        try:
            self._engine = await loop.run_in_executor(self._boot_thread, self._boot)
        except Exception as exc:
            # vLLM raises whatever its model, platform or kernels raise; all of it means: it did not
            # start
            raise EngineFailure(f"vLLM did not start: {type(exc).__name__}: {exc}") from exc
        engine = self._engine
        assert engine is not None
        self._adapters = Adapters(engine)
        tasks = self._tasks = tuple(await engine.get_supported_tasks())
        self._app = build_app(self._args, tasks, engine.model_config)
        await init_app_state(engine, self._app.state, self._args, tasks)
        # vLLM's error handler sets it where uvicorn would be told to end
        self._app.state.server = SimpleNamespace(should_exit=False)
        models = self._app.state.openai_serving_models
        base = self._model.model_id
        models.lora_requests = PinnedAdapters()
        models.model_name = lambda lora=None: (
            ASKED.get() or (lora.lora_name.rpartition("@")[0] if lora else base)
        )
        self.fast = FastServing(engine, self._app.state, self._args, self._pacing)
        self._bridge = AppBridge(
            self._app, base, tasks, frozenset(vars(self._args)), lambda: bool(engine.errored)
        )
        await self._warm_up()
        self._watch = asyncio.create_task(self._watch_engine(), name="engine-watch")
        self._watch_processes()
        # else vLLM counts, and no step is told of
        if Stats.current is not None and engine.logger_manager is Stats.current:
            Stats.current.pacing = self._pacing
            self._pace = asyncio.create_task(self._watch_load(), name="pace")
        config = engine.vllm_config
        lora = config.lora_config
        capacity = config.scheduler_config.max_num_seqs
        facts = EngineFacts(
            "vllm", capacity, 0, 0, tasks=tasks, max_model_len=config.model_config.max_model_len
        )
        if lora is None:
            return facts
        return replace(
            facts,
            slots=lora.max_loras,
            max_lora_rank=lora.max_lora_rank,
            host_places=lora.max_cpu_loras or lora.max_loras,
            layers=await self._adapters.layers(),
        )

    async def serve(self, call: EngineRequest, reply: Reply) -> None:
        # Seen by this call alone: each one runs in a task of its own.
        PINNED.set(lora_request(call.adapter) if call.adapter else None)
        ASKED.set(call.model)
        CREATED.set(call.created)
        PROGRESS.set(None)
        if self.fast is not None and await self.fast.serve(call, reply):
            return
        progress = self._progress(call, reply)
        PROGRESS.set(progress)
        assert self._bridge is not None
        await self._bridge.serve(call, reply, progress)

    async def prepare(self, adapter: Loaded) -> None:
        assert self._adapters is not None
        await self._adapters.prepare(adapter)

    async def swap(self, swap: Swap) -> Swapped:
        assert self._adapters is not None
        return await self._adapters.swap(swap)

    def stats(self) -> EngineStats:
        s = Stats.current
        if s is None:
            return EngineStats()
        return EngineStats(s.running, s.waiting, s.kv_usage, 0, s.prefill_tokens_per_s, s.step_s)

    def signs(self) -> EngineSigns:
        s = Stats.current
        if s is None or self._engine is None:
            return EngineSigns()
        # those that the front end still waits for: after they were given back, no step tells
        open_requests = list(self._engine.output_processor.request_states.values())
        prefill_tokens = sum(r.prompt_len for r in open_requests if r.is_prefilling)
        running = min(s.running, len(open_requests))
        return EngineSigns(s.steps, running, prefill_tokens, s.prefill_tokens_per_s)

    async def ping(self) -> None:
        assert self._engine is not None
        try:
            await self._engine.engine_core.call_utility_async("is_sleeping")
        except EngineDeadError as exc:
            raise EngineFailure("the engine died") from exc

    def died(self, callback: Callable[[str], None]) -> None:
        self._on_death = callback

    async def stop(self) -> None:
        for task in (self._watch, self._pace):
            if task is not None:
                task.cancel()
        for forget in self._forget_exits:
            forget()
        if self._broken:
            # what is stopped or stuck would only be waited for
            kill_all([below for p in self._processes for below in (*descendants(p), p)])
        if self._engine is not None:
            if self._engine.output_handler is not None:
                # else it may see the engine gone before it is told to end, and logs that as its
                # death
                self._engine.output_handler.cancel()
            await asyncio.to_thread(self._engine.shutdown, STOP_S)

    # ---- inside ----------------------------------------------------------------------------------

    def _boot(self) -> MovableLLM:
        install()
        start_method = os.environ.get("VLLM_WORKER_MULTIPROC_METHOD")
        config = AsyncEngineArgs.from_cli_args(self._args).create_engine_config(
            UsageContext.OPENAI_API_SERVER
        )
        if current_platform.is_cpu() and config.parallel_config.world_size == 1:
            # Creating the config has set "spawn"; forking saves the engine 6 to 10 s of imports. On
            # GPUs a fork was seen to hang.
            os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = start_method or "fork"
        engine: MovableLLM = MovableLLM.from_vllm_config(
            config, stat_loggers=[Stats], disable_log_stats=True
        )
        if not (
            self._args.enable_per_request_metrics
            or config.observability_config.otlp_traces_endpoint
        ):
            assert Stats.current is not None
            Stats.current.replace_others(engine)
        return engine

    def _progress(self, call: EngineRequest, reply: Reply) -> Progress | None:
        """None: the answer ends with this worker. Beam search does not say its tokens in the order
        of the text.
        """
        movable = call.path in MOVABLE
        if not movable or b'"use_beam_search"' in call.body:
            if call.seen:
                raise CannotContinue("Such an answer cannot be continued.")
            return None
        if not (call.movable or call.seen):
            return None
        chat = getattr(self._app.state, "openai_serving_chat", None)
        parses = call.path == CHAT and chat is not None and chat.parser_cls is not None
        return Progress(call.seen, parses, reply.progress)

    async def _watch_engine(self) -> None:
        assert self._engine is not None
        while not self._engine.errored:  # noqa: ASYNC110 - vLLM has no event for it
            await asyncio.sleep(DEATH_POLL_S)
        self._die("EngineCore failed; its own words are in the log above")

    def _watch_processes(self) -> None:
        """EngineCore and its ranks, one by one: vLLM takes 9 s to notice that a rank was killed."""
        self._processes = [
            p
            for p in descendants()
            if p not in self._earlier and "resource_tracker" not in command_line(p)
        ]
        kills = out_of_memory_kills()

        def ended(pid: int) -> None:
            short = out_of_memory_kills() > kills
            why = ": the machine or container is out of memory" if short else ""
            self._die(f"process {pid} of the engine has ended{why}")

        self._forget_exits = [on_exit(p, functools.partial(ended, p)) for p in self._processes]

    def broken(self) -> None:
        """Whoever stops the engine need not be gentle: it hangs."""
        self._broken = True

    def _die(self, reason: str) -> None:
        self._broken = True
        if self._on_death is not None:
            self._on_death(reason)
            self._on_death = None

    async def _watch_load(self) -> None:
        """How much of a core this thread, which serves all streams, has had of late, and how long
        it was in line for one.
        """
        before, at = _scheduled_s(), time.monotonic()
        while True:
            await asyncio.sleep(LOOK_S)
            (ran, waited), now = _scheduled_s(), time.monotonic()
            took = now - at
            self._pacing.look((ran - before[0]) / took, (waited - before[1]) / took)
            before, at = (ran, waited), now

    async def _warm_up(self) -> None:
        """The first request of each kind compiles kernels inside the step loop, which would stall
        every stream: let it be ours.

        Bounded in time, and nothing that fails here keeps the worker from serving.
        """
        started = time.monotonic()
        try:
            async with asyncio.timeout(WARM_UP_S):
                for extra in WARM_UPS if "generate" in self._tasks else ({},):
                    await self._rehearse(extra, None)
                if self._args.enable_lora:
                    await self._rehearse_adapter()
        except TimeoutError:
            log.warning("warm-up was cut short", extra={"after_s": WARM_UP_S})
        log.info("warmed up", extra={"seconds": round(time.monotonic() - started, 1)})

    async def _rehearse_adapter(self) -> None:
        assert self._adapters is not None
        adapter = Loaded(
            AdapterRef(self._model.model_id, "warm-up", "0"),
            REHEARSAL_ID,
            Path("/nonexistent"),
            1,
            0,
        )
        try:
            await self._adapters.rehearse(adapter)
            await self._rehearse({}, adapter)
            for prompts in self._prefills():
                await asyncio.gather(
                    *(self._rehearse({"prompt": prompt}, adapter) for prompt in prompts)
                )
            await self._adapters.swap(Swap((), (), (adapter,)))
        except EngineFailure as exc:
            log.warning("warm-up without an adapter", extra={"reason": exc.message})

    def _prefills(self) -> list[list[list[int]]]:
        """None on a CPU, whose kernels are compiled already."""
        assert self._engine is not None
        config = self._engine.vllm_config
        if config.device_config.device_type == "cpu":
            return []
        if "generate" not in self._tasks:
            return []
        graphs = config.compilation_config.max_cudagraph_capture_size or 1
        return prefills(
            graphs,
            config.scheduler_config.max_num_batched_tokens,
            config.model_config.max_model_len - WARM_UP_TOKENS,
        )

    async def _rehearse(self, extra: dict[str, Any], adapter: Loaded | None) -> None:
        path, fields = warm_up(self._tasks)
        body = json.dumps({"model": self._model.model_id, **fields, **extra}).encode()
        discard = Discard()
        try:
            await self.serve(EngineRequest(path, "warm-up", body, adapter), discard)
        finally:
            PINNED.set(None)
        if discard.status != 200:
            log.warning(
                "warm-up request was not answered",
                extra={"status": discard.status, "with": list(extra)},
            )


class Discard:
    """A Reply that keeps only the status."""

    def __init__(self) -> None:
        self.prompt_tokens = self.output_tokens = self.status = 0

    def head(self, status: int, sse: bool, data: bytes, end: bool, tokens: bytes = b"") -> None:
        self.status = status

    def more(self, data: bytes, end: bool, tokens: bytes = b"") -> None:
        return None

    def progress(self, tokens: bytes) -> None:
        return None

    def lines(self, lines: bytes) -> None:
        return None


def _scheduled_s() -> tuple[float, float]:
    """Seconds that this thread has been on a core, and in line for one (0 where the kernel does not
    say).
    """
    try:
        ran, waited, _ = Path("/proc/thread-self/schedstat").read_text().split()
    except (OSError, ValueError):
        return time.thread_time(), 0.0
    return int(ran) / 1e9, int(waited) / 1e9


def serve_args(model: LLMConfig) -> Any:
    """The arguments of `vllm serve` for a model config: vLLM's defaults, the config's
    engine_kwargs, and what Loraplex decides.

    Raises:
        ConfigError: vLLM refuses the combination.
    """
    args = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    wanted = {
        "disable_fastapi_docs": True,
        "use_tqdm_on_load": False,
        **model.engine_kwargs,
        "model": model.model_source,
        "served_model_name": [model.model_id],
    }
    if model.uses_lora:
        wanted |= {"enable_lora": True, "max_loras": model.max_loras}
        # vLLM's default (as many as slots) would make every eviction a reload from disk. What is
        # kept is bounded in bytes by residency.
        wanted.setdefault("max_cpu_loras", model.max_loras + HOST_PLACES)
        # of a mixture of experts both forms that PEFT writes
        wanted.setdefault("enable_mixed_moe_lora_format", not wanted.get("enable_moe_shared_loras"))
        wanted.setdefault(
            "worker_extension_cls", "worker.engine.vllm.worker_extension.AdapterSlots"
        )
    if wanted.get("distributed_executor_backend") == "ray":
        del wanted["distributed_executor_backend"]  # `loraplex check` says so
    if (
        model.engine_kwargs.get("tensor_parallel_size", 1)
        * model.engine_kwargs.get("pipeline_parallel_size", 1)
        > 1
    ):
        wanted.setdefault(
            "distributed_executor_backend", "worker.engine.vllm.executor.SafeMultiprocExecutor"
        )
    try:
        for key, value in wanted.items():
            if key in front_end.EVERY or key in NO_LONGER:
                continue
            default: Any = getattr(args, key, None)
            if isinstance(value, dict) and hasattr(default, "__dataclass_fields__"):
                value = dataclasses.replace(default, **value)  # vLLM's app reads its fields
            setattr(args, key, value)
        validate_parsed_serve_args(args)
    except (TypeError, ValueError) as exc:
        raise ConfigError(f"vLLM refuses the engine_kwargs of `{model.model_id}`: {exc}") from exc
    return args
