"""Pure. Numbers and booleans as vLLM's pydantic takes them: 5.0 and "5" for 5, true for 1; "yes",
"on" and 1.0 for true.
"""

from __future__ import annotations

import math
import re

_INTEGER = re.compile(r"\s*[+-]?[0-9]+(?:_[0-9]+)*(?:\.0+)?\s*\Z")
MAX_INTEGER_CHARACTERS = 4096
"""Python refuses to read a longer number. vLLM takes one whose digits are nearly all zeros."""
_TRUE = frozenset(("1", "on", "t", "true", "y", "yes"))
_FALSE = frozenset(("0", "off", "f", "false", "n", "no"))


def integer(value: object) -> int | None:
    """The number, as pydantic would take it. None: pydantic would refuse it."""
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return int(value) if math.isfinite(value) and value.is_integer() else None
    if isinstance(value, str) and len(value) <= MAX_INTEGER_CHARACTERS and _INTEGER.match(value):
        return int(value.strip().partition(".")[0])
    return None


def boolean(value: object) -> bool | None:
    """The same for true and false."""
    if isinstance(value, (bool, int, float)):
        return bool(value) if value in (0, 1) else None
    if isinstance(value, str):
        word = value.lower()
        return True if word in _TRUE else False if word in _FALSE else None
    return None


def is_true(text: str) -> bool:
    """Whether a field of a form or of a query means true."""
    return text.lower() in _TRUE
