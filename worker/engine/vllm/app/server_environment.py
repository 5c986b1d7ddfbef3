"""Pure. Environment variables that change vLLM's own HTTP server. Here the gateway takes that
server's place, so a worker removes them from its environment.
"""

from __future__ import annotations

from collections.abc import MutableMapping

from shared.config.vllm_server_arguments import VARIABLES


def remove_variables(environment: MutableMapping[str, str]) -> list[str]:
    """Removes them; returns the names of those that were set."""
    return [name for name in VARIABLES if environment.pop(name, None) is not None]
