"""Shell. Tenants that share an engine, but not its prefix cache. Else a tenant could tell from the
time of its first token whether another one has sent a prompt with the same beginning.

vLLM makes a request's salt a part of its first block's hash, and each block's hash is a part of the
next one's. The client's own salt stays in force within its tenant's.
"""

from __future__ import annotations

from contextvars import ContextVar
from hashlib import sha256
from typing import Any

from vllm.v1.engine.async_llm import AsyncLLM

CACHE_SALT: ContextVar[str] = ContextVar("cache_salt", default="")
"""That of the request whose context it is. Empty: the client's own, if it has one."""


def keep_apart(llm: AsyncLLM) -> None:
    """Called once for each engine. All requests reach it by the one function that is replaced."""
    send = llm.engine_core.add_request_async

    async def send_salted(request: Any) -> None:
        tenant = CACHE_SALT.get()
        if tenant:
            request.cache_salt = salt_of(tenant, request.cache_salt or "")
        await send(request)

    llm.engine_core.add_request_async = send_salted


def salt_of(tenant: str, own: str) -> str:
    """A salt that no other tenant can name, and that is none of another tenant's. vLLM's stores of
    cached blocks outside of the GPU use it as a part of their keys: so it is short and plain.
    """
    return sha256(f"{tenant}\0{own}".encode()).hexdigest()
