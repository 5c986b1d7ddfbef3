"""Pure. Bytes with some of them changed."""

from __future__ import annotations

import random
import re

WORDS = (b"\r\n", b"\r\n\r\n", b"\0", b":", b'"', b"\\", b"{", b"[", b"9" * 40, b"1e999", b"\xff")


def mutated(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(out) + 1)
        kind = rng.randrange(4)
        if kind == 0:
            out[at:at] = rng.choice(WORDS)
        elif kind == 1:
            del out[at : at + rng.randint(1, 8)]
        elif kind == 2 and at < len(out):
            out[at] = rng.randrange(256)
        else:
            out = out[:at]
    return bytes(out)


_LENGTH = re.compile(rb"Content-Length: [0-9]+")


def mutated_body(request: bytes, rng: random.Random) -> bytes:
    """A request with another body, whose length it tells: what reads bodies gets to see it."""
    head, end, body = request.partition(b"\r\n\r\n")
    body = mutated(body, rng)
    return _LENGTH.sub(b"Content-Length: %d" % len(body), head) + end + body
