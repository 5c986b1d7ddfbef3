"""Shell. Parameters and bodies of /admin requests, checked in one way, and plain answers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeAlias, TypeVar

import msgspec
from aiohttp import web

from gateway.http.json_responses import to_json
from shared.errors import InvalidRequest

T = TypeVar("T")
Handler: TypeAlias = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


async def body_of(request: web.BaseRequest, kind: type[T]) -> T:
    """The body, decoded into this struct. Raises InvalidRequest."""
    raw = await request.read()
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise InvalidRequest(f"The request body is not what this path takes: {exc}") from exc


def choice(key: str, value: str, allowed: Sequence[str] | Mapping[str, object]) -> str:
    """`value`, which must be one of `allowed`. Raises InvalidRequest that names parameter `key`."""
    if value not in allowed:
        raise InvalidRequest(
            f"`{key}` must be one of {listed(list(allowed))}, not `{value[:200]}`.", param=key
        )
    return value


def number(request: web.BaseRequest, key: str, otherwise: float, most: float) -> float:
    """The query parameter `key`: a number above 0 and at most `most`. `otherwise` if it is not
    given. An int as `most` asks for a whole number.

    Raises InvalidRequest.
    """
    given = request.query.get(key)
    if given is None:
        return otherwise
    try:
        number = float(given) if isinstance(most, float) else int(given)
    except ValueError:
        number = 0
    if not 0 < number <= most:  # false for NaN too
        raise InvalidRequest(f"`{key}` must be a number above 0 and at most {most:g}.", param=key)
    return number


def listed(names: Sequence[str]) -> str:
    """The first ten names, for a message."""
    return ", ".join(f"`{n}`" for n in names[:10]) or "(none)"


def json_answer(value: object) -> web.Response:
    return web.Response(body=to_json(value), content_type="application/json")


def text_answer(text: str) -> web.Response:
    return web.Response(text=text)
