"""Pure. Counts the values of a large body without decoding it.

A decoder holds the Python interpreter until it has finished. That is fine for text: 30 MB of it
take 10 ms. It is not fine for 10 million empty objects in as many bytes. So a large body is counted
first, by a thread beside the event loop, and refused if it has too many values. The thread works in
small steps, since threads take turns only between steps.
"""

from __future__ import annotations

from shared.errors import InvalidRequest

SLICE_BYTES = 1 << 20
"""How much is scanned in one step."""
MAX_VALUES = 700_000
"""The most commas outside of texts. That many token ids hold vLLM's event loop for 45 ms while it
reads them.
"""
MAX_TEXTS = 300_000
"""The most texts, keys and escaped quotes. Each takes a step of about a microsecond."""
_QUOTE, _BACKSLASH, _DATA_URL = b'"', b"\\", b"data:"


def check_large_body(body: bytes, max_text_bytes: int) -> None:
    """Raises InvalidRequest for a body that is costly to decode, or with more than `max_text_bytes`
    of text to make a prompt of. An image (a data URL without escapes) does not count as text.
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
    """Whether an odd number of backslashes stands before the quote. `start` is the text's opening
    quote.
    """
    window = 16
    while True:
        begin = max(start + 1, quote - window)
        before = body[begin:quote]
        run = len(before) - len(before.rstrip(_BACKSLASH))
        if run < len(before) or begin == start + 1:
            return run % 2 == 1
        window *= 4
