"""Shell. What is served: the model, its adapters and the engine's settings, written to a folder
once.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gateways.growth import write_adapters
from bench.routing.sim.timing import Timing

MODEL, PAIR = "m", "pair"
"""The model of the single workers, and the one of the worker with tensor parallel 2."""
PAIR_ARGUMENTS: dict[str, Any] = {
    "tensor_parallel_size": 2,
    "disable_custom_all_reduce": True,
    "compilation_config": {"pass_config": {"fuse_allreduce_rms": False}},
}
PAIR_ENV = {
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
}
"""The pair talks through plain NCCL: everything faster may allocate NVLink multicast, which in
virtual machines is missing, or shared with others.
"""
SIM_PROMPT_TOKENS = 128
VLLM_PROMPT_WORDS = 100  # about 128 tokens with the template


@dataclass(frozen=True, slots=True)
class Served:
    """`entries` are what `llm_configs` says of MODEL and of PAIR; `facts` what the results say
    about it.
    """

    engine: str
    entries: dict[str, dict[str, Any]]
    adapters: tuple[str, ...]
    prompt_words: int
    facts: dict[str, Any]

    def config(self, gateway: dict[str, Any]) -> str:
        """JSON is YAML."""
        return json.dumps({"llm_configs": list(self.entries.values()), "gateway": gateway})


def simulated(work: Path, adapters: int, slots: int, slow: float, sequences: int) -> Served:
    """The simulated engine with an H200's times for `sequences` running ones, all stretched by
    `slow`.
    """
    root = work / f"sim-adapters-{adapters}"
    if not root.exists():
        root.mkdir(parents=True)
        write_adapters(root, adapters)
    h200 = Timing()
    sim = {
        "itl_ms": h200.step_s(sequences) * 1e3 * slow,
        "ttft_ms": (h200.outside_s + h200.mixed_s) * 1e3 * slow,
        "prefill_tokens_per_s": h200.prefill_tokens_per_s / slow,
        # the files are small: 26 MiB for each adapter are in this figure
        "load_ms": h200.load_s * 1e3 * slow,
        "load_ms_per_mb": 0.0,
        "max_num_seqs": sequences,
    }

    def entry(name: str) -> dict[str, Any]:
        return {
            "model_loading_config": {"model_id": name},
            "llm_engine": "sim",
            "lora_config": {
                "dynamic_lora_loading_path": str(root),
                "max_num_adapters_per_replica": slots,
            },
            "engine_kwargs": {"max_loras": slots, "sim": sim},
        }

    facts = {
        "engine": "sim",
        "slow": slow,
        "sim": sim,
        "model": "none",
        "adapters": adapters,
        "slots": slots,
    }
    return Served(
        "sim", {name: entry(name) for name in (MODEL, PAIR)}, _names(root), SIM_PROMPT_TOKENS, facts
    )


def real(work: Path, adapters: int, slots: int, shape: str, sharing: int = 1) -> Served:
    """vLLM with dummy weights in a known shape, as in bench.gpu. `sharing` workers are on one
    GPU.
    """
    from bench.engine.gpu_servers import (
        RANK,
        engine_arguments,
        gpu,
        make_adapters,
        make_model,
        shared_gpu,
    )

    model, root = work / f"model-{shape}", work / shape / f"adapters-{adapters}"
    if not (model / "config.json").exists():
        make_model(model, shape)
    if not root.exists():
        make_adapters(root, adapters, shape, cold=0)
    arguments = engine_arguments(shape, slots, defaults=False)
    if sharing > 1:
        arguments |= shared_gpu(gpu()[1], None, sharing)

    def entry(name: str, more: dict[str, Any]) -> dict[str, Any]:
        return {
            "model_loading_config": {"model_id": name, "model_source": str(model)},
            "lora_config": {
                "dynamic_lora_loading_path": str(root),
                "max_num_adapters_per_replica": slots,
            },
            "engine_kwargs": arguments | more,
        }

    facts = {
        "engine": "vllm",
        "model": shape,
        "adapters": adapters,
        "rank": RANK,
        "slots": slots,
        "engine_arguments": arguments,
    }
    entries = {MODEL: entry(MODEL, {}), PAIR: entry(PAIR, PAIR_ARGUMENTS)}
    return Served("vllm", entries, _names(root), VLLM_PROMPT_WORDS, facts)


def _names(root: Path) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in root.iterdir() if path.is_dir()))
