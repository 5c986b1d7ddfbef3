"""Shell. A call ends its own requests and no other's. Clients choose their `x-request-id`, and vLLM
names the requests of an engine after it. Where a client leaves a transcription, vLLM aborts all
requests of that name, another tenant's as well.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any

from vllm.v1.engine.async_llm import AsyncLLM

OWN: ContextVar[set[str] | None] = ContextVar("own_requests", default=None)
"""The engine's ids of all requests that this call has made. None: this is no call."""


def abort_own_only(llm: AsyncLLM) -> None:
    """Called once for each engine."""
    add, abort, known = llm.output_processor.add_request, llm.abort, llm.output_processor

    def add_request(request: Any, *more: Any, **named: Any) -> None:
        add(request, *more, **named)
        own = OWN.get()
        if own is not None:
            own.add(request.request_id)

    async def abort_own(request_id: str | Iterable[str], internal: bool = False) -> None:
        own = OWN.get()
        if not internal and own is not None:
            names = [request_id] if isinstance(request_id, str) else request_id
            request_id = [
                one for name in names for one in known.external_req_ids.get(name, ()) if one in own
            ]
            internal = True
        await abort(request_id, internal)

    llm.output_processor.add_request, llm.abort = add_request, abort_own
