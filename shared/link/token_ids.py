"""Pure. Token ids as they travel beside the bytes of an answer: 32-bit words, little-endian.

A word below CHOICE is the id of a token. A word from CHOICE on says whose tokens follow: its low
bits are the number of a choice. Words without such a mark belong to choice 0, so an answer with one
choice needs none, and the words of several frames can be joined as they are.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

CHOICE = 1 << 31
BYTES_PER_TOKEN = 4
_one = struct.Struct("<I").pack


def pack(ids: Sequence[int]) -> bytes:
    """Of the only choice of an answer."""
    return _one(ids[0]) if len(ids) == 1 else struct.pack(f"<{len(ids)}I", *ids)


def pack_choice(choice: int, ids: Iterable[int]) -> bytes:
    """Of one choice of several."""
    return pack([CHOICE | choice, *ids])


def unpack(words: bytes) -> dict[int, list[int]]:
    """The tokens of each choice, in their order.

    Raises ValueError if the bytes are not whole words.
    """
    if len(words) % BYTES_PER_TOKEN:
        raise ValueError(f"{len(words)} bytes are not whole token ids")
    found: dict[int, list[int]] = {}
    choice = 0
    for word in struct.unpack(f"<{len(words) // BYTES_PER_TOKEN}I", words):
        if word >= CHOICE:
            choice = word - CHOICE
        else:
            found.setdefault(choice, []).append(word)
    return found
