"""Shell. What the gateway reads from a request's headers: its id, its deadline and its caller."""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
import re
import secrets
from collections.abc import Callable
from typing import Protocol

import msgspec
from aiohttp import web

from gateway.http.json_responses import REQUEST_ID
from gateway.http.parser import LIST_FIELD
from shared.errors import DeadlineExceeded

TIMEOUT_HEADER = "x-loraplex-timeout-ms"
RESUME_HEADER = "x-loraplex-resume"  # `off`: this answer ends with its worker
MAX_SESSION = 128  # characters of an x-session-id that count
MAX_CALLERS = 1024  # keys whose digests are remembered, so that they need not be made again
TIMEOUT_MS = re.compile(r"0*[1-9][0-9]{0,8}\Z")
# Ids of requests are unique, and no secret: a number of this process and one of the request.
_OF_THIS_PROCESS = secrets.token_hex(8)
_request_numbers = itertools.count(1)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}\Z")
# an id, not a secret; uuid4 would ask the kernel every time
random_id = functools.partial(random.getrandbits, 128)


class IncomingRequest(Protocol):
    """The path and header fields (names in lower case) of a request, whichever parser has read
    them.
    """

    @property
    def path(self) -> str: ...
    @property
    def method(self) -> str: ...
    @property
    def header(self) -> Callable[[str], str | None]:
        """The value of a field, the first if there are several. Those of LIST_FIELD are joined."""
        ...


class AiohttpRequest:
    """A request that aiohttp has read."""

    def __init__(self, request: web.BaseRequest) -> None:
        self.path, self.method = request.path, request.method
        self._headers = request.headers

    def header(self, name: str) -> str | None:
        if name == LIST_FIELD:
            return ",".join(self._headers.getall(name, ())) or None
        return self._headers.get(name)


def authorization_of(incoming: IncomingRequest) -> str:
    """The client's `Authorization` value. Anthropic's clients send their key in a header of their
    own.
    """
    given = incoming.header("authorization")
    if given:
        return given
    key = incoming.header("x-api-key")
    return f"Bearer {key}" if key else ""


class RequestDeadline(msgspec.Struct, frozen=True, gc=False):
    """`at` is a time on the loop's clock; `after_s` is its distance from the request's arrival."""

    at: float
    after_s: float

    def exceeded(self, phase: str) -> DeadlineExceeded:
        return DeadlineExceeded(
            f"The request was not finished within {self.after_s:g} s (it was still {phase})."
        )


def is_request_id(text: str) -> bool:
    """Whether it can be the id of a request: harmless in headers and logs."""
    return _REQUEST_ID.match(text) is not None


def request_id_of(incoming: IncomingRequest) -> str:
    """The client's own id if it gives one, else a new one."""
    return given_id(incoming) or new_request_id()


def given_id(incoming: IncomingRequest) -> str:
    """The client's own id if it is harmless in headers and logs, else empty."""
    given = incoming.header(REQUEST_ID)
    return given if given is not None and _REQUEST_ID.match(given) else ""


def new_request_id() -> str:
    return f"{_OF_THIS_PROCESS}{next(_request_numbers):016x}"


@functools.lru_cache(MAX_CALLERS)
def caller_of(authorization: str) -> str:
    """Identifies a caller by the first bytes of the digest of its `Authorization` header, whether
    the key was checked or not. It keeps a caller with the same version of an alias and decides
    nothing else.
    """
    return (
        hashlib.sha256(authorization.encode(errors="replace")).hexdigest()[:16]
        if authorization
        else ""
    )
