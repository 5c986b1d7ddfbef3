"""Pure. Recognises simple HTTP/1.1 requests, as a whole, from the bytes of a connection.

A simple request asks nothing special of the protocol. All simple requests are valid for aiohttp's
parser as well, and mean the same there. Anything unusual is UNSUPPORTED and goes to aiohttp, which
knows all of HTTP: chunked bodies, `Expect`, `Upgrade`, `Connection: close`, a line outside the
grammar of RFC 9112, or a second request behind the first. So this parser need not be lenient, and
no bytes can be read in two ways.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import Final, TypeAlias

MAX_ON_LOOP_BYTES: Final = 256 << 10
"""Of a request that is handled in the callback that brought its last byte."""
MAX_HEAD_BYTES: Final = 8190
"""The longest head that is read here; it is aiohttp's own bound for a single line."""
MAX_FIELDS: Final = 100
"""Of a head that is read here. Each takes many times its length while the connection lasts."""
LIST_FIELD: Final = "tracestate"
"""W3C Trace Context lets a sender split this one list over several fields."""
_FIELD = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t -~\x80-\xff]*\r\n"
_HEAD = re.compile(rb"(GET|HEAD|POST) (/[!-~]*) HTTP/1\.1\r\n((?:" + _FIELD + rb")*)\r\n")
_UNSUPPORTED_FIELDS = re.compile(
    rb"\n(?:(?:transfer-encoding|content-encoding|expect|upgrade|te|trailer|http2-settings"
    rb"|sec-websocket-[a-z0-9-]+|idempotency-key):"
    rb"|connection:(?![ \t]*keep-alive[ \t]*\r))"
)
MAX_DIGITS: Final = 12
_LENGTH = re.compile(rb"\ncontent-length:[ \t]*([0-9]{1,%d})[ \t]*\r" % MAX_DIGITS)


class RequestHead:
    """The bytes of a request before its body, read once. A client that keeps its connection sends
    the same head again and again; only the length of the body differs.

    `fields` are the values by name in lower case, of several fields of one name the first (those of
    LIST_FIELD are joined), decoded as aiohttp does it. `before` and `after` are the bytes around
    the digits of `Content-Length`. `after` is empty if the request has no such field.

    `facts` is for whoever answers its requests: what was found out about them already.
    """

    __slots__ = ("after", "before", "facts", "fields", "method", "path")

    def __init__(self, method: str, path: str, fields: bytes, before: bytes, after: bytes) -> None:
        self.method, self.path = method, path
        self.before, self.after = before, after
        self.facts: object = None
        self.fields: dict[str, str] = {}
        for line in fields.decode("utf-8", "surrogateescape").split("\r\n")[:-1]:
            name, _, value = line.partition(":")
            name, value = name.lower(), value.strip(" \t")
            if name == LIST_FIELD and name in self.fields:
                self.fields[name] += f",{value}"
            else:
                self.fields.setdefault(name, value)


class SimpleRequest:
    """One simple request. `path` is the request target as it came, with its query."""

    __slots__ = ("body", "head", "header", "method", "path")

    def __init__(self, head: RequestHead, body: bytes) -> None:
        self.head, self.body = head, body
        self.method, self.path, self.header = head.method, head.path, head.fields.get


@dataclass(frozen=True, slots=True)
class IncompleteRequest:
    """The beginning of a simple request. `needed` bytes make it whole; 0 means unknown, because the
    head is not complete.
    """

    needed: int = 0


class Unsupported(Enum):
    """The request is not a simple one; aiohttp reads it."""

    UNSUPPORTED = "unsupported"


UNSUPPORTED: Final = Unsupported.UNSUPPORTED
HEAD_UNFINISHED: Final = IncompleteRequest()
Parsed: TypeAlias = SimpleRequest | IncompleteRequest | Unsupported


def parse(data: bytes, most_bytes: int, before: RequestHead | None = None) -> Parsed:
    """Reads the bytes that a connection has brought since its last request. They are one whole
    request, the beginning of one, or unsupported.

    `before` is the head of the last request. A head that differs from it in nothing but the body's
    length is not read again. A request of more than `most_bytes` is UNSUPPORTED.
    """
    if before is not None and before.after and data.startswith(before.before):
        start = len(before.before)
        stop = data.find(b"\r", start, start + MAX_DIGITS + 1)
        if stop > start and data.startswith(before.after, stop) and data[start:stop].isdigit():
            return _with_body(
                before, data, stop + len(before.after), int(data[start:stop]), most_bytes
            )
    found = _HEAD.match(data)
    if found is None:
        if (
            len(data) < MAX_HEAD_BYTES
            and b"\r\n\r\n" not in data
            and b"\n\n" not in data
            and _may_become_one(data)
        ):
            return HEAD_UNFINISHED
        return UNSUPPORTED
    end = found.end()
    if end > MAX_HEAD_BYTES:
        return UNSUPPORTED
    # This begins with a line's end, so that every field name has one before it.
    fields = data[found.start(3) - 1 : found.end(3)]
    lowered = fields.lower()
    lengths = lowered.count(b"\ncontent-length:")
    if (
        lengths > 1
        or lowered.count(b"\nhost:") != 1
        or lowered.count(b"\n") > MAX_FIELDS
        or _UNSUPPORTED_FIELDS.search(lowered) is not None
    ):
        return UNSUPPORTED
    method, path = found[1].decode(), found[2].decode()
    if not lengths:
        return _with_body(
            RequestHead(method, path, found[3], data[:end], b""), data, end, 0, most_bytes
        )
    given = _LENGTH.search(lowered)
    if given is None:
        return UNSUPPORTED
    digits_at = found.start(3) - 1 + given.start(1)
    head = RequestHead(
        method, path, found[3], data[:digits_at], data[digits_at + len(given[1]) : end]
    )
    return _with_body(head, data, end, int(given[1]), most_bytes)


def _with_body(head: RequestHead, data: bytes, end: int, length: int, most_bytes: int) -> Parsed:
    """Adds the body to a head that ends at `end`."""
    needed = end + length
    if needed > most_bytes or len(data) > needed:
        return UNSUPPORTED
    return SimpleRequest(head, data[end:]) if len(data) == needed else IncompleteRequest(needed)


def _may_become_one(data: bytes) -> bool:
    """Whether an incomplete head begins like the head of a simple request."""
    return any(
        data.startswith(method) or method.startswith(data)
        for method in (b"POST /", b"GET /", b"HEAD /")
    )
