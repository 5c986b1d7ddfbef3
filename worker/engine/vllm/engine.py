"""Shell. vLLM as an engine: AsyncLLM behind vLLM's own OpenAI app, which is called in this process
without HTTP.

vLLM's serving layer does chat templates, sampling parameters, stop strings, logprobs and rendering.
Requests reach it through an ASGI scope that this module makes, and its bytes go to the Reply as
they come. This module adds control over adapters. A context variable (PINNED) says which version of
an adapter a request sees. So one public name may stand for different weights in requests that run
at the same time. Adapters are loaded and removed only by explicit calls, never while a request is
being read: in vLLM 0.32 such a load kills the engine if it fails.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.tasks import POOLING_TASKS
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.version import __version__ as vllm_version

from loraplex.start import WORKER_PID_ENV
from shared import vllm_versions
from shared.adapters.identity import AdapterRef
from shared.api_endpoints import RESPONSES_PATH
from shared.config.llm import LLMConfig
from shared.errors import CannotContinue, EngineFailure, LoraplexError
from shared.runtime import garbage
from shared.runtime.parent_death import die_with_parent
from worker.engine.base import (
    EngineFacts,
    EngineRequest,
    EngineStats,
    Loaded,
    Reply,
    Storing,
    Swap,
    Swapped,
)
from worker.engine.hang_detection import EngineSigns
from worker.engine.vllm import logprobs, patches
from worker.engine.vllm.adapters.front_end import Adapters, lora_request
from worker.engine.vllm.adapters.prepare_link import PrepareLink
from worker.engine.vllm.app import (
    embedding_forms,
    first_errors,
    large_bodies,
    pooling_batches,
    speech_usage,
)
from worker.engine.vllm.app.bridge import AppBridge
from worker.engine.vllm.app.large_bodies import a_turn_for
from worker.engine.vllm.arguments import serve_args
from worker.engine.vllm.boot.engine_warm_up import Rehearsal
from worker.engine.vllm.boot.stages import BootStages, boot_stages, failure_of, took_s
from worker.engine.vllm.engine_processes import EngineProcesses
from worker.engine.vllm.fast_path import FastServing
from worker.engine.vllm.grammars.metering import TOKEN_CPU_ENV
from worker.engine.vllm.resume import long_prompts
from worker.engine.vllm.resume.answer_ids import ANSWER_IDS, AnswerIds
from worker.engine.vllm.resume.answer_progress import Progress
from worker.engine.vllm.resume.resumable_llm import CREATED, PROGRESS, ResumableLLM, install
from worker.engine.vllm.step_stats import StepStats
from worker.engine.vllm.tenants import install as tenants
from worker.engine.vllm.tenants.cache_salt import CACHE_SALT
from worker.engine.vllm.tenants.own_requests import OWN
from worker.engine.vllm.write_interval import LOOK_S, WriteInterval

log = logging.getLogger("loraplex.vllm")

DEATH_POLL_S = 0.2
STOP_S = 5.0
CHATS = frozenset({"/v1/chat/completions", "/v1/messages"})
"""Paths whose answers go through vLLM's chat serving and its parsers."""
SPEECH = frozenset({"/v1/audio/transcriptions", "/v1/audio/translations"})
MOVABLE = CHATS | SPEECH | {"/v1/completions", RESPONSES_PATH}
"""Paths whose answers another worker can continue."""

PINNED: ContextVar[LoRARequest | None] = ContextVar("pinned_adapter", default=None)
ASKED: ContextVar[str] = ContextVar("asked_model", default="")


