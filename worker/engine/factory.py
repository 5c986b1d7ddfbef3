"""Shell. Opens the engine that the config names, with the environment that vLLM reads at import."""

from __future__ import annotations

import logging
import os

from shared.config.llm import LLMConfig
from shared.errors import ConfigError
from shared.runtime.process import count_gpus
from shared.vllm_versions import cannot_import, is_tried, refusal
from worker.engine.base import Engine
from worker.engine.vllm.app.server_environment import remove_variables
from worker.engine.vllm.boot.installed import vllm_version

log = logging.getLogger("loraplex.engine")

# What vLLM reads from the environment at import; the user's own values win.
VLLM_ENV = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "PYTHONWARNINGS": "ignore",  # of vLLM's dependencies, at every import
}


VLLM_CPU_ENV = {
    # the executor runs inside EngineCore: one process and 12 s of boot less
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # binding asserts more NUMA nodes than tensor parallel ranks; OMP_NUM_THREADS is set instead
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # the first request with logprobs would otherwise compile for 3 to 24 s inside the step loop
    "TORCHDYNAMO_DISABLE": "1",
}


VLLM_GPU_ENV = {
    # Memory that a GPU copies from is pinned for each new adapter, and no kernel starts meanwhile:
    # 25 ms for 26 MiB, 3 to 5 ms this way.
    "PYTORCH_CUDA_ALLOC_CONF": "pinned_use_cuda_host_register:True,"
    f"pinned_num_register_threads:{min(8, os.cpu_count() or 1)}",
    # vLLM's own place for them depends on whether this start had to compile: what one start has
    # compiled the next one would not find
    "TRITON_CACHE_DIR": os.path.join(
        os.environ.get("VLLM_CACHE_ROOT") or os.path.expanduser("~/.cache/vllm"), "triton"
    ),
}


DEFAULT_SIM_RANK = 64


DEFAULT_SIM_CONTEXT_TOKENS = 8192


def open_engine(model: LLMConfig, stream_gap_s: float = 0.0, grammar_cpu_s: float = 0.0) -> Engine:
    """The engine that the config names. vLLM is imported only here, and only if the config asks for
    it.
    """
    if model.llm_engine == "sim":
        from worker.engine.sim.engine import SimEngine

        return SimEngine(
            model.model_id,
            model.sim,
            max_loras=model.max_loras,
            max_lora_rank=model.engine_kwargs.get("max_lora_rank", DEFAULT_SIM_RANK),
            max_model_len=model.engine_kwargs.get("max_model_len", DEFAULT_SIM_CONTEXT_TOKENS),
        )
    gpu = model.gpus_per_worker > 0 and count_gpus() > 0
    for name in remove_variables(os.environ):
        log.warning("the environment's %s is for vLLM's own server: it has no effect here", name)
    for key, value in (VLLM_ENV | (VLLM_GPU_ENV if gpu else VLLM_CPU_ENV)).items():
        os.environ.setdefault(key, value)
    try:
        from worker.engine.vllm.engine import VLLMEngine

        return VLLMEngine(model, stream_gap_s, grammar_cpu_s)
    except ImportError as exc:
        raise ConfigError(cannot_import(vllm_version(), exc)) from exc
    except AttributeError as exc:
        version = vllm_version()
        if version is None or is_tried(version):
            raise
        raise ConfigError(refusal(version, exc)) from exc
