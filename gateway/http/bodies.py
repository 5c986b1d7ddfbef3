"""Pure. The bodies that the gateway writes itself: errors and events in OpenAI's shapes."""

from __future__ import annotations

import math

import msgspec

from shared import errors
from shared.errors import LoraplexError

REQUEST_ID = "x-request-id"
_encode = msgspec.json.Encoder().encode


_TYPE = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "invalid_request_error",
    413: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
}


RETRY_AFTER_S = 1.0
"""Where an error says nothing better; long enough not to hammer, short enough for a queue to have
moved.
"""


def error_body(error: errors.LoraplexError) -> bytes:
    """OpenAI's error shape: `{"error": {"message", "type", "param", "code"}}`."""
    kind = _TYPE.get(error.status, "server_error")
    return _encode(
        {
            "error": {
                "message": error.message,
                "type": kind,
                "param": error.param,
                "code": error.code,
            }
        }
    )


def error_event(error: errors.LoraplexError) -> bytes:
    """The same as the last events of a stream whose status has been sent; clients raise on it."""
    return b"data: " + error_body(error) + b"\n\ndata: [DONE]\n\n"


def answer_event(body: bytes) -> bytes:
    """A whole JSON answer (the engine's error, as a rule) as the last events of a stream. JSON's
    line ends stand between tokens only.
    """
    return b"data: " + body.replace(b"\r", b"").replace(b"\n", b"") + b"\n\ndata: [DONE]\n\n"


def to_json(value: object) -> bytes:
    return _encode(value)


def answer(error: LoraplexError, request_id: str) -> tuple[int, dict[str, str], bytes]:
    """(status, headers, body) of an error's answer."""
    status = error.status
    headers = {REQUEST_ID: request_id}
    if status in (429, 503) or error.retry_after_s is not None:
        headers["Retry-After"] = str(
            math.ceil(RETRY_AFTER_S if error.retry_after_s is None else error.retry_after_s)
        )
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return status, headers, error_body(error)
