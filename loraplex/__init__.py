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
    from loraplex.surface import build_openai_app, run
    from shared.config.llm import LLMConfig, LoraConfig, ModelLoadingConfig, Settings

__version__ = "0.1.0"
__all__ = [
    "LLMConfig",
    "LoraConfig",
    "ModelLoadingConfig",
    "Settings",
    "__version__",
    "build_openai_app",
    "run",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module `loraplex` has no attribute `{name}`")
    claim("gateway", "shared")
    from loraplex import surface

    return getattr(surface, name)
