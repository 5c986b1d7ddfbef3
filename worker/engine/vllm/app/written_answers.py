"""Shell. Answers that are JSON already take the way of those that vLLM's routes still write. Their
chunks reach AppAnswer beside ASGI, because joining them would take long, too.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from fastapi.responses import JSONResponse

WRITTEN = "written"
"""Where the chunks lie in the state of the request."""


class Written:
    """Takes the place of an answer's fields."""

    def __init__(self, chunks: deque[bytes]) -> None:
        self.chunks = chunks


class WrittenResponse(JSONResponse):  # type: ignore[misc]
    """Takes the place of JSONResponse in vLLM's routes."""

    _chunks: deque[bytes] | None = None

    def render(self, content: Any) -> bytes:
        if isinstance(content, Written):
            self._chunks = content.chunks
            return b""
        return bytes(super().render(content))

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if self._chunks is not None:
            scope["state"][WRITTEN] = self._chunks
        await super().__call__(scope, receive, send)
