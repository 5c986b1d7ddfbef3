"""Pure. How much work the grammar of a JSON schema is. The engine makes one grammar at a time, so a
small schema that takes a minute makes everybody else's wait. Measured with xgrammar 0.2.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec

from shared.errors import InvalidRequest

MAX_COUNTED = 2500
"""Of an object with `minProperties` or `maxProperties`, a grammar has a rule for each property and
each number of properties before it: 0.2 ms each.
"""
MAX_LENGTHS = 32
"""Each pair of `minLength` and `maxLength` that differs from the others takes 0.1 s."""
MAX_DIGITS = 10_000
"""Of all bounds of numbers together: 40 us each."""
_RANGES = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_COSTLY = (b"Properties", b"Length", b"imum", b"\\u")  # an escape may hide a name
_decode = msgspec.json.Decoder().decode


def check_schemas(field: str, raw: bytes) -> None:
    """`raw` is the JSON of the body's field with all schemas in it, which may be texts. Raises
    InvalidRequest.
    """
    if not any(part in raw for part in _COSTLY):
        return
    counted, digits, lengths = 0, 0.0, set[tuple[object, object]]()
    todo: list[Any] = [_value(raw)]
    while todo:
        value = todo.pop()
        if isinstance(value, list):
            todo += value
        elif isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
            todo.append(_value(value))
        elif isinstance(value, dict):
            todo += value.values()
            counted += _counted_properties(value)
            digits += sum(_digits(value.get(name)) for name in _RANGES)
            if "minLength" in value or "maxLength" in value:
                lengths.add((str(value.get("minLength")), str(value.get("maxLength"))))
    if counted > MAX_COUNTED:
        raise InvalidRequest(
            f"`{field}` has too many properties where `minProperties` or `maxProperties` count "
            f"them: {counted} (properties times their number); at most {MAX_COUNTED} are served.",
            param=field,
        )
    if len(lengths) > MAX_LENGTHS:
        raise InvalidRequest(
            f"`{field}` has {len(lengths)} different pairs of `minLength` and `maxLength`; at most "
            f"{MAX_LENGTHS} are served.",
            param=field,
        )
    if digits > MAX_DIGITS:
        raise InvalidRequest(
            f"The bounds of numbers in `{field}` have more than {MAX_DIGITS} digits together.",
            param=field,
        )


def _value(raw: bytes | str) -> Any:
    """None for what is no JSON: the worker refuses it, or takes it for a text."""
    try:
        return _decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def _counted_properties(schema: dict[str, Any]) -> int:
    properties = schema.get("properties")
    if not isinstance(properties, dict) or schema.keys().isdisjoint(
        ("minProperties", "maxProperties")
    ):
        return 0
    count, most = len(properties), schema.get("maxProperties")
    if isinstance(most, int | float) and 0 <= most < count:
        count = max(1, int(most))
    return len(properties) * count


def _digits(number: object) -> float:
    """The digits of a whole number near it."""
    if isinstance(number, int) and number.bit_length() > 1024:
        return math.inf
    if isinstance(number, int | float) and abs(number) > 1:
        return math.log10(abs(number)) + 1 if math.isfinite(number) else math.inf
    return 0.0
