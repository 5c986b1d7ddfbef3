"""Pure. What decides in `vllm serve` how its HTTP server is reached and guarded. Here the gateway
does that: these arguments get vLLM's defaults, and these variables leave the environment.
"""

from __future__ import annotations

from collections.abc import MutableMapping

ARGUMENTS = (
    "allow_credentials",
    "allowed_headers",
    "allowed_methods",
    "allowed_origins",
    "api_key",
    "enable_offline_docs",
    "enable_request_id_headers",
    "enable_server_load_tracking",
    "enable_ssl_refresh",
    "enable_tokenizer_info_endpoint",
    "h11_max_header_count",
    "h11_max_incomplete_event_size",
    "headless",
    "host",
    "lora_modules",
    "middleware",
    "port",
    "root_path",
    "ssl_ca_certs",
    "ssl_cert_reqs",
    "ssl_certfile",
    "ssl_ciphers",
    "ssl_keyfile",
    "tokens_only",
    "uds",
    "uvicorn_log_level",
)
"""`loraplex check` names each of them where a config sets it."""
VARIABLES = (
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
    "VLLM_API_KEY",
    "VLLM_DEBUG_LOG_API_SERVER_RESPONSE",
    "VLLM_ENABLE_COHERE_API",
    "VLLM_ENABLE_RESPONSES_API_STORE",
    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE",
    "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH",
    "VLLM_LORA_RESOLVER_CACHE_DIR",
    "VLLM_LORA_RESOLVER_HF_REPO_LIST",
    "VLLM_SERVER_DEV_MODE",
)
"""Of which some would close every path to the gateway, and others open paths around it."""


def remove_variables(environment: MutableMapping[str, str]) -> list[str]:
    """Returns the names of those that were set."""
    return [name for name in VARIABLES if environment.pop(name, None) is not None]
