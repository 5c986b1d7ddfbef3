"""Pure. The arguments of `vllm serve` for its own HTTP server, whose place the gateway takes. An
argument is refused if the user would wrongly rely on it. Otherwise a warning says that it has no
effect.
"""

from __future__ import annotations

from collections.abc import Mapping

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
}
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
}
EVERY = frozenset({*REFUSED, *IGNORED})
