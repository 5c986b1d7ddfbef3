"""Shell. The model class that vLLM would build for a config, built without weights. It tells what
adapters may change in the model where no engine runs.

It needs `config.json` only. Nothing is allocated and no GPU is touched. The time goes into
importing vLLM.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from shared.config.llm import LLMConfig
from worker.engine.vllm.lora import layers as lora_layers
from worker.engine.vllm.lora.layers import LayerTable

# One process stands for all ranks; names and shapes are the same.
_ALONE = {
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "data_parallel_size": 1,
    "enable_expert_parallel": False,
    "distributed_executor_backend": "uni",
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "max_model_len": None,
    "worker_extension_cls": "",
}


def offline_layers(model: LLMConfig) -> LayerTable:
    """The layers of the model. Raises whatever vLLM raises for a model that it cannot build."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        destroy_distributed_environment,
        destroy_model_parallel,
        init_distributed_environment,
        initialize_model_parallel,
    )
    from vllm.engine.arg_utils import AsyncEngineArgs

    _import_here()
    from vllm.model_executor.model_loader.utils import initialize_model

    from worker.engine.vllm.arguments import serve_args

    args = serve_args(model)
    for key, value in _ALONE.items():
        setattr(args, key, value)
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    handle, rendezvous = tempfile.mkstemp(prefix="loraplex-validate-")
    os.close(handle)
    try:
        with set_current_vllm_config(config):
            init_distributed_environment(1, 0, f"file://{rendezvous}", 0, backend="gloo")
            initialize_model_parallel(1, 1)
            with torch.device("meta"), _default_dtype(config.model_config.dtype):
                built = initialize_model(vllm_config=config)
            return _table(built, config.lora_config)
    finally:
        destroy_model_parallel()
        destroy_distributed_environment()
        Path(rendezvous).unlink(missing_ok=True)


def _import_here() -> None:
    """Makes vLLM import the model's class in this process. By default vLLM imports it in another
    process first, which takes as long once more.
    """
    if importlib.util.find_spec("torchvision") is None:
        sys.meta_path.append(_AbsentModules())
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda look: look()


class _AbsentModules(MetaPathFinder, Loader):
    """Stand-ins for torchvision, without which vLLM cannot import its vision models. They have
    names and no code. Only the names of layers are wanted here, so nothing is computed.
    """

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        own = name.partition(".")[0] == "torchvision"
        return ModuleSpec(name, self, is_package=True) if own else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Names(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        return None


class _Names(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


@contextmanager
def _default_dtype(dtype: Any) -> Iterator[None]:
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _table(model: Any, lora: Any) -> LayerTable:
    """What LoRAModelManager._create_lora_modules would register, without its buffers."""
    from vllm.lora.utils import (
        get_supported_lora_modules,
        is_in_target_modules,
        is_moe_model,
        is_supported_lora_module,
        process_packed_modules_mapping,
    )

    moe = is_moe_model(model)
    mixed = moe and lora.enable_mixed_moe_lora_format
    only_fused = moe and model.is_3d_moe_weight and not mixed and not lora.enable_moe_shared_loras
    supported = get_supported_lora_modules(model)
    packed = process_packed_modules_mapping(
        model, force_2d_moe=mixed, enable_moe_shared_loras=lora.enable_moe_shared_loras
    )
    served = _served_parts(model, lora)
    layers, seen = {}, set()
    for name, layer in model.named_modules(remove_duplicate=False):
        if (
            is_supported_lora_module(name, layer, supported)
            and is_in_target_modules(name, lora.target_modules, packed)
            and name.startswith(served)
            and not (moe and model.is_non_gated_moe and name.endswith("mixer.gate"))
            and (id(layer) not in seen or "lm_head" in name)
        ):
            seen.add(id(layer))
            layers[name] = layer
    return lora_layers.table(
        model, layers, packed, fused_experts=only_fused or mixed, split_experts=not only_fused
    )


def _served_parts(model: Any, lora: Any) -> tuple[str, ...]:
    """The prefixes of names that vLLM has a LoRA context for. For a multi-modal model that is the
    text part, unless vLLM is told otherwise.
    """
    from vllm.model_executor.models import supports_multimodal

    if not supports_multimodal(model) or not hasattr(model, "get_mm_mapping"):
        return ("",)
    parts = model.get_mm_mapping()
    if lora.enable_tower_connector_lora and model.supports_tower_connector_lora:
        return tuple(parts.language_model + parts.tower_model + parts.connector)
    return tuple(parts.language_model)
