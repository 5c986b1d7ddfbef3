"""Shell. The public Python surface, in the shape of `ray.serve.llm`: LLMConfig, build_openai_app,
run.

from gateway import LLMConfig, build_openai_app, run

app = build_openai_app({"llm_configs": [LLMConfig(model_loading_config={"model_id": "qwen",
"model_source": "Qwen/Qwen2.5-0.5B-Instruct"})]}) run(app, blocking=True)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from shared.config.llm import LLMConfig, LoraConfig, ModelLoadingConfig, Settings
from shared.config.yaml import app_from_args

if TYPE_CHECKING:
    from gateway.supervisor.background import Background

__all__ = ["LLMConfig", "LoraConfig", "ModelLoadingConfig", "Settings", "build_openai_app", "run"]


def build_openai_app(llm_serving_args: Mapping[str, Any]) -> Settings:
    """The app for `run`, from `{"llm_configs": [LLMConfig, dict or path, ...], "gateway": {...}}`.

    Raises:
        ConfigError: with everything that is wrong, before anything starts.
    """
    return app_from_args(dict(llm_serving_args))


def run(
    app: Settings, *, blocking: bool = False, name: str = "default", route_prefix: str = "/"
) -> Background | None:
    """Serves the app on this machine: until Ctrl-C if `blocking`, else in the background until the
    returned object's `stop()` or our exit.

    `name` and `route_prefix` are taken for Ray's sake; the API is always at `/v1`.

    Raises:
        ConfigError: it could not start (non-blocking). With `blocking`, SystemExit carries the exit
            status of a failed start.
    """
    if not blocking:
        from gateway.supervisor.background import Background

        return Background.start(app)
    from gateway.cli.main import serve

    status = serve(app)
    if status:
        raise SystemExit(status)
    return None
