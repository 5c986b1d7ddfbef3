"""Pure. Token ids as they are sent beside the bytes of an answer: 32-bit words, little-endian.

A word below CHOICE is a token id. A word from CHOICE on says whose tokens follow: its low bits are
the number of a choice. Words without such a mark belong to choice 0. So an answer with one choice
needs no marks, and the words of several frames can simply be joined.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

CHOICE = 1 << 31
BYTES_PER_TOKEN = 4
_one = struct.Struct("<I").pack


def pack(ids: Sequence[int]) -> bytes:
    """The words of an answer with one choice."""
    return _one(ids[0]) if len(ids) == 1 else struct.pack(f"<{len(ids)}I", *ids)


def pack_choice(choice: int, ids: Iterable[int]) -> bytes:
    """The words of one choice of several."""
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


def count(words: bytes) -> int:
    """How many tokens there are, of all choices."""
    whole = len(words) // BYTES_PER_TOKEN
    return sum(word < CHOICE for word in struct.unpack_from(f"<{whole}I", words))
