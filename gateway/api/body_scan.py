"""Pure. A look at a large body before it is decoded: how many values it has, counted without
decoding them.

A decoder holds the interpreter until it is done. For text that is short (30 MB of it take 10 ms);
for 10 million empty objects in the same bytes it is not. So a large body is looked at first, in
small steps, which a thread does beside the loop, and one with too many values is refused.
Steps are small because threads take turns between them, not within one.
"""

from __future__ import annotations

from shared.errors import InvalidRequest

SLICE_BYTES = 1 << 20
"""Looked at in one step."""
MAX_VALUES = 1_500_000
"""Commas outside of texts: a prompt of a million token ids has as many."""
MAX_TEXTS = 300_000
"""Texts, keys and escaped quotes; each is a step of a microsecond."""
_QUOTE, _BACKSLASH, _DATA_URL = b'"', b"\\", b"data:"


def check_large_body(body: bytes, max_text_bytes: int) -> None:
    """Raises InvalidRequest for a body that is costly to decode, or to make a prompt of. A picture
    (a data URL without escapes) is no text.
    """
    at = values = texts = text_bytes = 0
    while True:
        start = _find(body, at)
        values += _commas(body, at, start)
        if values > MAX_VALUES:
            raise InvalidRequest(f"The request body has more than {MAX_VALUES} values.")
        if start == len(body):
            return
        end = start
        while True:
            texts += 1
            if texts > MAX_TEXTS:
                raise InvalidRequest(
                    f"The request body has more than {MAX_TEXTS} texts and quotes."
                )
            end = _find(body, end + 1)
            if end == len(body) or not _is_escaped(body, start, end):
                break
        if not body.startswith(_DATA_URL, start + 1) or body.find(_BACKSLASH, start, end) >= 0:
            text_bytes += end - start
        if text_bytes > max_text_bytes:
            raise InvalidRequest(f"The request has more than {max_text_bytes} bytes of text.")
        at = min(end + 1, len(body))


def _find(body: bytes, start: int) -> int:
    found = body.find(_QUOTE, start)
    return len(body) if found < 0 else found


def _commas(body: bytes, start: int, end: int) -> int:
    count = 0
    while start < end and count <= MAX_VALUES:
        count += body.count(b",", start, min(start + SLICE_BYTES, end))
        start += SLICE_BYTES
    return count


def _is_escaped(body: bytes, start: int, quote: int) -> bool:
    """An odd number of backslashes stands before it. `start` is the text's first quote."""
    window = 16
    while True:
        begin = max(start + 1, quote - window)
        before = body[begin:quote]
        run = len(before) - len(before.rstrip(_BACKSLASH))
        if run < len(before) or begin == start + 1:
            return run % 2 == 1
        window *= 4
