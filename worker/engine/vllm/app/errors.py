"""Pure. What vLLM answers instead of an answer, in the shape that every error has here."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import msgspec

from shared.endpoints import ErrorFamily
from shared.error_bodies import error_object
from shared.errors import EngineFailure, InvalidRequest, RouteNotFound

_encode = msgspec.json.Encoder().encode
_CODES = {400: InvalidRequest.code, 404: RouteNotFound.code}
_LONG = ("maximum context length", "longer than the maximum model length", "too long")
TOO_LONG = "context_length_exceeded"
"""OpenAI's code; clients shorten the prompt and ask again."""
UNSAID = "The engine refused this request without a reason."
_FLAG = re.compile(r"--([a-z][a-z0-9-]*)")
_EVENT = re.compile(rb'(?:event: error\r?\n)?data: (\{.*"error".*\})', re.DOTALL)


def in_our_shape(
    status: int, body: bytes, family: ErrorFamily, arguments: Collection[str]
) -> bytes:
    """The body of an answer with an error's `status`, whatever it was before.

    `arguments` are the names of vLLM's arguments: a message that names one by its flag names the
    config's key instead.
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
    """One event of a stream that tells of an error; None for any other."""
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
    line = b"data: " + _encode(_object(status, error, family, arguments)) + data[found.end(1) :]
    return line if family is ErrorFamily.OPENAI else b"event: error\n" + line


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
