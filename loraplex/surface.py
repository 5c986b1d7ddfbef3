"""Shell. What `from loraplex import ...` gives: the configuration classes of `ray.serve.llm`, and
`run`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gateway.supervisor.background import Background
from shared.config.llm import LLMConfig, LoraConfig, ModelLoadingConfig, Settings
from shared.config.settings_file import app_from_args

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
    returned object's `stop()` or the end of this process.

    `name` and `route_prefix` are accepted because Ray has them; the API is always at `/v1`.

    Raises:
        ConfigError: it could not start (non-blocking). With `blocking`, SystemExit carries the exit
            status of a failed start.
    """
    if not blocking:
        return Background.start(app)
    from gateway.cli.main import serve

    status = serve(app)
    if status:
        raise SystemExit(status)
    return None
