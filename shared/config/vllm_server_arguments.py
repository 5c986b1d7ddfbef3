"""Pure. The arguments of `vllm serve` for its own HTTP server and for several servers together,
whose place the gateway takes, and the environment variables for them. An argument is refused if the
user would wrongly rely on it. Otherwise a warning says that it has no effect.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

_TLS = "belongs to vLLM's own HTTP server; set gateway.tls"
_ORIGINS = "belongs to vLLM's own HTTP server; set gateway.allowed_origins"
REFUSED: Mapping[str, str] = {
    "api_key": "belongs to vLLM's own HTTP server: no key would be asked for; set "
    "gateway.api_keys_env or gateway.keys_file",
    "lora_modules": "names adapters that vLLM loads at its start; put their folders into one store "
    "and set lora_config.dynamic_lora_loading_path",
    "middleware": "belongs to vLLM's own HTTP server, which no request passes; put a proxy in "
    "front",
    "allowed_origins": _ORIGINS,
    "allowed_methods": _ORIGINS,
    "allowed_headers": _ORIGINS,
    "allow_credentials": _ORIGINS,
    **dict.fromkeys(
        ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_cert_reqs", "ssl_ciphers"), _TLS
    ),
    "headless": "the gateway starts workers itself; set deployment_config.num_replicas",
    "tokens_only": "clients of this gateway get text; remove it",
    "config": "names a file of vLLM's arguments, which nothing here reads; write them under "
    "engine_kwargs",
    "model_tag": "is set from model_loading_config.model_source; remove it",
    "grpc": "clients of this gateway speak HTTP; remove it",
}
_WATCHED = "the gateway starts workers, and watches and balances them, itself"
IGNORED: Mapping[str, str] = {
    "host": "set gateway.host",
    "port": "set gateway.port",
    "uds": "the gateway listens on gateway.host and gateway.port",
    "root_path": "paths begin at /v1; let a proxy in front take the prefix off",
    "uvicorn_log_level": "set gateway.log_level",
    "disable_uvicorn_access_log": "set gateway.log_level",
    "disable_access_log_for_endpoints": "set gateway.log_level",
    "disable_fastapi_docs": "the gateway's /docs is made from its own table",
    "enable_offline_docs": "the gateway's /docs loads nothing from elsewhere",
    "enable_ssl_refresh": "gateway.tls reads a certificate again when it changes",
    "enable_request_id_headers": "every answer has an x-request-id",
    "enable_server_load_tracking": "see the gateway's /metrics",
    "enable_tokenizer_info_endpoint": "that path is not served",
    "h11_max_header_count": "the gateway reads requests by its own bounds",
    "h11_max_incomplete_event_size": "the gateway reads requests by its own bounds",
    "api_server_count": "set gateway.processes",
    "grpc_port": "there is no gRPC endpoint; requests come by HTTP",
    "enable_scale_out": "those paths are not served",
    "sse_keep_alive_interval": "set gateway.progress_s",
    **dict.fromkeys(
        (
            "data_parallel_address",
            "data_parallel_backend",
            "data_parallel_external_lb",
            "data_parallel_hybrid_lb",
            "data_parallel_multi_port_external_lb",
            "data_parallel_rank",
            "data_parallel_rpc_port",
            "data_parallel_size_local",
            "data_parallel_start_rank",
            "data_parallel_supervisor_port",
            "dp_supervisor_probe_failure_threshold",
            "dp_supervisor_probe_interval_s",
            "dp_supervisor_probe_timeout_s",
        ),
        _WATCHED,
    ),
    **dict.fromkeys(("master_addr", "master_port", "node_rank"), "a worker runs on one machine"),
}
EVERY = frozenset({*REFUSED, *IGNORED})
_API_KEY = "VLLM_API_KEY"
VARIABLES = (
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
    _API_KEY,
    "VLLM_DEBUG_LOG_API_SERVER_RESPONSE",
    "VLLM_ENABLE_COHERE_API",
    "VLLM_ENABLE_RESPONSES_API_STORE",
    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE",
    "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH",
    "VLLM_LORA_RESOLVER_CACHE_DIR",
    "VLLM_LORA_RESOLVER_HF_REPO_LIST",
    "VLLM_RUST_FRONTEND_PATH",
    "VLLM_SERVER_DEV_MODE",
    "VLLM_SKIP_MODEL_NAME_VALIDATION",
    "VLLM_USE_RUST_FRONTEND",
)
"""Variables that a worker takes out of its environment. Some of them would close every path to the
gateway; others would open paths around it.
"""


def variable_warnings(environment: Mapping[str, str], asks_for_keys: bool) -> Iterator[str]:
    """A line for each of them that is set. `asks_for_keys`: the gateway has keys of its own."""
    for name in VARIABLES:
        if name not in environment:
            continue
        if name != _API_KEY:
            yield f"the environment's {name} has no effect here: it is for vLLM's own server"
        elif not asks_for_keys:
            yield (
                f"the environment's {name} has no effect here: no key is asked for; set "
                f"gateway.api_keys_env: {name}"
            )
