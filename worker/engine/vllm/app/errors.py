"""Pure. Turns vLLM's error answers into the shape that every error has here."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import msgspec

from shared.api_endpoints import ErrorFamily
from shared.error_bodies import error_object
from shared.errors import EngineFailure, InvalidRequest, RouteNotFound

_encode = msgspec.json.Encoder().encode
_CODES = {400: InvalidRequest.code, 404: RouteNotFound.code}
_LONG = ("maximum context length", "longer than the maximum model length", "too long")
TOO_LONG = "context_length_exceeded"
"""OpenAI's code for a prompt that is too long. Clients that know it shorten the prompt and ask
again.
"""
UNSAID = "The engine refused this request without a reason."
_FLAG = re.compile(r"--([a-z][a-z0-9-]*)")
_EVENT = re.compile(rb'(?:event: error\r?\n)?data: (\{.*"error".*\})', re.DOTALL)


def in_our_shape(
    status: int, body: bytes, family: ErrorFamily, arguments: Collection[str]
) -> bytes:
    """The body of an answer with an error's `status`, in our shape, whatever vLLM wrote.

    `arguments` are the names of vLLM's arguments. Where vLLM's message names a command-line flag,
    ours names the config's key instead.
    """
    try:
        given = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        given = body.decode(errors="replace").strip()
    error = given.get("error", given) if isinstance(given, dict) else {"message": given}
    return _encode(_object(status, error if isinstance(error, dict) else {}, family, arguments))


def event_in_our_shape(
    data: bytes, family: ErrorFamily, arguments: Collection[str]
) -> bytes | None:
    """One event of a stream that reports an error, in our shape. None for any other event."""
    found = _error_in(data, family, arguments)
    if found is None:
        return None
    _, body, rest = found
    line = b"data: " + body + rest
    return line if family is ErrorFamily.OPENAI else b"event: error\n" + line


def refusal(
    data: bytes, family: ErrorFamily, arguments: Collection[str]
) -> tuple[int, bytes] | None:
    """The status and body to answer with, if the whole answer is this one error event.
    Else None.
    """
    found = _error_in(data, family, arguments)
    return None if found is None else found[:2]


def _error_in(
    data: bytes, family: ErrorFamily, arguments: Collection[str]
) -> tuple[int, bytes, bytes] | None:
    """The status and body in our shape, and the bytes that follow the event's line."""
    if b'"error"' not in data[:200]:
        return None
    found = _EVENT.match(data)
    if found is None:
        return None
    try:
        given = msgspec.json.decode(found[1].strip())
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    error = given.get("error") if isinstance(given, dict) else None
    if not isinstance(error, dict) or "message" not in error:
        return None
    code = error.get("code")
    status = code if isinstance(code, int) and 400 <= code < 600 else 500
    return status, _encode(_object(status, error, family, arguments)), data[found.end(1) :]


def _object(
    status: int, error: dict[str, Any], family: ErrorFamily, arguments: Collection[str]
) -> dict[str, Any]:
    message = error.get("message") or error.get("detail") or UNSAID
    text = message if isinstance(message, str) else _encode(message).decode()
    text = _FLAG.sub(lambda flag: _as_key(flag, arguments), text)
    given, param = error.get("code"), error.get("param")
    code = given if isinstance(given, str) and not given.isdigit() else _code(status, text)
    return error_object(status, code, text, param if isinstance(param, str) else None, family)


def _code(status: int, message: str) -> str:
    if status == InvalidRequest.status and any(words in message for words in _LONG):
        return TOO_LONG
    return _CODES.get(status) or (InvalidRequest.code if status < 500 else EngineFailure.code)


def _as_key(flag: re.Match[str], arguments: Collection[str]) -> str:
    key = flag[1].replace("-", "_")
    return f"engine_kwargs.{key}" if key in arguments else flag[0]
