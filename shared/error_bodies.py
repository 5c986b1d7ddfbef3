"""Pure. Errors as clients get them. They are one object in OpenAI's shape; Anthropic's paths have
Anthropic's shape. A stream that failed ends with the error as an event.
"""

from __future__ import annotations

from typing import Any

import msgspec

from shared.api_endpoints import ErrorFamily
from shared.errors import LoraplexError

_encode = msgspec.json.Encoder().encode

_TYPE = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
}
_ANTHROPIC_TYPE = {413: "request_too_large", 503: "overloaded_error", 504: "timeout_error"}


def error_type(status: int, family: ErrorFamily = ErrorFamily.OPENAI) -> str:
    if family is ErrorFamily.ANTHROPIC:
        found = _ANTHROPIC_TYPE.get(status) or _TYPE.get(status)
        return found or ("invalid_request_error" if status < 500 else "api_error")
    return _TYPE.get(status) or ("invalid_request_error" if status < 500 else "server_error")


def error_object(
    status: int,
    code: str,
    message: str,
    param: str | None,
    family: ErrorFamily = ErrorFamily.OPENAI,
) -> dict[str, Any]:
    """The error object. `message`, `type` and `code` are never empty; `param` may be. Anthropic's
    shape has one more `type` around it.
    """
    error = {
        "message": message,
        "type": error_type(status, family),
        "param": param,
        "code": code,
    }
    if family is ErrorFamily.ANTHROPIC:
        return {"type": "error", "error": error}
    return {"error": error}


def error_body(error: LoraplexError, family: ErrorFamily = ErrorFamily.OPENAI) -> bytes:
    """The error as the body of an answer."""
    return _encode(error_object(error.status, error.code, error.message, error.param, family))


def error_event(error: LoraplexError, family: ErrorFamily = ErrorFamily.OPENAI) -> bytes:
    """The error as the last events of a stream whose status has been sent. Clients raise on it."""
    return answer_event(error_body(error, family), family)


def answer_event(body: bytes, family: ErrorFamily = ErrorFamily.OPENAI) -> bytes:
    """A whole JSON answer, usually an engine's error, as the last events of a stream. Line ends in
    it stand between JSON's tokens only, so they can be removed.
    """
    line = b"data: " + body.replace(b"\r", b"").replace(b"\n", b"") + b"\n\n"
    if family is ErrorFamily.OPENAI:
        return line + b"data: [DONE]\n\n"
    return b"event: error\n" + line
