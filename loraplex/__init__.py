"""Shell. The public Python surface, in the shape of `ray.serve.llm`.

from loraplex import LLMConfig, build_openai_app, run

app = build_openai_app({"llm_configs": [LLMConfig(model_loading_config={"model_id": "qwen",
"model_source": "Qwen/Qwen2.5-0.5B-Instruct"})]})
run(app, blocking=True)

The names are imported at first use: `loraplex.start`, which every process of ours runs first, then
costs nothing and takes no name away from others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraplex.start import claim

if TYPE_CHECKING:
    from loraplex.surface import build_llm_deployment, build_openai_app, run
    from shared.config.llm import LLMConfig, LoraConfig, ModelLoadingConfig, Settings
    from shared.config.ray_serve import LLMServingArgs

__version__ = "0.1.0"
__all__ = [
    "LLMConfig",
    "LLMServingArgs",
    "LoraConfig",
    "ModelLoadingConfig",
    "Settings",
    "__version__",
    "build_llm_deployment",
    "build_openai_app",
    "run",
]


_NO_ROUTER = "requests come in by the gateway; `run(build_openai_app(...))` starts it"
_NO_SERVER = "there is one kind of worker, and the configuration says what it does"
_NOT_SPLIT = "prefill and decoding are not split over workers; a worker does both"
_REPLICAS = "each worker has a whole engine; set deployment_config.num_replicas for more of them"
_CALLS = "set `accelerator_config` and `engine_kwargs`; there is no Ray initialisation to hook into"
RAY_ONLY = {
    "CallbackBase": _CALLS,
    "CloudMirrorConfig": "write `model_source: {bucket_uri: ...}` as a dict",
    "DPServer": _REPLICAS,
    "LLMRouter": _NO_ROUTER,
    "LLMServer": _NO_SERVER,
    "OpenAiIngress": _NO_ROUTER,
    "VLLMServer": _NO_SERVER,
    "build_dp_deployment": _REPLICAS,
    "build_dp_openai_app": _REPLICAS,
    "build_pd_openai_app": _NOT_SPLIT,
    "make_fastapi_ingress": _NO_ROUTER,
}
"""What `ray.serve.llm` exports and has no counterpart here, and what to do instead."""


def __getattr__(name: str) -> object:
    if name in RAY_ONLY:
        raise ImportError(f"`{name}` of ray.serve.llm is not in loraplex: {RAY_ONLY[name]}")
    if name not in __all__:
        raise AttributeError(f"module `loraplex` has no attribute `{name}`")
    claim("gateway", "shared")
    from loraplex import surface

    value = globals()[name] = getattr(surface, name)  # so that it is asked for once
    return value


def __dir__() -> list[str]:
    """For shells, which complete what it lists."""
    return sorted({*globals(), *__all__})
