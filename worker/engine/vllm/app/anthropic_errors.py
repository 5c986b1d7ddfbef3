"""Shell. Errors of `/v1/messages`. vLLM makes its streams from its chat streams and does not
understand an error there. It would tell the client that a chat chunk could not be read.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from typing import Any

ERROR = 'data: {"error"'
"""How an error begins in vLLM's chat streams."""


def pass_errors(serving: Any) -> None:
    """Makes `serving`, vLLM's object for messages, hand on the errors of its chat streams."""
    convert = serving.message_stream_converter

    async def converted(chat: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
        error = ""

        async def without_error() -> AsyncGenerator[str, None]:
            nonlocal error
            async for chunk in chat:
                if chunk.startswith(ERROR):
                    error = chunk
                    return
                yield chunk

        async for event in convert(without_error()):
            yield event
        if error:
            yield "event: error\n" + error

    serving.message_stream_converter = converted


def leave_refusals_unlogged() -> None:
    """vLLM logs what it refuses on these paths, with tracebacks of 50 lines. But it is the client's
    mistake, the client is told, and any client could fill the log.
    """
    logging.getLogger("vllm.entrypoints.anthropic.api_router").addFilter(_is_no_refusal)


def _is_no_refusal(record: logging.LogRecord) -> bool:
    from vllm.exceptions import VLLMClientError

    return not (record.exc_info and isinstance(record.exc_info[1], VLLMClientError))
