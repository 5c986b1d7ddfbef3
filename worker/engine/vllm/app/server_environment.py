"""Pure. Environment variables that change vLLM's own HTTP server. Here the gateway takes that
server's place, so a worker removes them from its environment.
"""

from __future__ import annotations

from collections.abc import MutableMapping

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
"""Some of these would close every path to the gateway; others would open paths around it."""


def remove_variables(environment: MutableMapping[str, str]) -> list[str]:
    """Removes them; returns the names of those that were set."""
    return [name for name in VARIABLES if environment.pop(name, None) is not None]
