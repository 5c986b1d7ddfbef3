"""Shell. What `from loraplex import ...` gives: the configuration classes of `ray.serve.llm`, and
`run`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gateway.supervisor.background_server import BackgroundServer
from shared.config.llm import LLMConfig, LoraConfig, ModelLoadingConfig, Settings
from shared.config.ray_serve import LLMServingArgs
from shared.config.settings_file import app_from_args
from shared.errors import ConfigError

__all__ = [
    "LLMConfig",
    "LLMServingArgs",
    "LoraConfig",
    "ModelLoadingConfig",
    "Settings",
    "build_llm_deployment",
    "build_openai_app",
    "run",
]


def build_openai_app(llm_serving_args: LLMServingArgs | Mapping[str, Any]) -> Settings:
    """The app for `run`, from `{"llm_configs": [LLMConfig, dict or path, ...], "gateway": {...}}`.

    Raises:
        ConfigError: with everything that is wrong, before anything starts.
    """
    if isinstance(llm_serving_args, LLMServingArgs):
        return app_from_args(llm_serving_args)
    if not isinstance(llm_serving_args, Mapping):
        raise ConfigError(
            "build_openai_app: expected LLMServingArgs or a dict with `llm_configs`, got a "
            f"{type(llm_serving_args).__name__}"
        )
    return app_from_args(dict(llm_serving_args))


def build_llm_deployment(
    llm_config: LLMConfig | Mapping[str, Any],
    *,
    name_prefix: str | None = None,
    bind_kwargs: Mapping[str, Any] | None = None,
    override_serve_options: Mapping[str, Any] | None = None,
    deployment_cls: object = None,
) -> Settings:
    """The app for `run` of one model. Ray's has no HTTP and is called by a handle; this one has the
    same endpoint as every other.

    `override_serve_options` are those of the model's `deployment_config`. The other arguments have
    no effect: there is one kind of worker, and it is named by the gateway.

    Raises:
        ConfigError: with everything that is wrong, before anything starts.
    """
    del name_prefix, bind_kwargs, deployment_cls
    config = LLMConfig.model_validate(llm_config)
    if override_serve_options:
        changed = config.deployment_config.model_dump() | dict(override_serve_options)
        config = config.model_copy(update={"deployment_config": changed})
    return app_from_args({"llm_configs": [config]})


def run(
    app: Settings, *, blocking: bool = False, name: str = "default", route_prefix: str = "/"
) -> BackgroundServer | None:
    """Serves the app on this machine: until Ctrl-C if `blocking`, else in the background until the
    returned object's `stop()` or the end of this process.

    `name` and `route_prefix` are accepted because Ray has them; the API is always at `/v1`.

    Raises:
        ConfigError: it could not start (non-blocking). With `blocking`, SystemExit carries the exit
            status of a failed start.
    """
    if not blocking:
        return BackgroundServer.start(app)
    from gateway.cli.main import serve

    status = serve(app)
    if status:
        raise SystemExit(status)
    return None