class PinnedAdapters(dict[str, LoRARequest]):
    """Takes the place of vLLM's table of adapters. It answers from the request's own context: with
    the version that was resolved for the request, or with none.
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


class VLLMEngine:
    """AsyncLLM for one model config. Its EngineCore is a child process that dies with this one.
    `stream_gap_s` is the longest gap between two events of a stream while the CPU is short.
    `grammar_cpu_s` is the CPU time that a grammar may take for each token (0: no bound).
    """

    def __init__(
        self, model: LLMConfig, stream_gap_s: float = 0.0, grammar_cpu_s: float = 0.0
    ) -> None:
        self._model = model
        self._pacing = WriteInterval(stream_gap_s)
        # Processes that vLLM spawns get both through its plugin hook. Forked ones would not: vLLM
        # remembers there that the hook has run.
        os.environ[WORKER_PID_ENV] = str(os.getpid())
        os.environ[TOKEN_CPU_ENV] = str(grammar_cpu_s)
        patches.apply()
        os.register_at_fork(after_in_child=lambda: die_with_parent(signal.SIGKILL))
        self._args = serve_args(model)
        self._engine: ResumableLLM | None = None
        self._app: Any = None
        self._tasks: tuple[str, ...] = ()
        self._bridge: AppBridge | None = None
        self.fast: FastServing | None = None
        self._on_death: Callable[[str], None] | None = None
        self._adapters: Adapters | None = None
        self._link: PrepareLink | None = None
        self._watch: asyncio.Task[None] | None = None
        self._pace: asyncio.Task[None] | None = None
        self._processes = EngineProcesses()
        self._broken = False
        self._stage = "loading the model"
        self._boot_stages: BootStages | None = None  # while vLLM boots
        self._boot_failure = ""
        # The kernel's parent-death signal belongs to the thread that forked. This thread lives as
        # long as the process.
        self._boot_thread = ThreadPoolExecutor(1, thread_name_prefix="engine-boot")

    async def start(self) -> EngineFacts:
        """Boots the engine in a thread. Raises ConfigError or EngineFailure with vLLM's
        own words.
        """
        if vllm_versions.is_tried(vllm_version):
            return await self._start()
        log.warning(vllm_versions.warning(vllm_version))
        try:
            return await self._start()
        except Exception as exc:  # whatever another vLLM raises where it has changed
            why = exc.message if isinstance(exc, LoraplexError) else f"{type(exc).__name__}: {exc}"
            raise EngineFailure(vllm_versions.refusal(vllm_version, why)) from exc

    async def _start(self) -> EngineFacts:
        self._processes.boot()
        try:
            link = self._link = PrepareLink()
            self._engine = await self._booted()
        except Exception as exc:
            # vLLM raises whatever its model, platform or kernels raise. All of it means that it did
            # not start.
            said = self._boot_failure or f"{type(exc).__name__}: {exc}"
            raise EngineFailure(f"vLLM did not start: {said}") from exc
        engine = self._engine
        assert engine is not None
        tenants.install(engine, self._args.allowed_media_domains)
        self._stage = "making the server"
        ranks = engine.vllm_config.parallel_config.world_size
        self._adapters = Adapters(engine, link, ranks)
        supported = tuple(await engine.get_supported_tasks())
        # What a model's pooler could do is more than what it is configured for.
        only = engine.model_config.get_pooling_task(supported)
        self._tasks = tuple(it for it in supported if it not in POOLING_TASKS or it == only)
        await self._build_app(engine, supported)
        config, adapters = engine.vllm_config, self._adapters
        self._stage = "warming up"
        await Rehearsal(
            self._model.model_id, config, self._tasks, adapters, self._serve_alone
        ).run()
        self._watch = asyncio.create_task(self._watch_engine(), name="engine-watch")
        self._processes.watch(self._die)
        # With any other logger vLLM keeps the statistics itself, and no step is reported here.
        if StepStats.current is not None and engine.logger_manager is StepStats.current:
            StepStats.current.pacing = self._pacing
            self._pace = asyncio.create_task(self._watch_load(), name="pace")
        return await self._facts(config, adapters)

    @property
    def stage(self) -> str:
        stages = self._boot_stages.read() if self._boot_stages is not None else []
        return stages[-1].words if stages else self._stage

    async def _booted(self) -> ResumableLLM:
        """vLLM's engine, once it has started. How long each stage took is logged."""
        loop = asyncio.get_running_loop()
        with boot_stages() as self._boot_stages:
            try:
                engine = await loop.run_in_executor(self._boot_thread, self._boot)
            finally:
                stages = self._boot_stages.read()
                self._boot_failure = failure_of(stages)
        self._boot_stages = None
        kv_tokens = max((stage.kv_tokens for stage in stages), default=0)
        took = took_s(stages, time.monotonic())
        log.info("vLLM has started", extra={"kv_tokens": kv_tokens, "seconds": took})
        return engine

    async def _build_app(self, engine: ResumableLLM, supported: tuple[str, ...]) -> None:
        """Builds vLLM's own app for this engine, with adapters by version."""
        embedding_forms.install()
        large_bodies.install()
        speech_usage.install()
        if "generate" not in self._tasks:
            pooling_batches.install()
        self._app = build_app(self._args, supported, engine.model_config)
        first_errors.install(self._app)
        await init_app_state(engine, self._app.state, self._args, supported)
        # vLLM's error handler sets this where uvicorn would be told to end.
        self._app.state.server = SimpleNamespace(should_exit=False)
        logprobs.render_beside_the_loop(self._app.state)
        models = self._app.state.openai_serving_models
        base = self._model.model_id
        models.lora_requests = PinnedAdapters()
        models.model_name = lambda lora=None: (
            ASKED.get() or (lora.lora_name.rpartition("@")[0] if lora else base)
        )
        self.fast = FastServing(engine, self._app.state, self._args, self._pacing)
        arguments = frozenset(vars(self._args))
        self._bridge = AppBridge(
            self._app, base, self._tasks, arguments, lambda: bool(engine.errored)
        )

    async def _facts(self, config: Any, adapters: Adapters) -> EngineFacts:
        facts = EngineFacts(
            "vllm",
            config.scheduler_config.max_num_seqs,
            0,
            0,
            tasks=self._tasks,
            max_model_len=config.model_config.max_model_len,
        )
        lora = config.lora_config
        if lora is None:
            return facts
        return replace(
            facts,
            slots=lora.max_loras,
            max_lora_rank=lora.max_lora_rank,
            host_places=lora.max_cpu_loras or lora.max_loras,
            layers=await adapters.layers(),
        )

    async def _serve_alone(self, call: EngineRequest, reply: Reply) -> None:
        """Like `serve`, for a caller whose task goes on: its context is unpinned at the end."""
        try:
            await self.serve(call, reply)
        finally:
            PINNED.set(None)

    async def serve(self, call: EngineRequest, reply: Reply) -> None:
        # Only this call sees these values, because each call runs in a task of its own.
        PINNED.set(lora_request(call.adapter) if call.adapter else None)
        ASKED.set(call.model)
        CREATED.set(call.created)
        CACHE_SALT.set(call.cache_salt)
        PROGRESS.set(None)
        OWN.set(set())
        ANSWER_IDS.set(AnswerIds(call.answer_id) if call.answer_id else None)
        # The message, the fast path and the app each read a large body. Each gets a turn for it.
        await a_turn_for(call.body)
        if self.fast is not None and await self.fast.serve(call, reply):
            return
        progress = self._progress(call, reply)
        PROGRESS.set(progress)
        assert self._bridge is not None
        with garbage.request():
            await self._bridge.serve(call, reply, progress)

    def read_ahead(self, ref: AdapterRef, int_id: int, folder: Path) -> None:
        assert self._adapters is not None
        self._adapters.read_ahead(ref, int_id, folder)

    def forget(self, int_id: int) -> None:
        assert self._adapters is not None
        self._adapters.forget(int_id)

    async def prepare(self, adapter: Loaded) -> None:
        assert self._adapters is not None
        await self._adapters.prepare(adapter)

    async def swap(self, swap: Swap) -> Swapped:
        assert self._adapters is not None
        return await self._adapters.swap(swap)

    def stores(self, answer_id: str) -> Storing:
        return Storing.NOT if self._bridge is None else self._bridge.stores(answer_id)

    def copies(self) -> Iterator[tuple[str, bytes]]:
        return iter(()) if self._bridge is None else self._bridge.copies()

    def keep_copy(self, answer_id: str, copy: bytes) -> None:
        if self._bridge is not None:
            self._bridge.keep_copy(answer_id, copy)

    def stats(self) -> EngineStats:
        s = StepStats.current
        if s is None:
            return EngineStats()
        return EngineStats(
            s.running, s.waiting, s.kv_usage, s.rates.prefill_tokens_per_s, s.rates.step_s
        )

    def signs(self) -> EngineSigns:
        s = StepStats.current
        if s is None or self._engine is None:
            return EngineSigns()
        # The requests that the front end still waits for. Once requests were given back, no step
        # tells that they are gone.
        open_requests = list(self._engine.output_processor.request_states.values())
        prefill_tokens = sum(r.prompt_len for r in open_requests if r.is_prefilling)
        running = min(s.running, len(open_requests))
        return EngineSigns(s.steps, running, prefill_tokens, s.rates.prefill_tokens_per_s)

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
        self._processes.unwatch()
        if self._link is not None:
            self._link.close()
        if self._broken:
            self._processes.kill()  # a stopped or stuck process would only be waited for
        if self._engine is not None:
            if self._engine.output_handler is not None:
                # Otherwise it may see that the engine is gone before it is told to end, and log
                # that as a death.
                self._engine.output_handler.cancel()
            await asyncio.to_thread(self._engine.shutdown, STOP_S)

    # ---- inside ----------------------------------------------------------------------------------

    def _boot(self) -> ResumableLLM:
        install()
        logprobs.install()
        long_prompts.install()
        start_method = os.environ.get("VLLM_WORKER_MULTIPROC_METHOD")
        config = AsyncEngineArgs.from_cli_args(self._args).create_engine_config(
            UsageContext.OPENAI_API_SERVER
        )
        # Creating the config may have set "spawn". A fork saves the engine's process its imports:
        # 6 to 10 s on a CPU host, 32 s on a host with an H200. vLLM spawns all the same once this
        # process has used CUDA. Several ranks on GPUs have run as spawned processes alone.
        alone = config.parallel_config.world_size == 1
        if alone or not current_platform.is_cpu():
            usual = "fork" if alone else "spawn"
            os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = start_method or usual
        engine: ResumableLLM = ResumableLLM.from_vllm_config(
            config, stat_loggers=[StepStats], disable_log_stats=True
        )
        if not (
            self._args.enable_per_request_metrics
            or config.observability_config.otlp_traces_endpoint
        ):
            assert StepStats.current is not None
            StepStats.current.replace_others(engine)
        return engine

    def _progress(self, call: EngineRequest, reply: Reply) -> Progress | None:
        """None if the answer cannot go on on another worker. Beam search is such a case: it does
        not report its tokens in the order of the text. So are tools that vLLM itself calls in the
        middle of a response: it would call them again.
        """
        responses = getattr(self._app.state, "openai_serving_responses", None)
        calls_tools = call.path == RESPONSES_PATH and getattr(responses, "tool_server", None)
        if call.path not in MOVABLE or calls_tools or b'"use_beam_search"' in call.body:
            if call.seen:
                raise CannotContinue("Such an answer cannot be continued.")
            return None
        if not (call.movable or call.seen):
            return None
        chat = getattr(self._app.state, "openai_serving_chat", None)
        parses = call.path in CHATS and chat is not None and chat.parser_cls is not None
        parses = parses or call.path == RESPONSES_PATH  # its events are numbered
        return Progress(call.seen, parses, reply.progress, in_turn=call.path in SPEECH)

    async def _watch_engine(self) -> None:
        assert self._engine is not None
        while not self._engine.errored:  # noqa: ASYNC110 - vLLM has no event for it
            await asyncio.sleep(DEATH_POLL_S)
        self._die("EngineCore failed; its own words are in the log above")

    def broken(self) -> None:
        """The engine hangs: `stop` kills it at once."""
        self._broken = True

    def _die(self, reason: str) -> None:
        self._broken = True
        if self._on_death is not None:
            self._on_death(reason)
            self._on_death = None

    async def _watch_load(self) -> None:
        """Measures what this thread, which serves all streams, gets of the CPU: the share of time
        that it ran on a core, and the share that it waited for one.
        """
        before, at = _scheduled_s(), time.monotonic()
        while True:
            await asyncio.sleep(LOOK_S)
            (ran, waited), now = _scheduled_s(), time.monotonic()
            took = now - at
            self._pacing.look((ran - before[0]) / took, (waited - before[1]) / took)
            before, at = (ran, waited), now


def _scheduled_s() -> tuple[float, float]:
    """Seconds that this thread has run on a core, and has waited for one (0 if the kernel does not
    say).
    """
    try:
        ran, waited, _ = Path("/proc/thread-self/schedstat").read_text().split()
    except (OSError, ValueError):
        return time.thread_time(), 0.0
    return int(ran) / 1e9, int(waited) / 1e9
