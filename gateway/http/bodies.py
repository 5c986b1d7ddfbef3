"""Pure. The bodies that the gateway writes itself, and the headers of its errors."""

from __future__ import annotations

import math

import msgspec

from shared.endpoints import ErrorFamily
from shared.error_bodies import answer_event, error_body, error_event
from shared.errors import LoraplexError

__all__ = ["REQUEST_ID", "answer", "answer_event", "error_body", "error_event", "to_json"]

REQUEST_ID = "x-request-id"
_encode = msgspec.json.Encoder().encode


RETRY_AFTER_S = 1.0
"""Used where an error names no better time. Clients that wait so long do not hammer the gateway,
and its queue has moved meanwhile.
"""


def to_json(value: object) -> bytes:
    return _encode(value)


def answer(
    error: LoraplexError, request_id: str, family: ErrorFamily = ErrorFamily.OPENAI
) -> tuple[int, dict[str, str], bytes]:
    """(status, headers, body) of the answer to a request that ended with an error."""
    status = error.status
    headers = {REQUEST_ID: request_id, **error.headers}
    if status in (429, 503) or error.retry_after_s is not None:
        headers["Retry-After"] = str(
            math.ceil(RETRY_AFTER_S if error.retry_after_s is None else error.retry_after_s)
        )
    if status == 415:
        headers["Accept-Encoding"] = "gzip, deflate"
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return status, headers, error_body(error, family)
