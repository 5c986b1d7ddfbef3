"""Pure. JSON bodies that the gateway writes itself, and the status and headers of its errors."""

from __future__ import annotations

import math

import msgspec

from shared.api_endpoints import ErrorFamily
from shared.error_bodies import answer_event, error_body, error_event
from shared.errors import LoraplexError

__all__ = ["REQUEST_ID", "answer", "answer_event", "error_body", "error_event", "to_json"]

REQUEST_ID = "x-request-id"
_encode = msgspec.json.Encoder().encode


RETRY_AFTER_S = 1.0
"""The Retry-After of an error that names no time. Clients that wait this long do not overload the
gateway, and its queue has moved on by then.
"""


def to_json(value: object) -> bytes:
    return _encode(value)


def answer(
    error: LoraplexError, request_id: str, family: ErrorFamily = ErrorFamily.OPENAI
) -> tuple[int, dict[str, str], bytes]:
    """(status, headers, body) for a request that ended with this error. `family` chooses the shape
    of the body.
    """
    status = error.status
    headers = {REQUEST_ID: request_id, **error.headers}
    if status in (429, 503) or error.retry_after_s is not None:
        headers["Retry-After"] = str(
            math.ceil(RETRY_AFTER_S if error.retry_after_s is None else error.retry_after_s)
        )
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return status, headers, error_body(error, family)
