"""Pure. How much work the grammar of a JSON schema is. The engine makes one grammar at a time, so a
small schema that takes a minute makes everybody else's wait. Measured with xgrammar 0.2.
"""

from __future__ import annotations

import math
import re
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
MAX_NULLABLE = 256
"""Of parts of one regular expression that may be empty, as `a*` or `(|a)`. Any of them may be left
out up to any other, so their square counts: 6 us each.
"""
MAX_OPTIONAL = 500
"""Of properties of one object that may be left out. Their square counts for the same reason."""
MAX_FORMATS = 200
"""A `format` is a large regular expression: 2.5 ms for that of a URI."""
_NULLABLE = re.compile(r"[*?]|\(\||\|\)|\|\|")
_ESCAPED = re.compile(rb"\\+u00([2-7][0-9a-fA-F])")
MAX_ESCAPED = 3
"""How often a text may stand in JSON inside of JSON."""
_RANGES = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
# an escape may hide a name
_COSTLY = re.compile(rb"ropert|Length|imum|format|[*?|]|\\u")
_decode = msgspec.json.Decoder().decode


def check_schemas(field: str, raw: bytes) -> None:
    """`raw` is the JSON of the body's field with all schemas in it, which may be texts. Raises
    InvalidRequest.
    """
    if _COSTLY.search(raw) is None:
        return
    counted, optional, formats, nullable, digits = 0, 0, 0, 0, 0.0
    lengths = set[tuple[object, object]]()
    todo: list[Any] = [_value(raw)]
    while todo:
        value = todo.pop()
        if isinstance(value, list):
            todo += value
        elif isinstance(value, str):
            inside = _value(value) if value.lstrip()[:1] in ("{", "[") else None
            if inside is None:
                nullable += len(_NULLABLE.findall(value)) ** 2
            todo.append(inside)
        elif isinstance(value, dict):
            todo += value.values()
            counted += _counted_properties(value)
            optional += _optional_properties(value) ** 2
            formats += isinstance(value.get("format"), str)
            digits += sum(_digits(value.get(name)) for name in _RANGES)
            if "minLength" in value or "maxLength" in value:
                lengths.add((_number(value.get("minLength")), _number(value.get("maxLength"))))
    for beyond, what in (
        (
            counted > MAX_COUNTED,
            "too many properties where `minProperties` or `maxProperties` count them: "
            f"{counted} (properties times their number); at most {MAX_COUNTED} are served",
        ),
        (
            nullable > MAX_NULLABLE**2,
            f"a regular expression with more than {MAX_NULLABLE} parts that may be empty",
        ),
        (
            optional > MAX_OPTIONAL**2,
            f"more than {MAX_OPTIONAL} properties that are not required",
        ),
        (formats > MAX_FORMATS, f"more than {MAX_FORMATS} formats"),
        (
            len(lengths) > MAX_LENGTHS,
            f"{len(lengths)} different pairs of `minLength` and `maxLength`; at most "
            f"{MAX_LENGTHS} are served",
        ),
        (digits > MAX_DIGITS, f"bounds of numbers with more than {MAX_DIGITS} digits together"),
    ):
        if beyond:
            raise InvalidRequest(f"`{field}` has {what}.", param=field)


def unescaped(field: str, raw: bytes) -> bytes:
    """The JSON without escapes of ASCII, behind which signs of a regular expression may hide.
    Raises InvalidRequest for escapes of escapes of escapes.
    """
    for _ in range(MAX_ESCAPED):
        if _ESCAPED.search(raw) is None:
            return raw
        raw = _ESCAPED.sub(_sign, raw)
    raise InvalidRequest(f"`{field}` has escapes of escapes.", param=field)


def _sign(escaped: re.Match[bytes]) -> bytes:
    sign = bytes([int(escaped[1], 16)])
    return b" " if sign == b'"' else sign  # a quotation mark would end the text


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


def _optional_properties(schema: dict[str, Any]) -> int:
    properties, required = schema.get("properties"), schema.get("required")
    if not isinstance(properties, dict):
        return 0
    named = {it for it in required if isinstance(it, str)} if isinstance(required, list) else ()
    return len(properties) - len(properties.keys() & named)


def _number(given: object) -> float | None:
    """None for what is none: it may be large."""
    return given if isinstance(given, int | float) else None


def _digits(number: object) -> float:
    """The digits of a whole number near it."""
    if isinstance(number, int) and number.bit_length() > 1024:
        return math.inf
    if isinstance(number, int | float) and abs(number) > 1:
        return math.log10(abs(number)) + 1 if math.isfinite(number) else math.inf
    return 0.0
