"""Pure. What a tenant, or somebody without a key, may send to hurt others: by name the bytes of one
connection. `KEY` stands where a key goes.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator

KEY = "tenant-a-key-000000"
CHAT = "/v1/chat/completions"
HI = b'"messages":[{"role":"user","content":"hi"}]'
NUMBERS = (
    b"1" + b"0" * 400,
    b"1" + b"0" * 308,
    b"1e400",
    b"-1" + b"0" * 400,
    b"NaN",
    b"Infinity",
    b"9223372036854775808",
    b'"1' + b"0" * 400 + b'"',
)
FIELDS = ("max_tokens", "max_completion_tokens", "n", "priority", "min_tokens")


def head(*lines: str, method: str = "POST", path: str = CHAT, key: str | None = KEY) -> bytes:
    auth = [f"Authorization: Bearer {key}"] if key else []
    kind = ["Content-Type: application/json"]
    return "\r\n".join(
        [f"{method} {path} HTTP/1.1", "Host: x", *auth, *kind, *lines, "", ""]
    ).encode("latin-1")


def post(fields: bytes, *lines: str, key: str | None = KEY) -> bytes:
    body = b'{"model":"sim",%b}' % fields
    return head(*lines, f"Content-Length: {len(body)}", key=key) + body


def corpus() -> Iterator[tuple[str, bytes]]:
    for field in FIELDS:
        for n, number in enumerate(NUMBERS):
            yield f"{field} {n}", post(HI + b',"%b":%b' % (field.encode(), number))
    yield from _shapes()
    yield from _framing()
    yield from _encodings()


def _shapes() -> Iterator[tuple[str, bytes]]:
    def many(item: bytes, count: int) -> bytes:
        return b"[" + b",".join([item] * count) + b"]"

    yield (
        "300,000 messages",
        post(b'"messages":' + many(b'{"role":"user","content":"hi"}', 300_000)),
    )
    yield "8 million objects", post(HI + b',"x":' + many(b"{}", 8_000_000))
    yield (
        "30 MB of text",
        post(b'"messages":[{"role":"user","content":"%b"}]' % (b"a " * 15_000_000)),
    )
    yield "line ends", post(b'"messages":[{"role":"user","content":"%b"}]' % (b"\\n" * 8_000_000))
    yield "quotes", post(HI + b',"x":"%b"' % (b'\\"' * 2_000_000))
    yield "nesting", post(HI + b',"x":' + b"[" * 200_000)
    yield "n 1000", post(HI + b',"n":1000,"max_tokens":300')
    yield "prompts", post(b'"prompt":' + many(b'"a"', 100_000))
    yield (
        "choices",
        post(
            HI
            + b',"structured_outputs":'
            + json.dumps({"choice": [f"c{n}" for n in range(50_000)]}).encode()
        ),
    )
    yield "regex", post(HI + b',"structured_outputs":{"regex":"((a{1,999}){1,999}){1,999}"}')
    yield "long model", head("Content-Length: 1000013") + b'{"model":"%b"}' % (b"m" * 1_000_000)
    yield "no model text", post(b'"model":"\\ud800"')
    yield "priority header", post(HI, "x-loraplex-priority: -" + "9" * 300)
    yield "timeout header", post(HI, "x-loraplex-timeout-ms: 1" + "0" * 300)


def _framing() -> Iterator[tuple[str, bytes]]:
    yield "odd key", head("Content-Length: 2", key="\xff\xfe") + b"{}"
    yield "two lengths", head("Content-Length: 2", "Content-Length: 3") + b"{}"
    yield (
        "length and chunks",
        head("Content-Length: 2", "Transfer-Encoding: chunked") + b"0\r\n\r\n",
    )
    yield "bad chunk", head("Transfer-Encoding: chunked") + b"zz\r\nhello"
    yield "endless chunks", head("Transfer-Encoding: chunked") + b"5\r\nhello\r\n" * 100_000
    yield "unfinished body", head("Content-Length: 31000000") + b"{" * 5_000_000
    yield "unfinished, no key", head("Content-Length: 1040000", key=None) + b"{" * 1_000_000
    yield "unfinished head", head()[:-4]
    yield (
        "endless head",
        head()[:-2] + b"".join(b"X-%d: %b\r\n" % (n, b"a" * 8000) for n in range(100)),
    )
    yield "zeros", bytes(100_000)
    yield "tls hello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200)
    yield "http/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    yield "pipelined junk", post(HI + b',"stream":true') + b"\0junk\r\n\r\n"
    yield "pipelined requests", post(HI + b',"max_tokens":1') * 50
    yield "upgrade", head("Upgrade: websocket", "Connection: Upgrade", method="GET")
    yield "close", post(HI + b',"stream":true,"max_tokens":400', "Connection: close")
    yield "expect", post(HI + b',"stream":true', "Expect: 100-continue") + b"\0garbage\r\n\r\n"
    yield "control character", head("X: \x01", "Content-Length: 2") + b"{}"


def _encodings() -> Iterator[tuple[str, bytes]]:
    bomb = zlib.compress(bytes(200 << 20), 9)
    for name, data in (
        ("deflate", bomb),
        ("gzip", gzip.compress(bytes(100 << 20), 9)),
        ("br", b"x"),
    ):
        for who, key in (("", KEY), (", no key", None)):
            lines = (f"Content-Encoding: {name}", f"Content-Length: {len(data)}")
            yield f"{name} bomb{who}", head(*lines, key=key) + data
