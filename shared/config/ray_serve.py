"""Pure. What surrounds the models in a file: the arguments of `build_openai_app`, and Ray Serve's
keys for applications and for the cluster.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from shared.config.gateway import Port
from shared.config.llm_sections import Text
from shared.config.section import Finding, Section, shown

IMPORT_PATHS = ("ray.serve.llm:build_openai_app", "gateway:build_openai_app")
_EARLIER_PATH = "ray.serve.llm.builders.build_openai_app"
_NO_INGRESS = "the gateway is the ingress; its options are in the gateway section"
_OTHER_TLS = (
    "Loraplex does not read it and would answer in the clear; name the certificate in gateway.tls"
)
_NOT_SPLIT = "prefill and decoding are not split over workers; list the model under llm_configs"
_LOGS = "logs are JSON lines; set gateway.log_level"
_ANYSCALE = (
    "is a key of Anyscale's services; Loraplex runs where you start it, in the environment that it "
    "finds there; remove it"
)


class LLMServingArgs(Section, frozen=True, kw_only=True):
    """The argument of `build_openai_app`: the models, each an LLMConfig, a mapping or the path of a
    file with one, and the gateway's section.
    """

    IGNORED: ClassVar[Mapping[str, str]] = {
        "ingress_cls_config": _NO_INGRESS,
        "ingress_deployment_config": _NO_INGRESS,
    }
    REFUSED: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(
            (
                "model_loading_config",
                "lora_config",
                "engine_kwargs",
                "deployment_config",
                "llm_engine",
            ),
            "belongs to one model; list the model under llm_configs",
        ),
        "prefill_config": _NOT_SPLIT,
        "decode_config": _NOT_SPLIT,
    }

    llm_configs: Any = None
    gateway: Any = None
    ingress_cls_config: Any = None
    ingress_deployment_config: Any = None


class HttpOptions(Section, frozen=True, kw_only=True):
    """Ray's `http_options`. Its address is used unless the gateway section names another."""

    IGNORED: ClassVar[Mapping[str, str]] = {
        "location": "there is one gateway, where you start it",
        "num_cpus": "set gateway.processes",
        "middlewares": "put a proxy in front",
        "root_url": "paths begin at /v1",
        "root_path": "paths begin at /v1",
        "request_timeout_s": "set gateway.request_timeout_s",
        "keep_alive_timeout_s": "the gateway keeps connections open by its own rule",
    }
    REFUSED: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("ssl_keyfile", "ssl_certfile", "ssl_keyfile_password", "ssl_ca_certs"), _OTHER_TLS
    )

    host: Text | None = None
    port: Port | None = None
    location: Any = None
    num_cpus: Any = None
    middlewares: Any = None
    root_url: Any = None
    root_path: Any = None
    request_timeout_s: Any = None
    keep_alive_timeout_s: Any = None


class Application(Section, frozen=True, kw_only=True):
    """One entry of Ray's `applications`."""

    IGNORED: ClassVar[Mapping[str, str]] = {
        "route_prefix": "paths begin at /v1; let a proxy in front add a prefix",
        "runtime_env": "workers run in the environment of `loraplex`; install packages and export "
        "variables before starting it",
        "host": "set gateway.host",
        "port": "set gateway.port",
        "deployments": "each model's deployment_config is what counts",
        "autoscaling_policy": "each model's deployment_config.autoscaling_config is what counts",
        "external_scaler_enabled": (
            "each model's deployment_config.autoscaling_config is what counts"
        ),
        "logging_config": _LOGS,
    }

    args: Any = None
    import_path: str | None = None
    name: Any = None
    route_prefix: Any = None
    runtime_env: Any = None
    host: Any = None
    port: Any = None
    deployments: Any = None
    autoscaling_policy: Any = None
    external_scaler_enabled: Any = None
    logging_config: Any = None

    @classmethod
    def prepare(cls, given: dict[str, Any]) -> dict[str, Any]:
        # this value is the default, so it needs no warning
        return {key: value for key, value in given.items() if (key, value) != ("route_prefix", "/")}

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> Iterator[Finding]:
        path = values.get("import_path")
        if path is not None and path.replace(":", ".") not in {
            _EARLIER_PATH,
            *(known.replace(":", ".") for known in IMPORT_PATHS),
        }:
            yield Finding(
                ("import_path",),
                f"{shown(path)} cannot be run here; Loraplex builds "
                f"{' or '.join(IMPORT_PATHS)} only",
            )


class ConfigFile(LLMServingArgs, frozen=True, kw_only=True):
    """The top level of a file: `llm_configs` directly, or Ray's `applications`. Ray's options for
    the whole cluster may stand beside them.
    """

    IGNORED: ClassVar[Mapping[str, str]] = {
        **LLMServingArgs.IGNORED,
        "proxy_location": "the gateway runs where you start it",
        "grpc_options": "there is no gRPC endpoint; requests come by HTTP",
        "controller_options": "there is no controller",
        "logging_config": _LOGS,
        "tracing_config": "set gateway.traces",
        "target_capacity": "all workers are started",
    }
    REFUSED: ClassVar[Mapping[str, str]] = {
        **LLMServingArgs.REFUSED,
        **dict.fromkeys(
            (
                *("name", "cloud", "project", "tags", "compute_config", "working_dir", "excludes"),
                *("image_uri", "containerfile", "registry_login_secret", "ray_version"),
                *("requirements", "py_modules", "py_executable", "env_vars"),
                *("query_auth_token_enabled", "ray_gcs_external_storage_config"),
            ),
            _ANYSCALE,
        ),
    }

    applications: Any = None
    http_options: HttpOptions | None = None
    proxy_location: Any = None
    grpc_options: Any = None
    controller_options: Any = None
    logging_config: Any = None
    tracing_config: Any = None
    target_capacity: Any = None
